"""One step of one parameter from one state, compared. Every tolerance is a bound on rounding, derived where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from oracle import View, power_iteration, to_eigenbasis
from torch import Tensor

# Relative to the norm, in units of float32 (scaled by eps / eps32 for float64 state).
UPDATE_TOLERANCE = 5e-5
GRAM_TOLERANCE = 1e-6

DEFAULTS = {"betas": (0.95, 0.95), "lr": 3e-3, "eps": 1e-8, "weight_decay": 0.01}
VIEW_DEFAULTS = {"max_precond_dim": 10000, "merge_dims": False, "precondition_1d": False, "data_format": "channels_first"}


def compare_step(
    param: Tensor,
    before: dict[str, Tensor],
    grad: Tensor | None,
    after: tuple[Tensor, dict[str, Tensor]],
    got: tuple[Tensor, dict[str, Tensor]],
    options: dict[str, Any],
    where: str = "",
) -> int:
    """Compare one step of one parameter from the state ``before``; raises AssertionError. Returns the refreshed bases.

    Args:
        param, before: the parameter and its state before the step.
        grad: its gradient.
        after, got: (parameter, state) after the step, of the reference and of what is tested.
        options: SOAP's; those that are not given have its defaults.
        where: what an error begins with.
    """
    spec_param, spec = after
    tested_param, tested = got
    _compare_kinds_and_counters(spec, tested, where)
    moved = bool(before) and bool(spec["step"] != before["step"])
    if not moved:
        assert torch.equal(tested_param, spec_param), f"{where}: a parameter that must not move moved"
    if not spec or grad is None:
        return 0

    step = Step.of(param, before, spec, tested, options, where)
    _compare_grams(step)
    if not moved:
        if not bool(spec["initialized"]) or (before and bool(before["initialized"])):
            for key in spec:
                assert torch.equal(tested[key], spec[key]), f"{where}: {key} must not change"
        else:
            _compare_first_gradient(step)
        return 0
    moments = _moments(step, grad.to(spec["exp_avg"].dtype).double())
    _compare_update(step, moments, spec_param, tested_param)
    bases = _compare_bases(step)
    _compare_moments(step, moments, bases)
    return bases.refreshed


@dataclass
class Step:
    """What is compared of a step: the states in float64, and what the bounds depend on."""

    param: Tensor  # before the step
    before: dict[str, Tensor]
    spec: dict[str, Tensor]  # the reference's state after the step
    tested: dict[str, Tensor]
    view: View
    options: dict[str, Any]
    eps: float  # of the state's dtype
    where: str

    @classmethod
    def of(
        cls,
        param: Tensor,
        before: dict[str, Tensor],
        spec: dict[str, Tensor],
        tested: dict[str, Tensor],
        options: dict[str, Any],
        where: str,
    ) -> Step:
        states = ({key: value.double() for key, value in state.items()} for state in (before, spec, tested))
        view = View(tuple(param.shape), {**VIEW_DEFAULTS, **options})
        return cls(param, *states, view, {**DEFAULTS, **options}, torch.finfo(spec["exp_avg"].dtype).eps, where)

    def gram_error(self, mode: int) -> float:
        return gram_tolerance(self.param.numel() // self.view.merged[mode], self.eps)


@dataclass
class Moments:
    """m and v in the basis that the step began with, and how far rounding may take them."""

    delta: float  # rounding of an entry of G'
    m: Tensor
    v: Tensor
    m_error: Tensor  # a number
    v_error: Tensor  # entry by entry


@dataclass
class Bases:
    """What the comparison of the bases found, by mode."""

    refreshed: int
    sure: dict[int, Tensor]  # [d]: the columns that are determined
    signs: dict[int, Tensor]  # [d]: those of the tested columns against the reference's
    turn_error: float  # how far the sure columns together may have turned


def _compare_kinds_and_counters(spec: dict[str, Tensor], tested: dict[str, Tensor], where: str) -> None:
    assert tested.keys() == spec.keys(), f"{where}: state keys {list(tested)} != {list(spec)}"
    for key in spec:
        assert tested[key].dtype == spec[key].dtype, f"{where}: dtype of {key}"
        assert tested[key].shape == spec[key].shape, f"{where}: shape of {key}"
        if key in ("step", "initialized") or key.startswith("refresh_offset"):
            assert torch.equal(tested[key].cpu(), spec[key].cpu()), f"{where}: {key} {tested[key]} != {spec[key]}"


def _compare_grams(step: Step) -> None:
    for mode in step.view.modes:
        key = f"gram_{mode}"
        _norm_close(step.tested[key], step.spec[key], step.gram_error(mode), f"{step.where}: {key}")


def _compare_first_gradient(step: Step) -> None:
    """It makes bases, and neither m nor v."""
    for mode in step.view.modes:
        gram, basis = f"gram_{mode}", f"basis_{mode}"
        assert_eigenbasis(step.spec[gram], step.spec[basis], step.eps, f"{step.where}: reference")
        assert_eigenbasis(step.tested[gram], step.tested[basis], step.eps, f"{step.where}: {basis}")
    for key in ("exp_avg", "exp_avg_sq"):
        assert not step.tested[key].any(), f"{step.where}: {key} after the first gradient"


def _moments(step: Step, grad: Tensor) -> Moments:
    """Of the gradient in the state's dtype, widened.

    Rounding of G', entry by entry: inner products with unit vectors, a few eps of ||G||. Added up one after the other, d
    terms that are all of one sign lose up to eps sqrt(d) (three standard deviations, see gram_tolerance): a column of G along
    a column of Q. BLAS and register tiles that add many sums side by side lose less.
    """
    eps, (beta1, beta2), view = step.eps, step.options["betas"], step.view
    delta = eps * max(4.0, max((view.merged[mode] for mode in view.modes), default=1) ** 0.5) * float(grad.norm())
    turned = to_eigenbasis(grad, step.before, view)
    m = beta1 * step.before["exp_avg"] + (1 - beta1) * turned
    v = beta2 * step.before["exp_avg_sq"] + (1 - beta2) * turned.square()
    m_error = (1 - beta1) * delta + 4 * eps * m.norm()
    # (1 - b2) |G'| <= sqrt((1 - b2) v), because (1 - b2) G'^2 <= v
    v_error = 8 * eps * v + 2 * delta * ((1 - beta2) * v).sqrt() + (1 - beta2) * delta**2
    return Moments(delta, m, v, m_error, v_error)


def _compare_update(step: Step, moments: Moments, spec_param: Tensor, tested_param: Tensor) -> None:
    """5e-5 of its norm, and where an entry of G' is hardly more than rounding (a null space) what m / sqrt(v) makes of it."""
    param, o, root = step.param, step.options, moments.v.sqrt()
    root_error = torch.minimum(moments.v_error / (2 * root).clamp_min(1e-300), moments.v_error.sqrt())
    direction = moments.m / (root + o["eps"])
    noise = moments.m_error / (root + o["eps"]) + direction.abs() * root_error / (root + o["eps"])
    unit = step.eps / torch.finfo(torch.float32).eps
    relative = UPDATE_TOLERANCE * unit + float(noise.norm() / direction.norm().clamp_min(1e-300))
    spec_step = spec_param.double() - param.double()
    tested_step = tested_param.double() - param.double()
    undecayed = spec_step + float(o["lr"]) * o["weight_decay"] * spec_param.double()
    # the parameter is rounded at each of (at most) two operations, by at most half a unit in the last place
    allowed = relative * float(undecayed.norm()) + 2 * torch.finfo(param.dtype).eps * float(spec_param.double().norm())
    difference = float((tested_step - spec_step).norm())
    assert difference <= allowed + 1e-30, f"{step.where}: update differs by {difference:.3g}, {allowed:.3g} is allowed"


