"""Whole steps of the Triton path in lockstep with the specification, parameters and state."""

import copy

import pytest
import torch
from comparison import Setting, SoapRun, random_gradients, random_params, run_lockstep
from lockstep import OPTIONS, lockstep

from soap_opt import refresh_operator

pytestmark = pytest.mark.usefixtures("fused_on_cpu")

SLOW = pytest.mark.slow

# Ranks 0 to 5; sizes around the tiles' 16, 32, 64 and odd ones; pairs of tiny modes
MIX = [(), (5,), (17, 33), (65, 2), (1, 130), (3, 17, 5), (6, 5, 3, 3), (4, 3, 5, 5), (2, 3, 1, 5, 2), (64, 8, 4)]


def test_a_ragged_mix():
    # 5 steps: each unit of a frequency of 3 is refreshed once at least, and the steps after it use what it made
    assert lockstep(MIX, 5, {}, missing=0.1, rank_one=0.2) >= 20


@pytest.mark.parametrize(
    "options",
    [
        {"normalize_grads": True, "maximize": True},
        pytest.param({"precondition_1d": True, "correct_bias": False, "weight_decay": 0.0}, marks=SLOW),
        pytest.param({"merge_dims": True, "max_precond_dim": 20, "data_format": "channels_last"}, marks=SLOW),
        pytest.param({"max_precond_dim": 5, "betas": (0.0, 0.5), "eps": 1e-3}, marks=SLOW),
        pytest.param({"max_precond_dim": 0, "normalize_grads": True}, marks=SLOW),
        {"refresh": "adaptive", "refresh_tolerance": 0.2, "betas": (0.9, 0.999), "shampoo_beta": 0.7},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_options(options):
    lockstep([(5,), (6, 4, 3, 3), (5, 3, 4), (1, 7), (21, 4, 5)], 3, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=SLOW)])
def test_low_precision(dtype):
    lockstep([(5,), (6, 4, 3, 3), (17, 5), (5, 5)], 4, {"lr": 0.05}, dtype=dtype)


@SLOW
def test_dtypes_mixed_in_one_group():
    params, gradients = [], [[] for _ in range(4)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        shapes = [(6, 5), (5, 5), (4,), (3, 4, 3)]
        params += random_params(shapes, len(params), dtype=dtype)
        for row, new in zip(gradients, random_gradients(shapes, 4, len(params), dtype=dtype)):
            row += new
    reference, tested = SoapRun(params, foreach=False, **OPTIONS), SoapRun(params, fused=True, **OPTIONS)
    run_lockstep(reference, tested, gradients, OPTIONS)


def strided(x, order):
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])


@SLOW
def test_memory_formats():
    """channels_last, transposed, and gradients that lie otherwise than their parameters."""
    cases = [((6, 4, 3, 3), (0, 2, 3, 1), (0, 2, 3, 1)), ((6, 4, 3, 3), (0, 1, 2, 3), (0, 2, 3, 1)), ((5, 7), (1, 0), (0, 1))]
    params, gradients = [], [[] for _ in range(4)]
    for i, (shape, order, grad_order) in enumerate(cases):
        params.append(strided(random_params([shape], i)[0], order))
        for row, (grad,) in zip(gradients, random_gradients([shape], 4, i)):
            row.append(strided(grad, grad_order))
    for merging in ({}, {"merge_dims": True, "max_precond_dim": 12, "data_format": "channels_last"}):
        options = {**OPTIONS, **merging}
        run_lockstep(SoapRun(params, foreach=False, **options), SoapRun(params, fused=True, **options), gradients, options)


@pytest.mark.parametrize("value", [float("nan"), *(pytest.param(value, marks=SLOW) for value in (float("inf"), 1e20))])
def test_an_unusable_gradient_changes_nothing_of_its_parameter(value):
    shapes = [(6, 5), (4, 3, 3, 3), (4,), (5, 5)]
    for broken in (1, 2):  # with products, without
        reference, tested = (
            SoapRun(random_params(shapes), **flag, **OPTIONS) for flag in ({"foreach": False}, {"fused": True})
        )
        gradients = random_gradients(shapes, 3)
        gradients[2][broken].view(-1)[1] = value
        with pytest.warns(UserWarning, match="not finite"):  # the specification's
            run_lockstep(reference, tested, gradients, OPTIONS)
        assert tested.optimizer.skipped_steps(per_parameter=True) == [int(i == broken) for i in range(len(shapes))]
        assert float(tested.state_of(broken)["step"]) == 1


