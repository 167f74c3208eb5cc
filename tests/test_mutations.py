"""Tests of the tests: each fault is built into the package, and the comparisons must then fail.

Every mutation has to fail both the comparison with the original's trajectories and the lockstep with the oracle.
"""

from dataclasses import replace

import pytest
import torch
from comparison import OracleRun, SoapRun, random_gradients, random_params, run_lockstep
from test_parity import CASES, TOLERANCE, follow, run_of

from soap_opt import eigenbasis, multi_tensor, single_tensor, soap, state, work
from soap_opt import init as first_gradient
from soap_opt.eigenbasis import Refresh
from soap_opt.options import Options

BOTH = [False, True]


PATHS = (single_tensor, multi_tensor)  # each has names of its own for what both call


def mutate(monkeypatch, name, value):
    for module in PATHS:
        monkeypatch.setattr(module, name, value)


def worst_parity(case, foreach):
    return follow(run_of(case, foreach=foreach), case)


def assert_lockstep_fails(foreach, shapes=((8, 8), (6, 4, 3, 3), (5, 3, 4)), **options):
    options = {"refresh": "together", "precondition_frequency": 3, "weight_decay": 0.1, "lr": 0.01, **options}
    params = random_params(shapes)
    with pytest.raises(AssertionError):
        run_lockstep(
            OracleRun(params, **options), SoapRun(params, foreach=foreach, **options), random_gradients(shapes, 24), options
        )


def assert_caught(foreach, cases=("square", "conv"), **lockstep):
    for case in cases:
        assert worst_parity(case, foreach) > 2 * TOLERANCE, case
    assert_lockstep_fails(foreach, **lockstep)


@pytest.mark.parametrize("foreach", BOTH)
def test_nothing_mutated_passes(foreach):
    """The scaffolding of this file finds no fault where there is none."""
    assert all(worst_parity(case, foreach) <= TOLERANCE for case in CASES)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_lockstep_fails(foreach)


@pytest.mark.parametrize("foreach", BOTH)
@pytest.mark.parametrize("shift", [-1, 1])
def test_refresh_one_step_early_or_late(monkeypatch, foreach, shift):
    original = single_tensor.is_due
    mutate(monkeypatch, "is_due", lambda step, *rest: original(step + shift, *rest))
    # "three_d" has a frequency of 10 and "frequency_3_decay" of 3
    assert_caught(foreach, ("square", "conv", "three_d", "frequency_3_decay"))


@pytest.mark.parametrize("foreach", BOTH)
def test_never_refreshed(monkeypatch, foreach):
    mutate(monkeypatch, "is_due", lambda *_: False)
    assert_caught(foreach)


def mutate_step(monkeypatch, change):
    """``change(batch)`` before each steady step; what it returns, if anything, is stepped instead."""
    original = soap.step_batch
    monkeypatch.setattr(soap, "step_batch", lambda batch, *args: original(change(batch) or batch, *args))


def mutate_refresh(monkeypatch, change):
    original = eigenbasis.refresh_basis

    def mutated(basis, product, eigenvalues):
        return change(original, basis, product, eigenvalues)

    mutate(monkeypatch, "refresh_basis", mutated)


@pytest.mark.parametrize("foreach", BOTH)
def test_no_sort(monkeypatch, foreach):
    """Columns and v left in their old order; the new basis and the rotation agree with each other."""

    def change(original, basis, product, eigenvalues):
        falling = torch.arange(eigenvalues.shape[-1], 0, -1.0).expand_as(eigenvalues)
        return original(basis, product, falling)

    mutate_refresh(monkeypatch, change)
    assert_caught(foreach)


@pytest.mark.parametrize("foreach", BOTH)
def test_sorted_ascending(monkeypatch, foreach):
    mutate_refresh(monkeypatch, lambda original, q, p, e: original(q, p, -e))
    assert_caught(foreach)


@pytest.mark.parametrize("foreach", BOTH)
def test_v_not_permuted(monkeypatch, foreach):
    def change(original, basis, product, eigenvalues):
        result = original(basis, product, eigenvalues)
        unmoved = torch.arange(result.order.shape[-1]).expand_as(result.order)
        return Refresh(unmoved, result.basis, result.rotation)

    mutate_refresh(monkeypatch, change)
    assert_caught(foreach)