def _compare_bases(step: Step) -> Bases:
    """Bases, and how sure each of their columns is."""
    eps, bases = step.eps, Bases(0, {}, {}, 0.0)
    for mode in step.view.modes:
        key = f"basis_{mode}"
        gram, old, new, got = step.spec[f"gram_{mode}"], step.before[key], step.spec[key], step.tested[key]
        bases.sure[mode] = torch.ones(len(new), dtype=torch.bool, device=new.device)
        bases.signs[mode] = torch.ones(len(new), dtype=torch.float64, device=new.device)
        kept = torch.equal(new, old)
        if kept != torch.equal(got, old) and _adaptive_by_luck(gram, old, step.gram_error(mode), eps, step.options):
            bases.sure[mode][:] = False
            continue
        if kept:
            assert torch.equal(got, old), f"{step.where}: {key} was refreshed but must not be"
            continue
        bases.refreshed += 1
        _assert_orthogonal(got, eps, f"{step.where}: {key}")
        tolerance = column_tolerance(gram, old, step.gram_error(mode), eps)
        sure = bases.sure[mode] = tolerance < 0.05
        signs = bases.signs[mode] = torch.where((got * new).sum(0) < 0, -1.0, 1.0).double()
        error = (got * signs - new).norm(dim=0)
        wrong = (error > tolerance) & sure
        assert not wrong.any(), f"{step.where}: columns {wrong.nonzero().flatten().tolist()} of {key} differ by {error[wrong]}"
        bases.turn_error += float(tolerance[sure].max()) if sure.any() else 0.0
    return bases


