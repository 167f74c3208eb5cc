"""The chooser, what a path multiplies and in which batches, and the parts that all paths call."""

import contextlib
import re

import pytest
import torch
from comparison import SoapRun, every_implementation, random_gradients, random_params
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import soap_opt
from bench.fake_driver import triton_path_on_cpu
from soap_opt import batch as batch_module
from soap_opt import functional
from soap_opt.functional import Path, path_of
from soap_opt.gradients import is_usable, prepare_gradient
from soap_opt.layout import layout_of
from soap_opt.options import DEFAULTS, SHAPING, Options
from soap_opt.single_tensor import step_size
from soap_opt.work import batch_of, with_grad


def steady_run(foreach, shapes, **options):
    run = SoapRun(random_params(shapes), foreach=foreach, **options)
    for grads in random_gradients(shapes, 3):
        run.step(grads)
    return run


@pytest.mark.parametrize("foreach", [False, True])
def test_matrix_flops_of_a_steady_step(foreach):
    """One pass into the basis, one back, one Gram: 3 U, U = 2 numel sum(d_i), and nothing for m.

    (2.5 U counts the Gram as a triangle, for which PyTorch has no product.) The 5 x 5 of the convolution is one 25-wide
    product instead of two 5-wide ones: 2 numel (d_1 + d_2 + 25), plus its Kronecker product, which is not a matrix product.
    """
    shapes = [(32, 24), (24, 16), (24, 16), (12, 16, 5, 5)]
    run = steady_run(foreach, shapes, precondition_frequency=10**6, refresh="together")
    steady = 2 * 32 * 24 * (32 + 24) + 2 * 2 * 24 * 16 * (24 + 16) + 2 * 12 * 16 * 25 * (12 + 16 + 25)
    with FlopCounterMode(display=False) as counter:
        run.step(random_gradients(shapes, 1)[0])
    assert 2.5 * steady <= counter.get_total_flops() <= 3 * steady


@pytest.mark.parametrize("foreach", [False, True])
def test_matrix_flops_of_a_refresh(foreach):
    """G Q once and Q^T Q' once (2 d^3 each), one pass for m, and two products with a vector that show Q' orthogonal (2 d^2
    each); QR and the eigenvalues are no matrix products here."""
    shapes = [(32, 24), (24, 16), (24, 16)]
    run = steady_run(foreach, shapes, precondition_frequency=4, refresh="together")
    grads = random_gradients(shapes, 1)[0]
    counts = []
    for _ in range(2):  # the steps to t = 3 (steady) and t = 4 (refresh)
        with FlopCounterMode(display=False) as counter:
            run.step(grads)
        counts.append(counter.get_total_flops())
    extra = sum(4 * d**3 + 4 * d**2 + 2 * m * n * d for m, n in shapes for d in (m, n))
    assert 0 < counts[1] - counts[0] <= extra


def test_equal_shapes_are_batched_and_large_ones_are_not():
    """The multi-tensor path multiplies eight equal 8 x 8 parameters as one batch."""
    calls = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
                calls.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    counts = {}
    for shapes in ([(8, 8)] * 8, [(80, 70)] * 8):
        for foreach in (False, True):
            run = steady_run(foreach, shapes, precondition_frequency=10**6)
            calls.clear()
            with Spy():
                run.step(random_gradients(shapes, 1)[0])
            counts[shapes[0], foreach] = len(calls)
    assert counts[(8, 8), True] * 8 == counts[(8, 8), False]
    assert counts[(80, 70), True] == counts[(80, 70), False]


