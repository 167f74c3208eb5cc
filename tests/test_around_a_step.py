"""What may stand around a step: torch's global settings, inference mode, torch.compile, CUDA graphs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import Setting, SoapRun, every_implementation, random_gradients, random_params
from small_model import compiled_in_lockstep


def result_of(flags, around=None, **options):
    """Parameters and state after five steps, each made inside ``around()``."""
    shapes = [(12, 9), (6, 4, 3, 3), (4,)]
    run = SoapRun(random_params(shapes), precondition_frequency=2, **flags, **options)
    for grads in random_gradients(shapes, 5):
        if around is None:
            run.step(grads)
        else:
            with around():
                run.step(grads)
    return run


def assert_runs_equal(a, b):
    for i in range(len(a.params)):
        assert torch.equal(a.params[i], b.params[i])
        for key, value in a.state_of(i).items():
            assert torch.equal(value, b.state_of(i)[key]), key
            assert value.dtype == b.state_of(i)[key].dtype, key


AROUND = {
    "default dtype float64": lambda: Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default dtype float16": lambda: Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "matmul precision medium": lambda: Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "matmul precision high": lambda: Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "deterministic algorithms": lambda: Setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "default device set": lambda: Setting(torch.get_default_device, torch.set_default_device, torch.device("cpu")),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@every_implementation
@pytest.mark.parametrize("name", AROUND)
def test_what_stands_around_a_step_does_not_change_it(name, flags):
    assert_runs_equal(result_of(flags, AROUND[name]), result_of(flags))


def test_constructed_under_another_default_dtype_and_device():
    with Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64), torch.device("meta"):
        run = SoapRun([p.to("cpu", torch.float32) for p in CPU_PARAMS])
    plain = SoapRun(CPU_PARAMS)
    for grads in random_gradients([(4, 3)], 3):
        run.step(grads)
        plain.step(grads)
    assert_runs_equal(run, plain)


CPU_PARAMS = random_params([(4, 3)])


# In a process of its own: torch's switch from the old settings to the new ones cannot be taken back.
@pytest.mark.slow
@pytest.mark.parametrize("order", ["4,3,0,4,5,1,2,4,0,2", "0,1,2,3,4,5"])
def test_the_new_precision_api_mixed_with_the_old_one(order):
    """torch raises when one is read after the other was written; a step must not, and must leave them as they were."""
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from comparison import SoapRun, random_gradients, random_params
plain = SoapRun(random_params([(6, 5)]), precondition_frequency=2)
for grads in random_gradients([(6, 5)], 5):
    plain.step(grads)
settings = [
    lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
]
def read(f):
    try:
        return f()
    except RuntimeError as error:
        return "raises"
def all_of():
    return [read(f) for f in (
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
        lambda: torch.backends.fp32_precision,
        lambda: torch.get_float32_matmul_precision(),
        lambda: torch.backends.cuda.matmul.allow_tf32,
    )]
for number in map(int, sys.argv[2].split(",")):
    try:
        settings[number]()
    except RuntimeError:
        pass
    before = all_of()
    run = SoapRun(random_params([(6, 5)]), precondition_frequency=2)
    for grads in random_gradients([(6, 5)], 5):
        run.step(grads)
    assert all_of() == before, (number, before, all_of())
    assert torch.equal(run.params[0], plain.params[0]), number
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), order], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_inference_mode_around_every_step():
    """State made in inference mode consists of inference tensors, as with torch.optim.Adam: it may change there only."""
    run, plain = SoapRun(random_params([(4, 3)])), SoapRun(random_params([(4, 3)]))
    for grads in random_gradients([(4, 3)], 5):
        run.params[0].grad = grads[0].clone()
        with torch.inference_mode():
            run.optimizer.step()
        plain.step(grads)
    assert torch.equal(run.params[0], plain.params[0])


@pytest.mark.slow
@every_implementation
def test_compiled_training_step(flags):
    """torch.compile of forward, backward and step as scripts have them: no graph break at the optimizer, the same result."""
    from torch._dynamo.utils import counters

    def training_step(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    torch._dynamo.reset()
    counters.clear()
    compiled_in_lockstep(torch.compile(training_step, backend="aot_eager"), **flags, precondition_frequency=2)
    # zero_grad and backward break graphs too, in every training step
    ours = {k: n for k, n in counters["graph_break"].items() if "zero_grad" not in k and "backward" not in k}
    assert not ours
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_capturing_a_step_is_refused_with_a_reason():
    run = SoapRun(random_params([(4, 3)], device="cuda"), capturable=True)
    for grads in random_gradients([(4, 3)], 2, device="cuda"):
        run.step(grads)
    assert run.state_of(0)["step"].device.type == "cuda"
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(graph):
        run.optimizer.step()


def test_capturable_keeps_step_on_the_parameter_s_device(device):
    run = SoapRun(random_params([(4, 3)], device=device), capturable=True)
    plain = SoapRun(random_params([(4, 3)], device=device))
    for grads in random_gradients([(4, 3)], 4, device=device):
        run.step(grads)
        plain.step(grads)
    assert run.state_of(0)["step"].device.type == torch.device(device).type
    assert torch.equal(run.params[0], plain.params[0])