@SLOW
def test_grad_scale_and_found_inf():
    """A power of two scales without rounding: the result is the same to the bit. The kernels look at found_inf."""
    shapes = [(6, 5), (4, 3, 3, 3), (4,)]
    plain, scaled = (SoapRun(random_params(shapes), fused=True, **OPTIONS) for _ in range(2))
    for number, grads in enumerate(random_gradients(shapes, 4)):
        plain.step(grads)
        scaled.optimizer.grad_scale = torch.tensor([1024.0])
        if number > 0:
            scaled.optimizer.found_inf = torch.zeros(1)
        scaled.step([grad * 1024 for grad in grads])
        if number > 0:
            before = [scaled.params[0].clone(), *(value.clone() for value in scaled.state_of(0).values())]
            scaled.optimizer.found_inf = torch.ones(1)
            scaled.step(grads)
            scaled.step([torch.full_like(grad, torch.nan) for grad in grads])
            for old, new in zip(before, [scaled.params[0], *scaled.state_of(0).values()]):
                assert torch.equal(old, new)
    assert scaled.optimizer.skipped_steps() == 0
    for i in range(len(shapes)):
        assert torch.equal(plain.params[i], scaled.params[i])
        for key, value in plain.state_of(i).items():
            assert torch.equal(value, scaled.state_of(i)[key]), key


def test_grams_stay_symmetric_to_the_bit():
    shapes = [(17, 33), (6, 5, 3, 3), (70, 3)]
    run = SoapRun(random_params(shapes), fused=True, **OPTIONS)
    for grads in random_gradients(shapes, 3):
        run.step(grads)
    for i in range(len(shapes)):
        for key, gram in run.state_of(i).items():
            assert not key.startswith("gram") or torch.equal(gram, gram.T)


def test_unaligned_state_takes_kernels_that_do_not_count_on_alignment():
    """A state_dict's tensors are taken over as they are: views of a flat buffer, say."""
    runs = [SoapRun(random_params([(64, 64)]), **kind, **OPTIONS) for kind in ({"foreach": False}, {"fused": True})]
    first, *rest = random_gradients([(64, 64)], 3)
    for run in runs:
        run.step(first)
    state = runs[1].state_of(0)
    for name in ("basis_0", "gram_1"):
        flat = torch.empty(64 * 64 + 1)
        flat[1:] = state[name].reshape(-1)
        state[name] = flat[1:].view(64, 64)
    run_lockstep(*runs, rest, OPTIONS)
    for plan in runs[1].optimizer._cuda.plans(runs[1].state_of(0)["exp_avg"]):
        assert not plan.aligned.any()
        assert not {1, 3} & set(plan.tables.tiles[:, 1].tolist())


@pytest.mark.parametrize("capturable", [pytest.param(False, marks=SLOW), True])
@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.device("meta"),
        lambda: Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
        lambda: Setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    ],
    ids=["default device", "default dtype", "deterministic"],
)
def test_what_stands_around_a_step_does_not_change_it(around, capturable):
    runs = [SoapRun(random_params([(6, 5), (4,)]), fused=True, capturable=capturable, **OPTIONS) for _ in range(2)]
    for grads in random_gradients([(6, 5), (4,)], 5):
        runs[0].step(grads)
        with around():
            runs[1].step(grads)
    for p, q in zip(*(run.params for run in runs)):
        assert torch.equal(p, q)


def test_capturable_steps_without_the_compiled_refresh(monkeypatch):
    """ROCm, or no nvcc at installation: nothing can be captured there, and nothing needs to be made ready."""
    monkeypatch.setattr(refresh_operator, "why_missing", lambda device_type: "not built")
    monkeypatch.setattr(refresh_operator, "refresh_bases_", lambda *a, **k: pytest.fail("called"))
    assert lockstep([(6, 5), (4, 3, 3)], 4, {"capturable": True}) > 3


