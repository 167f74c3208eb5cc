"""GradScaler, gradients that are not finite, Grams that eigh cannot decompose."""

import copy
import warnings

import pytest
import torch
from comparison import NO_ENGINE, SoapRun, every_implementation, random_gradients, random_params
from small_model import assert_same, assert_unchanged, model_of, snapshot, train
from step_comparison import assert_eigenbasis, compare_step
from torch import nn

from soap_opt import SOAP

BOTH = [False, True]

# ---- GradScaler and the guard ---------------------------------------------------------------------------------------------


def test_amp_scaling_is_supported_where_fused_was_asked_for():
    """As torch.optim.Adam. Trainers that clip (Lightning) refuse to where the step divides the scale out itself."""
    params = [nn.Parameter(torch.ones(2, 2))]
    for flags in ({}, {"foreach": True}, {"foreach": False}, {"fused": False}, {"fused": True}):
        if flags.get("fused") and NO_ENGINE is not None:
            continue
        for optimizer in (SOAP(params, **flags), copy.deepcopy(SOAP(params, **flags))):
            adam = torch.optim.Adam(params, **flags)
            name = "_step_supports_amp_scaling"
            assert getattr(optimizer, name, False) == getattr(adam, name, False) == bool(flags.get("fused"))


@every_implementation
def test_grad_scaler_on_the_cpu(flags):
    """Scaled training equals unscaled training (powers of two round nothing), inf gradients are skipped whole."""
    scaled, plain = model_of(), model_of()
    optimizers = [SOAP(m.parameters(), **flags, precondition_frequency=2) for m in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for number in range(8):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(scaled(x).square().mean()).backward()
        plain(x).square().mean().backward()
        if number == 4:
            scaled[0].bias.grad[0] = float("inf")
            before = snapshot(optimizers[0])
            scaler.step(optimizers[0])
            assert_unchanged(optimizers[0], before)
            assert optimizers[0].skipped_steps() == 0  # the scaler's step, not a parameter's
            scaler.update()
            assert scaler.get_scale() == 2.0**9
            continue
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
    assert_same(scaled.parameters(), plain.parameters())
    assert_unchanged(optimizers[0], snapshot(optimizers[1]))
    assert float(optimizers[0].state[scaled[0].weight]["step"]) == 6


def test_grad_scaler_with_an_unscale_before_clipping():
    """After scaler.unscale_ nothing may be divided out again."""
    scaled, plain = model_of(), model_of()
    optimizers = [SOAP(m.parameters(), precondition_frequency=2) for m in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(5):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(scaled(x).square().mean()).backward()
        plain(x).square().mean().backward()
        scaler.unscale_(optimizers[0])
        for model in (scaled, plain):
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
    assert_same(scaled.parameters(), plain.parameters())


def test_a_first_gradient_that_the_scaler_rejects_leaves_no_state():
    model = model_of()
    optimizer = SOAP(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(1, 6)).sum()).backward()
    model[0].weight.grad[0, 0] = float("nan")
    scaler.step(optimizer)
    scaler.update()
    assert all(not state or not state["initialized"] for state in optimizer.state.values())


def test_found_inf_by_attribute(device):
    """GradScaler's protocol for optimizers that say _step_supports_amp_scaling: attributes, tensors on any device."""
    run = SoapRun(random_params([(4, 3)], device=device))
    gradients = random_gradients([(4, 3)], 3, device=device)
    run.step(gradients[0])
    run.optimizer.found_inf = torch.ones((), device=device)
    before = snapshot(run.optimizer)
    run.step(gradients[1])
    assert_unchanged(run.optimizer, before)
    run.optimizer.found_inf = torch.zeros((), device=device)
    run.step(gradients[1])
    assert float(run.state_of(0)["step"]) == 1


def test_a_disabled_grad_scaler():
    scaled, plain = model_of(), model_of()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = SOAP(scaled.parameters())
    train(plain, SOAP(plain.parameters()), 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(scaled(torch.randn(7, 6, generator=generator)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(scaled.parameters(), plain.parameters())


BAD = {
    "nan": lambda g: g.index_fill(0, torch.tensor(0), float("nan")),
    "inf": lambda g: g.index_fill(0, torch.tensor(0), float("inf")),
    "-inf": lambda g: g.index_fill(0, torch.tensor(0), -float("inf")),
    "all nan": lambda g: g * float("nan"),
    "finite, its squared norm is not": lambda g: g * 1e25,
    "finite, only the sum of the squares is not": lambda g: torch.full_like(g, 1.2e19),
}


@pytest.mark.parametrize("first", BOTH, ids=["later", "first gradient"])
@every_implementation
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore:SOAP. the gradient of")
def test_a_bad_gradient_touches_nothing_but_the_count(kind, flags, first):
    """One bad parameter among equal shapes (they are batched): it stays, the others go on as without it."""
    shapes = [(4, 3), (4, 3), (4, 3), (3,)]
    options = {"precondition_frequency": 1}
    run, others = (SoapRun(random_params(shapes), **flags, **options) for _ in range(2))
    for number, grads in enumerate(random_gradients(shapes, 6)):
        bad = number == (0 if first else 3)
        before = snapshot(others.optimizer)  # in lockstep: stacks of another height may be added up in another order
        for i, (param, state) in enumerate(before):
            if state:
                run.adopt(i, param, state)
        skipped = snapshot(run.optimizer)[1]
        run.step([grads[0], BAD[kind](grads[1]), *grads[2:]] if bad else grads)
        others.step([grads[0], None, *grads[2:]] if bad else grads)
        after, got = snapshot(others.optimizer), snapshot(run.optimizer)
        for i, (param, state) in enumerate(before):
            if not (bad and i == 1):
                compare_step(param, state, grads[i], after[i], got[i], options, f"step {number}, parameter {i}")
        if bad:
            assert torch.equal(skipped[0], got[1][0])
            assert skipped[1].keys() == got[1][1].keys() or not got[1][1]["initialized"]
            for key in skipped[1]:
                assert torch.equal(skipped[1][key], got[1][1][key]), key
    assert run.optimizer.skipped_steps() == 1
    assert run.optimizer.skipped_steps(per_parameter=True) == [0, 1, 0, 0]
    for i in range(4):
        assert float(run.state_of(i)["step"]) == (4 if i == 1 else 5)


def test_one_warning_for_each_parameter():
    """And its text names the parameter; the warning points at the caller's line."""
    params = [nn.Parameter(p) for p in random_params([(4, 3), (3,)])]
    optimizer = SOAP([("weight", params[0]), ("bias", params[1])])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(5):
            params[0].grad = torch.full((4, 3), float("nan")) if number else torch.ones(4, 3)
            params[1].grad = torch.full((3,), float("nan")) if number > 2 else torch.ones(3)
            optimizer.step()
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and {w.filename for w in caught} == {__file__}
    assert "parameter 0 (weight) of shape (4, 3)" in texts[0] and "parameter 1 (bias) of shape (3,)" in texts[1]
    assert optimizer.skipped_steps() == 4 + 2
    assert optimizer.skipped_steps(per_parameter=True) == [4, 2]


def test_a_step_that_overflows_whole_warns_once():
    params = [nn.Parameter(torch.ones(2)) for _ in range(20)]
    optimizer = SOAP(params)
    for p in params:
        p.grad = torch.full((2,), float("nan"))
    with pytest.warns(UserWarning, match=r"parameter 0 of shape \(2,\) and of 19 more is not finite") as caught:
        optimizer.step()
    assert len(caught) == 1 and optimizer.skipped_steps() == 20


@every_implementation
def test_a_gradient_that_overflows_float16_only(flags):
    """60,000 squared is inf in float16 but state is float32: only what the gradient itself cannot hold is bad."""
    run = SoapRun([torch.zeros(2, 2, dtype=torch.float16)], lr=0.1, **flags)
    for value in (1.0, 60000.0, 60000.0):  # diagonal: without a null space, in which the update would be rounding noise
        run.step([torch.diag(torch.tensor([value, value / 2], dtype=torch.float16))])
    assert run.optimizer.skipped_steps() == 0 and run.params[0].isfinite().all() and (run.params[0].diagonal() < 0).all()


@every_implementation
def test_tiny_and_huge_gradients_stay_finite(flags):
    for scale in (1e-30, 1e-20, 1e15):
        run = SoapRun(random_params([(6, 5), (4,)]), **flags, precondition_frequency=1)
        for grads in random_gradients([(6, 5), (4,)], 6):
            run.step([g * scale for g in grads])
        assert run.optimizer.skipped_steps() == 0
        for i in range(2):
            assert run.params[i].isfinite().all()
            assert all(value.isfinite().all() for value in run.state_of(i).values())


class FailingEigh:
    """torch.linalg.eigh that does not converge for some dtypes."""

    def __init__(self, *dtypes):
        self.original, self.dtypes, self.calls = torch.linalg.eigh, dtypes, []

    def __call__(self, matrix, *args, **kwargs):
        self.calls.append((matrix.dtype, tuple(matrix.shape)))
        if matrix.dtype in self.dtypes:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return self.original(matrix, *args, **kwargs)


def test_eigh_is_retried_in_float64(monkeypatch):
    eigh = FailingEigh(torch.float32)
    run, plain = (SoapRun(random_params([(6, 5), (6, 5)]), foreach=True) for _ in range(2))
    grads = random_gradients([(6, 5), (6, 5)], 1)[0]
    plain.step(grads)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", eigh)
        run.step(grads)
    assert {dtype for dtype, _ in eigh.calls} == {torch.float32, torch.float64}
    for i in range(2):
        for key in ("basis_0", "basis_1"):
            got, want = run.state_of(i)[key], plain.state_of(i)[key]
            assert got.dtype == torch.float32
            gram = run.state_of(i)["gram" + key[5:]].double()
            for basis in (got, want):  # (a 6 x 5 gradient: the sixth eigenvector of the 6 x 6 Gram is that of zero)
                assert_eigenbasis(gram, basis.double(), torch.finfo(torch.float32).eps, key)


@every_implementation
def test_eigh_that_fails_in_float64_too(monkeypatch, flags):
    """An error that names the parameter's index, shape and step; nothing has changed, of no parameter."""
    params = [nn.Parameter(p) for p in random_params([(3, 3), (6, 5)])]
    optimizer = SOAP([("first", params[0]), ("second", params[1])], **flags)
    gradients = random_gradients([(3, 3), (6, 5)], 3)
    params[0].grad = gradients[0][0]
    optimizer.step()
    for param, grad in zip(params, gradients[1]):
        param.grad = grad
    before = snapshot(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", FailingEigh(torch.float32, torch.float64))
        if "fused" in flags:  # the operator returns an empty basis where LAPACK gave up
            patch.setattr(torch.ops.soap_opt, "init_basis", lambda grams: [gram.new_empty(0, 0) for gram in grams])
        message = r"mode 0 of parameter 1 \(second\) of shape \(6, 5\) at step 0.*float32 and in float64"
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.step()  # and it can go on
    assert bool(optimizer.state[params[1]]["initialized"])
