"""SOAP.precondition: what the present state makes of gradients, against what a step without momentum really does."""

import pytest
import torch
from comparison import every_implementation, random_gradients, random_params
from small_model import assert_unchanged, snapshot
from torch import nn

from soap_opt import SOAP

SHAPES = [(8, 3, 5, 5), (5, 4), (2, 3, 4), (6, 1), (1, 9), (3, 50), (7,), (1,), ()]


def trained(shapes=SHAPES, dtype=torch.float32, steps=5, memory_format=torch.contiguous_format, **options):
    params = [nn.Parameter(p) for p in random_params(shapes, dtype=dtype)]
    for param in params:
        if param.dim() == 4:
            param.data = param.data.to(memory_format=memory_format)
    optimizer = SOAP(
        params, **{"lr": 0.5, "weight_decay": 0.0, "precondition_frequency": 1000, "refresh": "together", **options}
    )
    for grads in random_gradients(shapes, steps):
        step(optimizer, params, grads)
    return params, optimizer


def step(optimizer, params, grads):
    for param, grad in zip(params, grads):
        param.grad = None if grad is None else grad.to(param.dtype)
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"merge_dims": True, "max_precond_dim": 20},
        {"merge_dims": True, "max_precond_dim": 30, "data_format": "channels_last"},
        {"memory_format": torch.channels_last},
        {"precondition_1d": True},
        {"max_precond_dim": 4},
        {"normalize_grads": True},
        {"correct_bias": False},
        {"maximize": True},
        {"eps": 0.0},
        {"eps": 0.3, "shampoo_beta": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_is_what_the_specification_steps_by(options, dtype):
    """With betas[0] = 0 a step from 0 leaves -lr times it, of the v that the step leaves. (A bfloat16 has 8 bits.)"""
    params, optimizer = trained(dtype=dtype, betas=(0.0, 0.9), foreach=False, **options)
    grads = [grad.to(dtype) for grad in random_gradients(SHAPES, 1, seed=3)[0]]
    for param in params:
        param.data.zero_()
    step(optimizer, params, grads)
    for param, update in zip(params, optimizer.precondition(grads)):
        assert update.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert update.shape == param.shape and update.any()
        tolerance = {torch.bfloat16: 2**-8, torch.float32: 2e-6, torch.float64: 1e-14}[dtype]
        torch.testing.assert_close(-0.5 * update, param.detach().to(update.dtype), rtol=tolerance, atol=tolerance * 1e-2)


@every_implementation
def test_is_the_same_for_the_state_of_every_implementation(flags):
    params, optimizer = trained(betas=(0.0, 0.9), **flags)
    grads = random_gradients(SHAPES, 1, seed=3)[0]
    for param in params:
        param.data.zero_()
    step(optimizer, params, grads)
    for param, update in zip(params, optimizer.precondition(grads)):
        torch.testing.assert_close(-0.5 * update, param.detach(), rtol=1e-4, atol=1e-5)


def test_formula():
    """Of a (3, 4, 2) parameter, written out: Q diag(1 / (sqrt(v) + eps)) Q^T, Q the Kronecker product of all bases."""
    (param,), optimizer = trained([(3, 4, 2)], dtype=torch.float64, eps=1e-3)
    grad = torch.randn(3, 4, 2, dtype=torch.float64)
    state = optimizer.state[param]
    q = torch.kron(torch.kron(state["basis_0"], state["basis_1"]), state["basis_2"])
    inner = (q.T @ grad.flatten()) / (state["exp_avg_sq"].flatten().sqrt() + 1e-3)
    want = (q @ inner).reshape(3, 4, 2) * (1 - 0.95 ** float(state["step"])) ** 0.5
    torch.testing.assert_close(optimizer.precondition([grad])[0], want)


def test_is_linear():
    _, optimizer = trained(dtype=torch.float64)
    a, b = ([g.double() for g in grads] for grads in random_gradients(SHAPES, 2, seed=5))
    parts = [optimizer.precondition(grads) for grads in (a, b, [2 * x - 3 * y for x, y in zip(a, b)])]
    for one, other, whole in zip(*parts):
        torch.testing.assert_close(2 * one - 3 * other, whole, rtol=1e-10, atol=1e-10)


@every_implementation
def test_changes_nothing(flags):
    params, optimizer = trained(precondition_frequency=2, **flags)
    before, rng = snapshot(optimizer), torch.get_rng_state()
    versions = [p._version for p in params] + [t._version for s in optimizer.state.values() for t in s.values()]
    kept = [p.grad.clone() for p in params]
    grads = random_gradients(SHAPES, 1, seed=3)[0]
    copies = [grad.clone() for grad in grads]
    updates = optimizer.precondition([*grads[:-1], torch.full_like(grads[-1], torch.nan)])
    optimizer.precondition([torch.full_like(grad, torch.nan) for grad in grads])
    for update in updates:
        update.fill_(7)  # nobody else's memory
    assert_unchanged(optimizer, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert versions == [p._version for p in params] + [t._version for s in optimizer.state.values() for t in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(grads, copies))
    assert all(torch.equal(p.grad, old) for p, old in zip(params, kept))
    assert optimizer.skipped_steps() == 0 and all(not update.requires_grad for update in updates)


def test_none_where_there_is_no_gradient_or_no_second_moment():
    first, second, zero = (nn.Parameter(torch.ones(3, 2)) for _ in range(3))
    optimizer = SOAP([{"params": [first]}, {"params": [second, zero], "lr": 1.0}])
    grads = [torch.randn(3, 2) for _ in range(3)]
    assert optimizer.precondition(grads) == [None] * 3  # no state
    assert not optimizer.state
    for given, known in [((0,), ()), ((0, 1), (0,)), ((0, 1), (0, 1))]:  # the first gradient makes the basis, the second v
        for i, param in enumerate((first, second)):
            param.grad = grads[i] if i in given else None
        zero.grad = torch.zeros(3, 2)
        optimizer.step()
        assert [i for i, update in enumerate(optimizer.precondition(grads)) if update is not None] == list(known)
    assert optimizer.precondition([None, grads[1], None])[0] is None
    assert optimizer.precondition(grad for grad in [None, grads[1], None])[1] is not None


def test_an_empty_parameter():
    params, optimizer = trained([(0, 3), (2, 3)])
    empty, other = optimizer.precondition([torch.ones(0, 3), torch.ones(2, 3)])
    assert empty is None and other is not None


def test_gradients_of_another_dtype():
    params, optimizer = trained([(5, 4)])
    grad = torch.randn(5, 4).to(torch.float16)
    (update,) = optimizer.precondition([grad])
    assert torch.equal(update, optimizer.precondition([grad.float()])[0]) and update.dtype == torch.float32


def test_waits_for_refreshes_and_takes_no_part_in_autocast(monkeypatch):
    _, optimizer = trained([(5, 4)])
    grads, waited = [torch.randn(5, 4)], []
    monkeypatch.setattr(optimizer._cuda.overlap, "wait", lambda *args: waited.append(1))
    (plain,) = optimizer.precondition(grads)
    assert waited
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(optimizer.precondition(grads)[0], plain)


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ([torch.ones(5, 4)], ValueError, "one entry for each of the 2 parameters, got 1"),
        ([torch.ones(4, 5), None], ValueError, r"gradient for parameter 0 of shape \(5, 4\) is of shape \(4, 5\)"),
        ([None, 3.0], TypeError, r"tensors or None, got float for parameter 1 of shape \(7,\)"),
        (torch.ones(2), TypeError, "a sequence with a tensor or None for each parameter, got Tensor"),
        ([torch.ones(5, 4).to_sparse(), None], RuntimeError, "sparse gradients, but that of parameter 0"),
    ],
    ids=str,
)
def test_misuse(grads, error, message):
    _, optimizer = trained([(5, 4), (7,)])
    with pytest.raises(error, match=message):
        optimizer.precondition(grads)


def test_options_that_were_changed_under_the_state_are_named():
    _, optimizer = trained([(5, 4)])
    optimizer.param_groups[0]["max_precond_dim"] = 4
    with pytest.raises(ValueError, match="max_precond_dim from 10000 to 4"):
        optimizer.precondition([torch.ones(5, 4)])
