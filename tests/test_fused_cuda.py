"""The fused CUDA path on a GPU (skipped without one), and what of it can be seen without."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparison import SoapRun, random_gradients, random_params, run_lockstep

import soap_opt
from soap_opt import _ext
from soap_opt.cuda.stepper import CudaStepper

gpu = pytest.mark.skipif(not torch.cuda.is_available() or _ext.unavailable("cuda") is not None, reason="no GPU for Triton")

SIZES = [1, 2, 3, 5, 17, 33, 65, 130]
MIX = [(), *((size,) for size in SIZES), *((a, b) for a in SIZES for b in SIZES), (17, 3, 5), (2, 33, 65), (128, 64, 5, 5)]
MIX += [(33, 3, 5, 5), (64, 128, 3, 3), (3, 5, 17, 2), (2, 3, 2, 5, 3), (1, 17, 1, 5, 2), (300, 200), (50, 3000)]
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "precondition_frequency": 3, "refresh": "staggered"}
NEVER = {**OPTIONS, "precondition_frequency": 10**6}


def assert_steady_steps_do_not_wait(run, gradients):
    for grads in gradients[:13]:  # init, compilation, and the tables of one period's refreshes
        run.step(grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grads in gradients[13:]:
            run.step(grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run_python(code: str) -> str:
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_import_neither_needs_nor_waits_for_triton():
    code = "import sys; sys.modules['triton'] = None; import soap_opt; print(soap_opt._ext.unavailable('cuda'))"
    assert "Triton kernels do not load" in run_python(code)
    assert run_python("import sys, soap_opt; print('soap_opt.kernels' in sys.modules)").strip() == "False"


def test_kernels_go_by_one_name_only():
    """Under a second name every kernel would exist, and be compiled, twice. And the folder is no package "kernels", which
    transformers would take for that of the name on PyPI, and import, wherever the clone's root is on sys.path."""
    for name in ("adam", "gram_ema", "project", "reexpress", "table"):
        code = f"try:\n    import kernels.{name}\nexcept ImportError as error:\n    print(error)"
        assert run_python(code).strip() == "attempted relative import beyond top-level package"
    assert run_python("import kernels; print(kernels.__file__)").strip() == "None"


CASES = {
    "plain": {},
    "normalize_grads": {"normalize_grads": True},
    "clipped": {"max_grad_norm": 5.0},
    "pieces": {"scratch_limit": 8 * 20_000},
    "merged": {"merge_dims": True, "max_precond_dim": 100, "data_format": "channels_last"},
    "maximize": {"maximize": True, "precondition_1d": True, "correct_bias": False},
    "no modes": {"max_precond_dim": 0},
    "together": {"refresh": "together"},
    "adaptive": {"refresh": "adaptive", "refresh_tolerance": 0.05},
}


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_lockstep_with_the_specification(dtype, case):
    options = {**OPTIONS, **CASES[case]}
    params = random_params(MIX, dtype=dtype, device="cuda")
    reference, tested = SoapRun(params, foreach=False, **options), SoapRun(params, fused=True, **options)
    gradients = random_gradients(MIX, 10, dtype=dtype, device="cuda", missing=0.1, rank_one=0.2)
    refreshed = run_lockstep(reference, tested, gradients, options)
    assert refreshed > 300 or case in ("merged", "no modes", "together", "adaptive")


GROUPS = [
    {"lr": 0.05, "weight_decay": 0.0, "betas": (0.8, 0.97), "max_grad_norm": 3.0, "precondition_frequency": 2},
    {"normalize_grads": True, "maximize": True, "correct_bias": False, "refresh": "together", "shampoo_beta": 0.8},
    {"eps": 1e-3, "precondition_1d": True, "max_precond_dim": 60},
    {"max_grad_norm": 1.0},  # lr: on the device
]