@SLOW
def test_a_step_is_the_same_to_the_bit_every_time():
    shapes = [(17, 33), (70, 65), (6, 5, 3, 3), (5,)]
    first, second = (SoapRun(random_params(shapes), fused=True, **OPTIONS) for _ in range(2))
    for grads in random_gradients(shapes, 3):
        first.step(grads)
        second.step(grads)
    for a, b in zip(first.params, second.params):
        assert torch.equal(a, b)


@pytest.mark.parametrize("max_norm", [1.0, pytest.param(20.0, marks=SLOW)])
def test_max_grad_norm(launches, max_norm):
    """Against the specification, which folds clip_grad_norm_'s factor into grad_scale (tests/test_clipping.py)."""
    shapes = [(6, 5), (4, 3, 3, 3), (4,), (7, 3)]
    options = {**OPTIONS, "max_grad_norm": max_norm}
    reference, tested = (
        SoapRun(random_params(shapes), foreach=False, **options),
        SoapRun(random_params(shapes), fused=True, **options),
    )
    for grads in random_gradients(shapes, 5, missing=0.1):
        total = torch.stack([grad.norm() for grad in grads if grad is not None]).norm()
        small = [None if grad is None else grad * (max_norm / (total + 1e-6)).clamp(max=1.0) for grad in grads]

        class Raw:  # judged by the tolerances of the clipped gradient, run on the raw one
            def __init__(self, run):
                self.run, self.params, self.state_of, self.adopt = run, run.params, run.state_of, run.adopt

            def step(self, _, grads=grads):
                launches.clear()
                self.run.step(grads)

        run_lockstep(Raw(reference), Raw(tested), [small], OPTIONS)
    assert len([name for name in launches if name != "reexpress_kernel"]) == 7  # none of its own


def test_a_learning_rate_that_is_a_tensor():
    shapes = [(6, 5), (4,)]
    plain, tensor = (SoapRun(random_params(shapes), fused=True, **{**OPTIONS, "lr": lr}) for lr in (0.25, torch.tensor(0.25)))
    for grads in random_gradients(shapes, 3):
        plain.step(grads)
        tensor.step(grads)
    assert all(torch.equal(p, q) for p, q in zip(plain.params, tensor.params))


def test_a_learning_rate_that_is_no_tensor_any_more():
    """Whatever float comes after it, 0 too."""
    run = SoapRun(random_params([(6, 5)]), fused=True, **{**OPTIONS, "lr": torch.tensor(0.25), "weight_decay": 0.0})
    gradients = random_gradients([(6, 5)], 5)
    for grads in gradients[:3]:
        run.step(grads)
    for lr in (0.0, torch.tensor(0.0)):
        run.optimizer.param_groups[0]["lr"] = lr
        before = run.params[0].detach().clone()
        run.step(gradients[3])
        assert torch.equal(before, run.params[0])


def test_counts_of_skipped_gradients_survive_a_copy():
    run = SoapRun(random_params([(6, 5)]), fused=True, **OPTIONS)
    for grads in random_gradients([(6, 5)], 2):
        run.step(grads)
    run.step([torch.full((6, 5), torch.nan)])
    copied = copy.deepcopy(run.optimizer)
    assert run.optimizer.skipped_steps() == copied.skipped_steps() == 1
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))  # the device counts for a state
    assert run.optimizer.skipped_steps() == 1
    run.step([torch.full((6, 5), torch.nan)])
    run.optimizer.load_state_dict(run.optimizer.state_dict())  # the same tensors
    assert run.optimizer.skipped_steps() == 2


def test_versions_rise():
    """The kernels write below autograd."""
    run = SoapRun(random_params([(6, 5), (3,)]), fused=True, **OPTIONS)
    gradients = random_gradients([(6, 5), (3,)], 4)
    for grads in gradients[:3]:
        run.step(grads)
    loss = sum((p * p).sum() for p in run.params)
    known = {key: value._version for key, value in run.state_of(0).items()}
    run.step(gradients[3])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for key in ("exp_avg", "exp_avg_sq", "step", "gram_0", "gram_1"):
        assert run.state_of(0)[key]._version > known[key], key