def test_the_multi_tensor_path_uses_foreach_ops_for_everything_elementwise():
    """The number of operators per step hardly grows with the number of equal parameters."""
    counts = []
    for number in (4, 32):
        shapes = [(6, 6)] * number
        run = steady_run(True, shapes, precondition_frequency=10**6)
        names = []

        class Spy(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(func.name())  # noqa: B023
                return func(*args, **(kwargs or {}))

        for param, grad in zip(run.params, random_gradients(shapes, 1)[0]):
            param.grad = grad
        with Spy():
            run.optimizer.step()
        elementwise = ("aten::lerp_", "aten::addcmul_", "aten::sqrt", "aten::sqrt_", "aten::mm", "aten::bmm", "aten::div")
        counts.append(sum(name.split(".")[0] in elementwise for name in names))
        assert any(name.startswith("aten::_foreach_lerp_") for name in names)
    assert counts[0] == counts[1]


@contextlib.contextmanager
def recorded(monkeypatch):
    ran = []
    with monkeypatch.context() as patch:
        for name in ("_single_tensor_soap", "_multi_tensor_soap", "cpu_soap"):
            original = getattr(functional, name)
            patch.setattr(functional, name, lambda *a, _f=original, _n=name, **k: ran.append(_n) or _f(*a, **k))
        yield ran


def test_path_of():
    """Every combination of what it is asked; "meta" stands for a device without kernels of this package's own."""
    own = soap_opt._ext.unavailable("cpu") is None
    float32, float64, meta = torch.ones(2), torch.ones(2, dtype=torch.float64), torch.ones(2, device="meta")
    assert path_of(float32, Options()) is path_of(float64, Options()) is (Path.CPU if own else Path.MULTI)
    assert path_of(meta, Options()) is Path.MULTI
    for tensor in (float32, float64, meta):
        assert path_of(tensor, Options(foreach=True)) is path_of(tensor, Options(fused=False)) is Path.MULTI
        assert path_of(tensor, Options(foreach=False)) is Path.SINGLE
    with triton_path_on_cpu():
        low, large = torch.ones(2, dtype=torch.bfloat16), torch.ones(1, device="meta").expand(2**31, 2)
        layout = layout_of(tuple(large.shape), (0, 1), **{name: soap_opt.options.DEFAULTS[name] for name in SHAPING})
        assert path_of(float32, Options()) is Path.MULTI  # by request only
        assert path_of(float32, Options(fused=True)) is path_of(low, Options(fused=True)) is Path.CUDA
        assert path_of(float64, Options(fused=True)) is path_of(large, Options(fused=True), layout) is Path.MULTI


@every_implementation
def test_the_flat_signature(flags):
    """functional.soap is the optimizer's own step."""
    shapes = [(6, 5), (4, 3, 3, 3), (4,)]
    options = {"lr": 0.1, "precondition_frequency": 2, "max_grad_norm": 0.7, "betas": (0.9, 0.8), "normalize_grads": True}
    run = SoapRun(random_params(shapes), **flags, **options)
    gradients = random_gradients(shapes, 4)
    for grads in gradients[:3]:
        run.step(grads)
    state = [{key: value.clone() for key, value in run.state_of(i).items()} for i in range(3)]
    params = [param.detach().clone() for param in run.params]
    layouts = [run.optimizer._layout(param, run.optimizer.param_groups[0]) for param in run.params]

    def flat(keys):
        return [each[key] for each, layout in zip(state, layouts) for key in getattr(layout, keys)]

    skipped = functional.soap(
        params, gradients[3], [each["exp_avg"] for each in state], [each["exp_avg_sq"] for each in state],
        flat("gram_keys"), flat("basis_keys"), flat("offset_keys"), [each["step"] for each in state], layouts, **flags,
        **options,
    )  # fmt: skip
    run.step(gradients[3])
    assert skipped == ([], [])
    for i, param in enumerate(params):
        assert torch.equal(param, run.params[i])
        assert all(torch.equal(value, run.state_of(i)[key]) for key, value in state[i].items())


def test_a_batch_and_its_parts(monkeypatch):
    params = random_params([(2, 3), (4,), (3, 2)])
    run = SoapRun(params, lr=0.1)
    for grads in random_gradients([(2, 3), (4,), (3, 2)], 2):
        run.step(grads)
    (work,) = [with_grad(run.optimizer, group) for group in run.optimizer.param_groups]
    batch = batch_of([work])
    turned = batch.select([2, 1, 0])  # all of them, but in another order
    assert [tuple(p.shape) for p in turned.params] == [(3, 2), (4,), (2, 3)]
    assert [g.shape[0] for g in turned.grams] == [3, 2, 2, 3]
    assert all(x is y for x, y in zip(turned.select([2, 1, 0]).bases, batch.bases))
    made = []
    original = batch_module.replace
    monkeypatch.setattr(batch_module, "replace", lambda x, **changes: made.append(type(x)) or original(x, **changes))
    changed = batch.with_options(lr=0.5)
    assert changed.learning_rates() == [0.5] * 3 and batch.learning_rates() == [0.1] * 3
    # one record a group: with one a parameter a clipped step of 2,000 small ones took 1.5 times as long
    assert made.count(Options) == len(changed.groups()) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"foreach": False}, "_single_tensor_soap"),
        ({"foreach": True}, "_multi_tensor_soap"),
        ({"foreach": False, "fused": False}, "_single_tensor_soap"),
        ({"foreach": True, "fused": False}, "_multi_tensor_soap"),
        ({"fused": False}, "_multi_tensor_soap"),
        ({}, "cpu_soap" if soap_opt._ext.is_default("cpu") else "_multi_tensor_soap"),
    ],
)
def test_the_chooser(monkeypatch, flags, expected):
    run = SoapRun(random_params([(4, 3)]), **flags)
    gradients = random_gradients([(4, 3)], 2)
    with recorded(monkeypatch) as ran:
        run.step(gradients[0])
        assert ran == []  # the first gradient is not an update
        run.step(gradients[1])
    assert ran == [expected]