def _compare_moments(step: Step, moments: Moments, bases: Bases) -> None:
    """m and v along the sure columns; v's own order in a refreshed mode is not that of ``moments.v``: its bound is remade."""
    eps, delta, (_, beta2), view = step.eps, moments.delta, step.options["betas"], step.view
    m_spec, m_tested = view.see(step.spec["exp_avg"]), view.see(step.tested["exp_avg"])
    v_spec, v_tested = view.see(step.spec["exp_avg_sq"]), view.see(step.tested["exp_avg_sq"])
    trusted = torch.ones(v_spec.shape, dtype=torch.bool, device=v_spec.device)
    for mode in view.modes:
        along = [1] * v_spec.dim()
        along[mode] = -1
        trusted = trusted & bases.sure[mode].view(along)
        m_tested = m_tested * bases.signs[mode].view(along)
    v_allowed = 16 * eps * v_spec + 4 * delta * ((1 - beta2) * v_spec).sqrt() + (1 - beta2) * delta**2
    wrong = ((v_tested - v_spec).abs() > v_allowed) & trusted
    assert not wrong.any(), f"{step.where}: exp_avg_sq differs at {wrong.nonzero()[:4].tolist()}"
    m_allowed = 2 * moments.m_error + bases.turn_error * moments.m.norm()
    wrong = ((m_tested - m_spec).abs() > m_allowed) & trusted
    assert not wrong.any(), (
        f"{step.where}: exp_avg differs at {wrong.nonzero()[:4].tolist()} by {(m_tested - m_spec).abs().max():.3g}, "
        f"{m_allowed:.3g} is allowed"
    )


def gram_tolerance(terms: int, eps: float) -> float:
    """How far two Grams may be apart, relative to their norm, each entry a sum of ``terms`` products.

    One after the other, K positive terms are added with a relative error of about u sqrt(K) / 3 (u = eps / 2; roundings of
    random sign, each of a partial sum). Three standard deviations of the difference of two such sums stay below
    eps sqrt(K). BLAS kernels add many sums side by side and are far better; but which one runs for a 3 x 784 by 784 x 3
    product is the machine's choice (on one it was sequential: 1.4e-6).
    """
    return max(GRAM_TOLERANCE * eps / torch.finfo(torch.float32).eps, eps * terms**0.5)


def share_tolerance(size: int, gram_error: float, eps: float) -> float:
    """How far two implementations' off(Q^T G Q) / ||Q^T G Q||_F may be apart.

    By G's error and that of the product G Q, relative to the norm, in the numerator and in the denominator.
    """
    return 2 * (gram_error + 4 * eps * size**0.5)


def _adaptive_by_luck(gram: Tensor, basis: Tensor, gram_error: float, eps: float, options: dict[str, Any]) -> bool:
    """Whether "adaptive" decides by rounding: the share off the diagonal is that close to what is tolerated."""
    if options.get("refresh") != "adaptive":
        return False
    rotated = basis.T @ gram @ basis
    share = float((rotated - torch.diag(rotated.diagonal())).norm() / rotated.norm().clamp_min(1e-300))
    return abs(share - options.get("refresh_tolerance", 0.01)) <= share_tolerance(gram.shape[0], gram_error, eps)