@pytest.mark.parametrize("foreach", BOTH)
def test_v_permuted_by_the_inverse(monkeypatch, foreach):
    def change(original, basis, product, eigenvalues):
        result = original(basis, product, eigenvalues)
        return Refresh(result.order.argsort(-1), result.basis, result.rotation)

    mutate_refresh(monkeypatch, change)
    # "conv" only ever swaps pairs, and a swap is its own inverse
    assert_caught(foreach, ("square", "deconv_and_bias"))


@pytest.mark.parametrize("foreach", BOTH)
def test_m_reexpressed_with_the_permuted_basis(monkeypatch, foreach):
    def change(original, basis, product, eigenvalues):
        result = original(basis, product, eigenvalues)
        permuted = basis.gather(-1, result.order.unsqueeze(-2).expand_as(basis))
        return Refresh(result.order, result.basis, permuted.mT @ result.basis)

    mutate_refresh(monkeypatch, change)
    assert_caught(foreach)


@pytest.mark.parametrize("foreach", BOTH)
def test_m_not_reexpressed(monkeypatch, foreach):
    def change(original, basis, product, eigenvalues):
        result = original(basis, product, eigenvalues)
        return Refresh(result.order, result.basis, torch.eye(basis.shape[-1]).expand_as(basis))

    mutate_refresh(monkeypatch, change)
    assert_caught(foreach)


@pytest.mark.parametrize("foreach", BOTH)
def test_m_reexpressed_by_the_transpose(monkeypatch, foreach):
    def change(original, basis, product, eigenvalues):
        result = original(basis, product, eigenvalues)
        return Refresh(result.order, result.basis, result.rotation.mT)

    mutate_refresh(monkeypatch, change)
    assert_caught(foreach)


@pytest.mark.parametrize("foreach", BOTH)
def test_basis_not_replaced(monkeypatch, foreach):
    mutate_refresh(monkeypatch, lambda original, q, p, e: original(q, p, e)._replace(basis=q.clone()))
    assert_caught(foreach)


@pytest.mark.parametrize("foreach", BOTH)
def test_decay_before_the_update(monkeypatch, foreach):
    """p (1 - lr w) - lr c U instead of (p - lr c U)(1 - lr w): they differ by lr^2 w c U, so a large decay shows it."""

    def change(batch):
        for param, options in zip(batch.params, batch.options):
            param.mul_(1 - options.lr * options.weight_decay)
        return batch.with_options(weight_decay=0.0)

    mutate_step(monkeypatch, change)
    assert_caught(foreach, ("frequency_3_decay",), weight_decay=5.0)


@pytest.mark.parametrize("foreach", BOTH)
def test_coupled_decay(monkeypatch, foreach):
    """The decay as a part of the gradient, as in torch.optim.Adam."""

    def change(batch):
        grads = [g + o.weight_decay * p for g, p, o in zip(batch.grads, batch.params, batch.options)]
        return replace(batch.with_options(weight_decay=0.0), grads=grads)

    mutate_step(monkeypatch, change)
    assert_caught(foreach, ("square", "frequency_3_decay"))


@pytest.mark.parametrize("foreach", BOTH)
def test_data_format_ignored(monkeypatch, foreach):
    original = state.layout_of
    monkeypatch.setattr(
        state, "layout_of", lambda *a, data_format, **kwargs: original(*a, data_format="channels_first", **kwargs)
    )
    assert worst_parity("merge_channels_last", foreach) > 2 * TOLERANCE
    assert worst_parity("merge_dims", foreach) <= TOLERANCE
    assert_lockstep_fails(foreach, ((3, 2, 2, 4),), merge_dims=True, max_precond_dim=6, data_format="channels_last")


@pytest.mark.parametrize("foreach", BOTH)
def test_data_format_obeyed_without_merging(monkeypatch, foreach):
    """It matters only when dimensions are merged: modes in another order would carry other names."""
    original = state.layout_of

    def mutated(shape, order, **kwargs):
        return original(shape, order, **{**kwargs, "merge_dims": True, "max_precond_dim": max(shape, default=1)})

    monkeypatch.setattr(state, "layout_of", mutated)
    assert_lockstep_fails(foreach, ((3, 2, 2, 4),), data_format="channels_last")


