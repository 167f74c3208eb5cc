"""``torch.compile`` around the step: no graph break, no compilation without end, the same result."""

import copy
import gc

import pytest
import torch
from comparison import SoapRun, random_gradients, random_params
from small_model import compiled_in_lockstep
from torch._dynamo.testing import CompileCounterWithBackend

import soap_opt

SHAPES = [(4, 3), (5,), (6, 2, 3, 3), ()]
OPTIONS = {"lr": 0.01, "precondition_frequency": 2}
IMPLEMENTATIONS = [
    {"foreach": False},
    {"foreach": True},
    pytest.param({"fused": True}, marks=pytest.mark.skipif(soap_opt._ext.unavailable("cpu") is not None, reason="not built")),
]
OPERATOR = torch.ops.soap_opt.optimizer_step_


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(optimizer, backend="aot_eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(optimizer.step, backend=counter, fullgraph=True), counter


def assert_same(first, second):
    for i, (p, q) in enumerate(zip(first.params, second.params)):
        assert torch.equal(p, q), i
        for key, value in first.state_of(i).items():
            assert torch.equal(value, second.state_of(i)[key]), (i, key)


@pytest.mark.parametrize("flags", IMPLEMENTATIONS)
def test_one_graph_from_the_first_gradient_on(flags):
    """First gradients, steps, refreshes, a gradient that is missing, a schedule."""
    plain, fast = (SoapRun(random_params(SHAPES), **flags, **OPTIONS) for _ in range(2))
    step, counter = compiled(fast.optimizer)
    for number, grads in enumerate(random_gradients(SHAPES, 6)):
        for run in (plain, fast):
            run.optimizer.param_groups[0]["lr"] = 0.01 / (1 + number)
            for param, grad in zip(run.params, grads):
                param.grad = grad.clone()
        plain.optimizer.step()
        step()
        assert_same(plain, fast)
    assert counter.frame_count == 1
    for run in (plain, fast):
        run.params[1].grad = None
    plain.optimizer.step()
    step()
    assert_same(plain, fast)
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_whole_training_step_is_one_graph(backend):
    """The gradients are made in the graph, and are not yet p.grad when the step runs."""

    def step(net, optimizer, x):
        loss = net(x).square().mean()
        for param, grad in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters()))):
            param.grad = grad
        optimizer.step()
        return loss.detach()

    counter = CompileCounterWithBackend(backend)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled_in_lockstep(torch.compile(step, backend=counter, fullgraph=True), **OPTIONS)
    assert counter.frame_count <= 2  # p.grad is None before the first


def test_groups_and_parameters_that_come_later():
    plain, fast = (SoapRun(random_params(SHAPES[:2]), **OPTIONS) for _ in range(2))
    step, counter = compiled(fast.optimizer)
    for number, grads in enumerate(random_gradients(SHAPES, 8)):
        if number == 3:
            for run in (plain, fast):
                run.params += random_params(SHAPES[2:], 7)
                run.optimizer.add_param_group({"params": run.params[2:], "lr": 0.3, "refresh": "together"})
        for run in (plain, fast):
            for param, grad in zip(run.params, grads):
                param.grad = grad.clone()
        plain.optimizer.step()
        step()
        assert_same(plain, fast)
    assert counter.frame_count == 2
    fast.optimizer.param_groups[0]["params"].pop(0)
    before = [p.detach().clone() for p in fast.params]
    with pytest.raises(RuntimeError, match="param_groups were changed"):
        step()
    assert all(torch.equal(p, old) for p, old in zip(fast.params, before))
    step()
    moved = [not torch.equal(p, old) for p, old in zip(fast.params, before)]
    assert moved == [False, True, True, True]


def test_compiling_changes_no_option(monkeypatch):
    """Dynamo sets capturable of optimizers on CUDA that have no state yet; here it takes all parameters for such."""
    import inspect
    import textwrap

    from torch._dynamo.variables import optimizer as dynamo

    source = textwrap.dedent(inspect.getsource(getattr(dynamo.OptimizerVariable, "_set_capturable", dynamo.OptimizerVariable)))
    if "p.is_cuda" not in source or not source.startswith("def"):
        pytest.skip("this Dynamo does it otherwise, or not at all")
    namespace = dict(vars(dynamo))
    exec(source.replace("p.is_cuda", "True"), namespace)
    monkeypatch.setattr(dynamo.OptimizerVariable, "_set_capturable", namespace["_set_capturable"])
    adam = torch.optim.Adam(params := random_params([(4, 3)]))
    run = SoapRun(params, **OPTIONS)
    for optimizer in (adam, run.optimizer):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 3)
        torch.compile(optimizer.step, backend="eager")()
    assert adam.param_groups[0]["capturable"] is True  # it would show
    assert run.optimizer.param_groups[0]["capturable"] is False