def column_tolerance(gram: Tensor, basis: Tensor, gram_error: float, eps: float) -> Tensor:
    """How far each column of Q' = qr(sorted G Q).Q may be from the exact one, up to sign; 1 where it says nothing.

    Two implementations have P = G Q up to ||dP||: gram_error of G and the product's own rounding. To first order column
    j of Q' turns by ||dP|| ||R_j^-1||, R_j the leading j x j block of R: inv(R)'s leading block, so that the norms of
    inv(R)'s columns, summed up to j, bound it. (A column whose eigenvalue is 100 d eps of the largest has about 1/100.)
    Eigenvalues too close to be told apart may be sorted either way.
    """
    product_error = gram_error + 4 * eps * gram.shape[0] ** 0.5
    gram, basis = gram.double(), basis.double()
    order, eigenvalues, _, triangle = power_iteration(gram, basis)
    scale = float(gram.norm())
    if scale == 0:
        return torch.ones(gram.shape[0], dtype=torch.float64, device=gram.device)
    diagonal = triangle.diagonal()
    tiny = diagonal.abs() < 1e-30 * scale
    triangle = triangle + torch.diag(torch.where(tiny, 1e-30 * scale, 0.0).double())
    identity = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
    tolerance = product_error * scale * inverse.square().sum(0).cumsum(0).sqrt()
    tolerance = torch.nan_to_num(tolerance, nan=1.0, posinf=1.0).clamp(max=1.0)
    ordered = eigenvalues[order]
    close = (ordered[:-1] - ordered[1:]).abs() < 2 * product_error * scale
    tolerance[:-1][close] = 1.0
    tolerance[1:][close] = 1.0
    return tolerance


def assert_eigenbasis(gram: Tensor, basis: Tensor, eps: float, where: str) -> None:
    """Orthogonal, G Q = Q diag(e), e falling: all that is determined of eigenvectors (degenerate ones are not)."""
    size = gram.shape[0]
    _assert_orthogonal(basis, eps, where)
    eigenvalues = torch.diagonal(basis.T @ gram @ basis)
    # backward stability of eigh: O(d eps ||G||)
    allowed = 10 * size * eps * float(gram.norm()) + 1e-29
    residual = float((gram @ basis - basis * eigenvalues).norm())
    assert residual <= allowed, f"{where}: not eigenvectors, {residual:.3g} > {allowed:.3g}"
    assert (eigenvalues[:-1] - eigenvalues[1:] >= -allowed).all(), f"{where}: eigenvalues are not sorted: {eigenvalues}"


def _assert_orthogonal(basis: Tensor, eps: float, where: str) -> None:
    size = basis.shape[0]
    identity = torch.eye(size, dtype=basis.dtype, device=basis.device)
    # Householder: O(d eps) in the Frobenius norm, in practice below eps sqrt(d) times a small number
    error = float((basis.T @ basis - identity).norm())
    assert error <= 10 * size * eps, f"{where}: not orthogonal: {error:.3g}"


def assert_as_exact_as(got: Tensor, plain: Tensor, exact: Tensor, what: str = "", least: float = 16.0) -> None:
    """``got`` is hardly further from the exact values (float64) than what the plain version makes in the same dtype.

    Two orders of summation err alike: four times the other's error, and ``least`` eps where that happens to be nothing.
    """
    eps = torch.finfo(got.dtype).eps
    got, plain, exact = got.detach().double(), plain.detach().double(), exact.detach()
    error, allowed = float((got - exact).norm()), 4 * float((plain - exact).norm()) + least * eps * float(exact.norm())
    assert error <= allowed, f"{what}: is off by {error:.3g}, {allowed:.3g} is allowed"


def _norm_close(got: Tensor, want: Tensor, relative: float, what: str) -> None:
    difference, norm = float((got - want).norm()), float(want.norm())
    assert difference <= relative * norm, f"{what} differs by {difference:.3g} of {norm:.3g}"