def in_groups(flags, device="cuda"):
    """MIX dealt out to GROUPS."""
    run = SoapRun(random_params(MIX, device=device), **flags, **OPTIONS)
    size = -(-len(MIX) // len(GROUPS))
    groups = [{"params": run.params[size * i : size * i + size], **options} for i, options in enumerate(GROUPS)]
    groups[3]["lr"] = torch.tensor(0.02, device=device)
    run.optimizer = soap_opt.SOAP(groups, **flags, **OPTIONS)
    return run


@gpu
def test_param_groups_step_together():
    """In lockstep with the specification, whose state is taken over after each step."""
    reference, tested = in_groups({"foreach": False}), in_groups({"fused": True})
    for grads in random_gradients(MIX, 8, device="cuda", missing=0.1):
        for run in (reference, tested):
            run.step(grads)
        tested.optimizer.wait_for_refresh()
        for i, (p, q) in enumerate(zip(reference.params, tested.params)):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
            if reference.optimizer.state.get(p):
                tested.adopt(i, p.detach(), reference.state_of(i))


@gpu
def test_param_groups_do_not_wait_for_the_device():
    run = in_groups({"fused": True})
    gradients = random_gradients(MIX, 24, device="cuda")
    assert_steady_steps_do_not_wait(run, gradients)


@gpu
@pytest.mark.skipif(_ext._cuda_load_error is not None, reason=str(_ext._cuda_load_error))
def test_a_cuda_graph_of_param_groups():
    """Clipped, with a learning rate on the device that moves between replays."""
    flags = {"fused": True, "capturable": True}
    plain, recorded = in_groups(flags), in_groups(flags)
    gradients = random_gradients(MIX, 12, device="cuda")
    for grads in gradients[:3]:
        for run in (plain, recorded):
            run.step(grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded.optimizer.step()
    for number, grads in enumerate(gradients[3:]):
        for run in (plain, recorded):
            run.optimizer.param_groups[3]["lr"].fill_(0.02 / (1 + number))
        plain.step(grads)
        for param, grad in zip(recorded.params, grads):
            param.grad.copy_(grad)
        graph.replay()
    for p, q in zip(plain.params, recorded.params):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@gpu
def test_gradients_of_several_dtypes_and_memory_formats():
    kinds = [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False), (torch.float32, True)]
    shapes = [(6, 5), (5, 5), (4,), (33, 17, 3, 3), (64, 8, 5, 5)]
    params, gradients = [], [[] for _ in range(8)]
    for dtype, channels_last in kinds:
        memory = {"memory_format": torch.channels_last} if channels_last else {}
        made = random_params(shapes, len(params), dtype=dtype, device="cuda")
        params += [p.detach().to(**memory) if p.dim() == 4 and memory else p for p in made]
        for row, new in zip(gradients, random_gradients(shapes, 8, len(params), dtype=dtype, device="cuda")):
            row += new  # contiguous: not always as the parameter lies
    reference, tested = SoapRun(params, foreach=False, **OPTIONS), SoapRun(params, fused=True, **OPTIONS)
    assert run_lockstep(reference, tested, gradients, OPTIONS) > 50


@gpu
def test_high_precision_is_close_and_highest_is_closer():
    """TF32 in the projections alone: the Grams are those of full float32, to the bit."""
    runs = [SoapRun(random_params(MIX, device="cuda"), fused=True, precision=name, **NEVER) for name in ("highest", "high")]
    for grads in random_gradients(MIX, 3, device="cuda"):
        for run in runs:
            run.step(grads)
    for i, (p, q) in enumerate(zip(*(run.params for run in runs))):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-3)
        for key, value in runs[0].state_of(i).items():
            if key.startswith("gram"):
                assert torch.equal(value, runs[1].state_of(i)[key]), (i, key)


@gpu
def test_it_is_taken_where_it_is_asked_for(monkeypatch):
    """And by default where the report says so."""
    calls = []
    original = CudaStepper.step
    monkeypatch.setattr(CudaStepper, "step", lambda *a, **k: calls.append(1) or original(*a, **k))
    for options, expected in (({"fused": True}, True), ({}, _ext.is_default("cuda"))):
        calls.clear()
        run = SoapRun(random_params([(6, 5)], device="cuda"), **options)
        for grads in random_gradients([(6, 5)], 2, device="cuda"):
            run.step(grads)
        assert bool(calls) == expected
        assert run.state_of(0)["step"].device.type == ("cuda" if expected else "cpu") and float(run.state_of(0)["step"]) == 1


@gpu
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_steady_step_does_not_wait_for_the_device(max_grad_norm):
    lr = torch.tensor(0.01, device="cuda")
    run = SoapRun(random_params(MIX, device="cuda"), fused=True, max_grad_norm=max_grad_norm, lr=lr)
    gradients = random_gradients(MIX, 34, device="cuda")
    assert_steady_steps_do_not_wait(run, gradients)


@gpu
def test_an_unusable_gradient_is_skipped_and_counted_on_the_device():
    run = SoapRun(random_params([(6, 5), (7,)], device="cuda"), fused=True, **OPTIONS)
    gradients = random_gradients([(6, 5), (7,)], 6, device="cuda")
    gradients[3][0][0, 0] = torch.nan
    for grads in gradients:
        run.step(grads)
    assert run.optimizer.skipped_steps(per_parameter=True) == [1, 0]
    assert [float(run.state_of(i)["step"]) for i in range(2)] == [4, 5]
    assert all(torch.isfinite(p).all() for p in run.params)