def test_with_a_scheduler_attached():
    """Dynamo does not trace what schedulers wrap around the step: a graph break then, for every torch optimizer."""
    plain, fast = (SoapRun(random_params([(4, 3)]), **OPTIONS) for _ in range(2))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5) for run in (plain, fast)]
    step = torch.compile(fast.optimizer.step, backend="aot_eager")
    for grads in random_gradients([(4, 3)], 5):
        for run in (plain, fast):
            run.params[0].grad = grads[0].clone()
        plain.optimizer.step()
        step()
        for scheduler in schedulers:
            scheduler.step()
        assert_same(plain, fast)


def test_a_closure_is_part_of_the_graph():
    plain, fast = (SoapRun(random_params([(4, 3)]), **OPTIONS) for _ in range(2))

    def closure_of(run):
        def closure():
            run.params[0].grad = 2 * run.params[0].detach()
            return run.params[0].detach().square().sum()

        return closure

    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda: fast.optimizer.step(closure_of(fast)), backend=counter, fullgraph=True)
    for _ in range(4):
        torch.testing.assert_close(step(), plain.optimizer.step(closure_of(plain)))
    torch.testing.assert_close(plain.params[0], fast.params[0])
    assert counter.frame_count >= 1


@pytest.mark.slow
def test_what_a_grad_scaler_leaves_reaches_the_operator():
    plain, fast = (SoapRun(random_params(SHAPES), **OPTIONS) for _ in range(2))
    step, _ = compiled(fast.optimizer)
    for number, grads in enumerate(random_gradients(SHAPES, 5)):
        for run in (plain, fast):
            for param, grad in zip(run.params, grads):
                param.grad = grad * 1024
            run.optimizer.grad_scale = torch.tensor([1024.0])
            run.optimizer.found_inf = torch.tensor([float(number == 3)])
        plain.optimizer.step()
        step()
        assert_same(plain, fast)
    assert float(fast.state_of(0)["step"]) == 3


def test_the_operator_by_torchs_own_checks():
    run = SoapRun(random_params(SHAPES), **OPTIONS)
    for grads in random_gradients(SHAPES, 2):
        run.step(grads)
    arguments = ([p.detach() for p in run.params], [p.grad for p in run.params], [0, 1, 2, 3], run.optimizer._number)
    torch.library.opcheck(OPERATOR, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_the_operator_updates_what_it_is_given():
    """A graph may hand it copies of the parameters: they move, the parameters do not, and the state is the parameters'."""
    plain, given = (SoapRun(random_params(SHAPES), **OPTIONS) for _ in range(2))
    for grads in random_gradients(SHAPES, 3):
        plain.step(grads)
        copies, before = [p.detach().clone() for p in given.params], [p.detach().clone() for p in given.params]
        OPERATOR(copies, grads, [0, 1, 2, 3], given.optimizer._number)
        assert all(torch.equal(p, old) for p, old in zip(given.params, before))
        with torch.no_grad():
            for param, new in zip(given.params, copies):
                param.copy_(new)
    assert_same(plain, given)


def test_copies_are_other_optimizers_and_an_optimizer_may_go():
    run = SoapRun(random_params([(4, 3)]), **OPTIONS)
    number = run.optimizer._number
    copied = copy.deepcopy(run.optimizer)
    assert copied._number != number
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert run.optimizer._number == number
    params, grads = [p.detach() for p in run.params], [torch.ones(4, 3)]
    del run, copied
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        OPERATOR(params, grads, [0], number)


def test_bad_options_are_named_when_the_graph_runs():
    run = SoapRun(random_params([(4, 3)]), **OPTIONS)
    run.params[0].grad = torch.ones(4, 3)
    step, _ = compiled(run.optimizer)
    run.optimizer.param_groups[0]["eps"] = -1.0
    with pytest.raises(ValueError, match="Invalid epsilon value: -1.0"):
        step()
    assert not run.optimizer.state