@pytest.mark.parametrize("foreach", BOTH)
def test_gram_before_the_gradient_is_projected(monkeypatch, foreach):
    """A basis that is refreshed at a step must not project the gradient of the same step."""

    def change(batch):
        gram, basis = batch.by_parameter(batch.grams), batch.by_parameter(batch.bases)
        for k, (layout, o) in enumerate(zip(batch.layouts, batch.options)):
            for i, outer in enumerate(eigenbasis.outer_products(batch.grads[k], layout)):
                gram[k][i].lerp_(outer, 1 - o.gram_beta)
            if single_tensor.is_due(int(batch.state_steps[k]) + 1, 0, o.precondition_frequency, "together"):
                refreshed = {
                    i: eigenbasis.refresh_basis(q, *eigenbasis.gram_times_basis(g, q))
                    for i, (g, q) in enumerate(zip(gram[k], basis[k]))
                }
                eigenbasis.reexpress_(batch.exp_avgs[k], batch.exp_avg_sqs[k], basis[k], layout, refreshed)
        return replace(batch.with_options(precondition_frequency=10**9), grams=[g.clone() for g in batch.grams])

    mutate_step(monkeypatch, change)
    assert_caught(foreach)


@pytest.mark.parametrize("foreach", BOTH)
def test_gram_with_bias_correction(monkeypatch, foreach):
    """Scaling a Gram leaves its eigenvectors alone, so only a comparison of state can see it."""
    original = first_gradient.first_grams

    def larger(*args):
        return [([20 * g for g in grams], some) for grams, some in original(*args)]

    monkeypatch.setattr(first_gradient, "first_grams", larger)
    assert_lockstep_fails(foreach)


@pytest.mark.parametrize("foreach", BOTH)
def test_first_gradient_is_used_twice(monkeypatch, foreach):
    original = soap.initialize

    def mutated(optimizer, pending, scales):
        original(optimizer, pending, scales)
        for group in optimizer.param_groups:
            soap.step_batch(work.batch_of([work.with_grad(optimizer, group)]), scales[id(group)], None, optimizer._cuda)

    monkeypatch.setattr(soap, "initialize", mutated)
    assert_caught(foreach)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda lr, t, b1, b2, correct: lr,
        lambda lr, t, b1, b2, correct: lr * (1 - b2 ** (t + 1)) ** 0.5 / (1 - b1 ** (t + 1)),
        lambda lr, t, b1, b2, correct: lr * (1 - b2**t) / (1 - b1**t),
    ],
    ids=["none", "t + 1", "without the root"],
)
@pytest.mark.parametrize("foreach", BOTH)
def test_wrong_bias_correction(monkeypatch, foreach, wrong):
    mutate(monkeypatch, "step_size", wrong)
    assert_caught(foreach, betas=(0.9, 0.99))


@pytest.mark.parametrize("foreach", BOTH)
def test_projected_back_with_the_wrong_side(monkeypatch, foreach):
    mutate(monkeypatch, "project_back", single_tensor.project)
    assert_caught(foreach)


@pytest.mark.parametrize("foreach", BOTH)
def test_beta_of_the_gram_is_beta1(monkeypatch, foreach):
    monkeypatch.setattr(Options, "gram_beta", property(lambda options: options.betas[0]))
    assert worst_parity("shampoo_beta", foreach) > 2 * TOLERANCE
    assert_lockstep_fails(foreach, betas=(0.9, 0.99))


@pytest.mark.parametrize("foreach", BOTH)
def test_v_not_decayed(monkeypatch, foreach):
    """v <- v + (1 - b2) G'^2."""

    def change(batch):
        for v, options in zip(batch.exp_avg_sqs, batch.options):
            v.div_(options.beta2)

    mutate_step(monkeypatch, change)
    assert_caught(foreach)


@pytest.mark.parametrize("foreach", BOTH)
def test_eps_forgotten(monkeypatch, foreach):
    mutate_step(monkeypatch, lambda batch: batch.with_options(eps=0.0))
    assert_lockstep_fails(foreach, eps=1e-3)


@pytest.mark.parametrize("foreach", BOTH)
def test_staggered_offset_ignored(monkeypatch, foreach):
    original = single_tensor.is_due
    mutate(monkeypatch, "is_due", lambda step, offset, *rest: original(step, 0, *rest))
    assert_lockstep_fails(foreach, refresh="staggered")


@pytest.mark.parametrize("foreach", BOTH)
def test_adaptive_never_passes_over(monkeypatch, foreach):
    mutate(monkeypatch, "off_diagonal_share", lambda q, p, e: torch.ones(e.shape[:-1]))
    assert_lockstep_fails(foreach, refresh="adaptive", refresh_tolerance=0.4)