@pytest.mark.skipif(soap_opt._ext.unavailable("cpu") is None, reason="fused=True works here")
def test_fused_raises_with_the_reason():
    reason = re.escape(soap_opt._ext.unavailable("cpu"))
    with pytest.raises(RuntimeError, match=reason):
        soap_opt.SOAP([nn.Parameter(torch.ones(2, 2))], fused=True)
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = soap_opt.SOAP([param])
    param.grad = torch.ones(2, 2)
    optimizer.param_groups[0]["fused"] = True
    with pytest.raises(RuntimeError, match=reason):
        optimizer.step()
    assert not optimizer.state


def test_the_flat_signature_refuses_what_fused_cannot_step():
    """There are no kernels for "meta"."""
    param, state = torch.empty(3, device="meta"), torch.empty(3, device="meta")
    layout = layout_of((3,), (0,), **{name: DEFAULTS[name] for name in SHAPING})
    with pytest.raises(
        RuntimeError, match="fused=True cannot be met: soap_opt has no kernels of its own for device type 'meta'"
    ):
        functional.soap([param], [param], [state], [state], [], [], [], [torch.ones(())], [layout], fused=True)


def test_prepare_gradient():
    grad = torch.tensor([2.0, -4.0])
    assert prepare_gradient(grad, torch.float32, None, False) is grad
    wide = prepare_gradient(grad.bfloat16(), torch.float32, torch.tensor(2.0), True)
    assert wide.dtype == torch.float32 and wide.tolist() == [-1.0, 2.0]
    assert grad.tolist() == [2.0, -4.0]


@pytest.mark.parametrize(
    ("norm", "usable"),
    [(0.0, True), (1e18, True), (9e18, True), (1e19, False), (1e20, False), (float("inf"), False), (float("nan"), False)],
)
def test_is_usable(norm, usable):
    """||G||^2 must be finite, with room for rounding: 1.8e19 squared is float32's largest number, 1e20's is beyond."""
    assert bool(is_usable(torch.tensor(norm))) is usable


@pytest.mark.parametrize("t", [1, 2, 1000])
def test_step_size(t):
    assert step_size(0.1, t, 0.9, 0.99, True) == pytest.approx(0.1 * (1 - 0.99**t) ** 0.5 / (1 - 0.9**t), rel=1e-12)
    assert step_size(0.1, t, 0.9, 0.99, False) == 0.1
