"""soap_opt._C.step_, the short way to step_: the same results and errors, and the dispatcher wherever something needs it."""

import sys
from contextlib import nullcontext

import pytest
import torch
from comparison import NO_ENGINE, RAGGED
from operator_arguments import assert_same_tensors, call_directly, call_step, snapshot, step_arguments, tensors_in
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import soap_opt

pytestmark = pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))


@pytest.mark.parametrize(
    ("param_dtype", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_results_are_those_of_the_operator(param_dtype, dtype):
    arguments, others = (step_arguments(RAGGED, param_dtype, dtype) for _ in range(2))
    for _ in range(6):
        assert torch.equal(call_directly(arguments), call_step(others))
    assert_same_tensors(arguments, snapshot(others))


def test_empty_lists():
    assert call_directly(step_arguments([])).shape == (0,)


def test_tuples_are_lists():
    arguments, others = step_arguments(), step_arguments()
    call_directly({name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()})
    call_step(others)
    assert_same_tensors(arguments, snapshot(others))


def test_grad_scale_divides_the_gradients():
    arguments, others = step_arguments(), step_arguments()
    others["grads"] = [grad / 4 for grad in others["grads"]]
    call_directly({**arguments, "grad_scale": torch.tensor([4.0])})
    call_directly(others)
    for x, y in zip(arguments["params"], others["params"]):
        assert torch.equal(x, y)


def test_autograd_sees_the_written_tensors():
    arguments = step_arguments()
    x = arguments["params"][0].requires_grad_()
    loss = (x * x).sum()
    with torch.no_grad():
        call_directly(arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_negative_views_are_stepped_as_the_operator_does():
    arguments, others = step_arguments(), step_arguments()
    for each in (arguments, others):
        each["exp_avgs"] = [torch._neg_view(x) for x in each["exp_avgs"]]
    assert arguments["exp_avgs"][0].is_neg()
    assert torch.equal(call_directly(arguments), call_step(others))
    assert_same_tensors(arguments, snapshot(others))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grads", 3, "grads must be a list, not int"),
        ("options", ["a"], "must be real number, not str"),
    ],
)
def test_a_type_that_does_not_fit_is_named_and_nothing_changes(name, value, message):
    arguments = step_arguments()
    before = snapshot(arguments)
    with pytest.raises(TypeError, match=message):
        call_directly({**arguments, name: value})
    assert_same_tensors(arguments, before)


def test_another_number_of_arguments():
    with pytest.raises(TypeError, match="takes 14 arguments, not 2"):
        soap_opt._C.step_([], [])


def test_no_reference_is_left():
    arguments = step_arguments()
    counts = {name: sys.getrefcount(x) for name, x in tensors_in(arguments)}
    uses = {name: x._use_count() for name, x in tensors_in(arguments)}
    call_directly(arguments)
    with pytest.raises(RuntimeError, match="scratch must be contiguous"):
        call_directly({**arguments, "scratch": arguments["scratch"][1:]})
    assert call_directly({**arguments, "state_steps": [*arguments["state_steps"], None]}) is None
    assert {name: sys.getrefcount(x) for name, x in tensors_in(arguments)} == counts
    assert {name: x._use_count() for name, x in tensors_in(arguments)} == uses


# ---- what needs the dispatcher ------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A tensor subclass that remembers the operators it was given to."""

    names = []

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.names.append(function.name())
        return super().__torch_dispatch__(function, types, args, kwargs)


class Functions(TorchFunctionMode):
    """The functions that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Named(torch.Tensor):
    """A tensor subclass without a dispatch key: it overrides functions alone."""


@pytest.mark.parametrize("mode", [Calls, Functions])
def test_a_mode_is_left_to_the_dispatcher(mode):
    arguments = step_arguments()
    before = snapshot(arguments)
    with mode():
        assert call_directly(arguments) is None
    assert_same_tensors(arguments, before)


def trace(function):
    return lambda x: torch.jit.trace(function, x, check_trace=False)


@pytest.mark.parametrize(
    "transform",
    [torch.vmap, torch.func.functionalize, lambda f: torch.func.grad(lambda x: f(x).sum()), make_fx, trace],
    ids=["vmap", "functionalize", "grad", "make_fx", "jit.trace"],
)
def test_a_transform_is_left_to_the_dispatcher(transform):
    arguments, results = step_arguments(), []
    before = snapshot(arguments)

    def function(x):
        results.append(call_directly(arguments))
        return x * 2

    transform(function)(torch.ones(3))
    assert results and set(results) == {None}
    assert_same_tensors(arguments, before)


LISTS = ["params", "grads", "exp_avgs", "exp_avg_sqs", "grams", "bases", "refresh_offsets", "state_steps"]


@pytest.mark.parametrize("name", [*LISTS, "layouts", "scratch", "grad_scale"])
@pytest.mark.parametrize(
    "change",
    [lambda x: x.as_subclass(Wrapped), lambda x: x.as_subclass(Named), lambda x: 2.0],
    ids=["wrapped", "named", "no tensor"],
)
def test_what_is_not_a_plain_tensor_is_left_to_the_dispatcher(name, change):
    arguments = {**step_arguments(), "grad_scale": torch.tensor([4.0])}
    before = snapshot(arguments)
    if name in LISTS:
        changed = {**arguments, name: [*arguments[name][:-1], change(arguments[name][-1])]}
    else:
        changed = {**arguments, name: change(arguments[name])}
    assert call_directly(changed) is None
    assert_same_tensors(arguments, before)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("change", [lambda x: x.to("meta"), torch.Tensor.to_sparse], ids=["meta", "sparse"])
def test_a_tensor_of_another_kind_is_left_to_the_dispatcher(name, change):
    arguments = step_arguments()
    before = snapshot(arguments)
    assert call_directly({**arguments, name: [*arguments[name][:-1], change(arguments[name][-1])]}) is None
    assert_same_tensors(arguments, before)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq", "gram_0", "basis_1", "refresh_offset_0"])
def test_state_that_is_gone_is_explained(key):
    """The optimizer's error, with the parameter and the remedy, as through the dispatcher."""
    param = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = soap_opt.SOAP([param], foreach=None)
    for _ in range(2):
        param.grad = torch.randn(4, 3)
        optimizer.step()
    optimizer.state[param][key] = None
    with pytest.raises(RuntimeError, match=rf"cannot step parameter 0 of shape \(4, 3\).*{key}"):
        optimizer.step()


def stepped(context):
    """Parameters after three steps, the last one in this context."""
    params = [torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(2, 5))]
    optimizer = soap_opt.SOAP(params, lr=0.01, foreach=None, precondition_frequency=2)
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, 0.1 * (i + 1)) + torch.eye(*param.shape) * (step + 1)
        with context if step == 2 and context else nullcontext():
            optimizer.step()
    return params


@pytest.mark.parametrize(("mode", "name"), [(Calls, "soap_opt::step_"), (Functions, "soap_opt.step_")])
def test_a_mode_sees_the_optimizers_step(mode, name):
    calls = mode()
    seen, plain = stepped(calls), stepped(None)
    assert calls.names.count(name) == 1
    for x, y in zip(seen, plain):
        assert torch.equal(x, y)


def test_parameters_need_no_dispatcher():
    arguments = step_arguments()
    arguments["params"] = [torch.nn.Parameter(x) for x in arguments["params"]]
    arguments["params"][-1] = torch.nn.Buffer(arguments["params"][-1].detach())
    with torch.no_grad():
        assert call_directly(arguments) is not None


def test_autocast_needs_no_dispatcher():
    arguments, others = step_arguments(), step_arguments()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call_directly(arguments), call_step(others))
    assert_same_tensors(arguments, snapshot(others))


def test_the_profiler_has_a_row_for_the_step():
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call_directly(step_arguments())
    assert "soap_opt::step_" in {event.key for event in found.key_averages()}