@gpu
def test_grad_scaler_skips_a_step():
    param = torch.nn.Parameter(torch.randn(6, 5, device="cuda"))
    optimizer, scaler = soap_opt.SOAP([param], fused=True, lr=0.1), torch.amp.GradScaler("cuda", init_scale=1024.0)
    for number in range(5):
        optimizer.zero_grad()
        scaler.scale(
            (param.square() * torch.arange(5, device="cuda")).sum() * (float("inf") if number == 3 else 1.0)
        ).backward()
        before = param.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, param) == (number in (0, 3))
    assert float(optimizer.state[param]["step"]) == 3
    assert optimizer.skipped_steps() == 0


@gpu
def test_a_step_is_the_same_to_the_bit_every_time():
    first, second = (SoapRun(random_params(MIX, device="cuda"), fused=True, **NEVER) for _ in range(2))
    for grads in random_gradients(MIX, 4, device="cuda"):
        first.step(grads)
        second.step(grads)
    assert all(torch.equal(a, b) for a, b in zip(first.params, second.params))


@gpu
@pytest.mark.skipif(_ext._cuda_load_error is not None, reason=str(_ext._cuda_load_error))
@pytest.mark.parametrize("refresh", ["together", "staggered", "adaptive"])
def test_refreshes_behind_the_next_forward_pass_give_the_same_bits(refresh):
    """The forward pass allocates and frees all the while, as training does: memory handed out too early would show."""
    options = {**OPTIONS, "refresh": refresh}
    runs = [
        SoapRun(random_params(MIX, device="cuda"), fused=True, overlap_refresh=behind, **options) for behind in (False, True)
    ]
    for grads in random_gradients(MIX, 12, device="cuda"):
        for run in runs:
            run.step(grads)
            for _ in range(4):
                torch.randn(1024, 1024, device="cuda") @ torch.randn(1024, 1024, device="cuda")
    for first, second in zip(*(run.params for run in runs)):
        assert torch.equal(first, second)
    states = [run.optimizer.state_dict()["state"] for run in runs]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])


@gpu
@pytest.mark.skipif(_ext._cuda_load_error is not None, reason=str(_ext._cuda_load_error))
@pytest.mark.parametrize("width", [33, 300])  # 300 is beyond a block's shared memory: conditional nodes
@pytest.mark.parametrize("refresh", ["together", "staggered", "adaptive"])
def test_a_cuda_graph_of_training_steps_refreshes_what_is_due(refresh, width):
    """Forward, backward and step in one graph, as torch's documentation has it; against the same steps one by one."""
    torch.manual_seed(0)
    steps = 54
    data, target = torch.randn(steps, 16, 24, device="cuda"), torch.randn(steps, 16, 5, device="cuda")

    def training():
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(24, width), torch.nn.Tanh(), torch.nn.Linear(width, 5)).cuda()
        options = {**OPTIONS, "refresh": refresh, "fused": True, "capturable": True}
        return net, soap_opt.SOAP(net.parameters(), **options)

    def step(net, optimizer, x, y):
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()

    plain, recorded = training(), training()
    for x, y in zip(data, target):
        step(*plain, x, y)
    x, y = data[0].clone(), target[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(4):  # the first gradient, and three steps: t = 3
            x.copy_(data[number]), y.copy_(target[number])
            step(*recorded, x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*recorded, x, y)
    for number in range(4, steps):
        x.copy_(data[number]), y.copy_(target[number])
        if number % 17 == 16:  # an ordinary step between two replays; the graph's gradients stay its own
            kept = [p.grad for p in recorded[0].parameters()]
            step(*recorded, x, y)
            for param, grad in zip(recorded[0].parameters(), kept):
                param.grad = grad
        else:
            graph.replay()
    for first, second in zip(plain[0].parameters(), recorded[0].parameters()):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert all(int(state["step"]) == steps - 1 for state in recorded[1].state.values())


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step(mode):
    """One graph; with reduce-overhead Inductor's own CUDA graphs go around the step."""
    options = {**OPTIONS, "fused": True, "capturable": True}
    shapes = MIX[:40]
    plain, fast = (SoapRun(random_params(shapes, device="cuda"), **options) for _ in range(2))
    torch._dynamo.reset()
    step = torch.compile(fast.optimizer.step, fullgraph=True, mode=mode)
    grads = random_gradients(shapes, 12, device="cuda")
    for run in (plain, fast):
        for param, grad in zip(run.params, grads[0]):
            param.grad = grad.clone()
    for row in grads:
        for run in (plain, fast):
            for param, grad in zip(run.params, row):
                param.grad.copy_(grad)
        plain.optimizer.step()
        step()
    for first, second in zip(plain.params, fast.params):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
