"""examples/trainers: SOAP in the hands of Lightning, Accelerate and Hugging Face's Trainer.

What is checked is what the optimizer itself sees: torch's own hooks record it at each of its steps.
"""

import importlib
import math
import os
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from soap_opt import SOAP

# What the scripts take where nothing is said
STEPS = {"lightning": 60, "accelerate": 50, "transformers": 50}
# transformers takes some seconds to import
FRAMEWORKS = [
    "lightning",
    "accelerate",
    pytest.param("transformers", marks=pytest.mark.slow),
]


@dataclass
class Seen:
    """Of one optimizer, at each of its steps."""

    grads: list = field(default_factory=list)
    lrs: list = field(default_factory=list)

    def norms(self):
        return [float(torch.nn.utils.get_total_norm(grads)) for grads in self.grads]


@pytest.fixture
def seen():
    """Every SOAP that made a step, in the order of their first steps."""
    steps: dict[SOAP, Seen] = {}

    def record(optimizer, args, kwargs):
        if isinstance(optimizer, SOAP):
            own = steps.setdefault(optimizer, Seen())
            own.grads.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
            own.lrs.append([group["lr"] for group in optimizer.param_groups])

    # After the step, which leaves gradients alone: Lightning makes and clips them within step, in a closure.
    handle = register_optimizer_step_post_hook(record)
    yield steps
    handle.remove()


@pytest.fixture
def output_dtypes():
    """Of all linear layers' outputs."""
    dtypes = set()
    handle = register_module_forward_hook(
        lambda module, args, output: dtypes.add(output.dtype) if isinstance(module, torch.nn.Linear) else None
    )
    yield dtypes
    handle.remove()


@pytest.fixture(autouse=True)
def environment():
    """Hugging Face's Trainer tells Accelerate its precision by an environment variable, which it leaves behind."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def expected_lr(framework, steps):
    """The schedules that the scripts ask for, written down once more."""
    if framework == "accelerate":
        return [3e-2 * min((t + 1) / 10, 1 - t / steps) for t in range(steps)]
    if framework == "transformers":
        return [1e-2 * (t / 10 if t < 10 else (1 + math.cos(math.pi * (t - 10) / (steps - 10))) / 2) for t in range(steps)]
    top = 0.3 * steps - 1  # OneCycleLR rises for 30 % of the steps, from 1/25 of the highest rate, and ends at 1/250,000

    def between(a, b, share):
        return b + (a - b) * (1 + math.cos(math.pi * share)) / 2

    up = [between(3e-2 / 25, 3e-2, t / top) for t in range(steps) if t <= top]
    return up + [between(3e-2, 3e-2 / 25e4, (t - top) / (steps - 1 - top)) for t in range(len(up), steps)]


def assert_same_state(straight, resumed):
    """Two runs' models and optimizers, to the bit."""
    for (name, a), (other_name, b) in zip(straight[0].state_dict().items(), resumed[0].state_dict().items(), strict=True):
        assert name == other_name and torch.equal(a, b), name
    one, other = straight[1].state_dict(), resumed[1].state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for index, state in one["state"].items():
        assert state.keys() == other["state"][index].keys()
        for key, value in state.items():
            assert value.dtype == other["state"][index][key].dtype, (index, key)
            assert torch.equal(value, other["state"][index][key]), (index, key)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_and_one_that_continues_from_its_checkpoint(framework, tmp_path, seen, output_dtypes, capsys):
    pytest.importorskip(framework)
    script = importlib.import_module(f"trainers.{framework}_soap")
    steps = STEPS[framework]
    straight, resumed = script.main(["--folder", str(tmp_path)])
    assert "the same bits" in capsys.readouterr().out.splitlines()
    assert list(seen) == [straight[1], resumed[1]]
    whole, rest = seen.values()

    # all of it ran, in bfloat16, and the loss fell
    assert len(whole.grads) == steps and output_dtypes == {torch.bfloat16}
    losses = straight[2]
    assert len(losses) == steps and sum(losses[-5:]) < 0.6 * sum(losses[:5])

    # the schedule reached every group
    for lrs in zip(*whole.lrs):
        assert lrs == pytest.approx(expected_lr(framework, steps), rel=1e-6, abs=1e-12)

    # clipped to a norm of 1, and not each time
    norms = whole.norms()
    assert max(norms) < 1 + 1e-3
    assert 3 < sum(norm > 1 - 1e-3 for norm in norms) < steps

    # what was made before the checkpoint was not made again, and the rest is the same
    assert len(rest.grads) == steps // 2
    for old, new in zip(whole.grads[-len(rest.grads) :], rest.grads):
        assert all(map(torch.equal, old, new))
    assert rest.lrs == whole.lrs[-len(rest.lrs) :]
    assert_same_state(straight, resumed)

    # and that is the whole state: every basis has been refreshed, some not in the same step as the others
    states = straight[1].state_dict()["state"].values()
    assert {float(state["step"]) for state in states} == {steps - 1}  # the first gradient makes the basis, and no step
    matrices = [state for state in states if state["exp_avg"].dim() == 2]
    assert len(matrices) >= 2
    for state in matrices:
        assert {f"{kind}_{mode}" for kind in ("gram", "basis", "refresh_offset") for mode in (0, 1)} <= state.keys()
    assert len({int(state[key]) for state in matrices for key in ("refresh_offset_0", "refresh_offset_1")}) > 1


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_clipping_scales_the_gradient_and_nothing_else(framework, tmp_path, seen):
    pytest.importorskip(framework)
    script = importlib.import_module(f"trainers.{framework}_soap")
    for clip in (1.0, 1e9, 0.1):
        script.train(10, tmp_path / str(clip), clip=clip)
    clipped, free, tight = (run.grads[0] for run in seen.values())  # of equal parameters: nothing has moved them yet
    norm = float(torch.nn.utils.get_total_norm(free))
    assert norm > 1.01
    for a, b, c in zip(clipped, free, tight, strict=True):
        torch.testing.assert_close(a, b / norm, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(c, b / (10 * norm), rtol=1e-4, atol=1e-7)
