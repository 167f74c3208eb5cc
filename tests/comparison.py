"""The lockstep comparison: before each step the reference's state is copied into what is tested, after it both are compared.

Two correct float32 versions of SOAP drift apart in null spaces, so equality of whole trajectories cannot be asked for
in general; equality of one step from one state can. Every tolerance below is a bound on rounding, derived where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from oracle import Oracle, View, power_iteration, to_eigenbasis
from torch import Tensor

import soap_opt

# Relative to the norm, in units of float32 (scaled by eps / eps32 for float64 state).
UPDATE_TOLERANCE = 5e-5
GRAM_TOLERANCE = 1e-6

Grads = Sequence["Tensor | None"]

# What SOAP is given to run each implementation
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "single": {"foreach": False},
    "multi": {"foreach": True},
    "fused": {"fused": True},
}
NO_ENGINE = soap_opt._ext.unavailable("cpu")
AVAILABLE = [flags for name, flags in IMPLEMENTATIONS.items() if name != "fused" or NO_ENGINE is None]
needs_engine = pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))


def implementations(*names: str) -> list[Any]:
    """Names of implementations (and "oracle") as test parameters; those that are missing here skip with the reason."""
    return [pytest.param(name, marks=needs_engine) if name == "fused" else name for name in names]


every_implementation = pytest.mark.parametrize(
    "flags",
    [pytest.param(flags, id=name, marks=needs_engine if name == "fused" else ()) for name, flags in IMPLEMENTATIONS.items()],
)


class SoapRun:
    """soap_opt.SOAP on its own copy of the parameters."""

    def __init__(self, params: Iterable[Tensor], **options: Any) -> None:
        self.params = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
        self.optimizer = soap_opt.SOAP(self.params, **options)

    def step(self, grads: Grads) -> None:
        for param, grad in zip(self.params, grads):
            param.grad = None if grad is None else grad.clone(memory_format=torch.preserve_format)
        self.optimizer.step()

    def state_of(self, i: int) -> dict[str, Tensor]:
        self.optimizer.wait_for_refresh()
        return self.optimizer.state.get(self.params[i], {})

    def adopt(self, i: int, param: Tensor, state: dict[str, Tensor]) -> None:
        self.params[i].data.copy_(param)
        own = self.state_of(i)
        assert own.keys() == state.keys(), (own.keys(), state.keys())
        for key, value in state.items():
            own[key].copy_(value)


class Setting:
    """Sets something for a with block and puts the old value back."""

    def __init__(self, get, set_, value):
        self.get, self.set, self.value = get, set_, value

    def __enter__(self):
        self.old = self.get()
        self.set(self.value)

    def __exit__(self, *_):
        assert self.get() == self.value, "the step changed a global setting"
        self.set(self.old)


class OracleRun:
    """The naive SOAP of oracle.py behind the same interface; or an oracle that has been running."""

    def __init__(self, params: Iterable[Tensor] = (), oracle: Oracle | None = None, **options: Any) -> None:
        self.oracle = Oracle(list(params), **options) if oracle is None else oracle
        self.params = self.oracle.params

    def step(self, grads: Grads) -> None:
        self.oracle.step(grads)

    def state_of(self, i: int) -> dict[str, Tensor]:
        return self.oracle.state[i]

    def adopt(self, i: int, param: Tensor, state: dict[str, Tensor]) -> None:
        self.params[i].copy_(param)
        self.oracle.state[i] = {key: value.clone() for key, value in state.items()}


def run_lockstep(
    reference: Any,
    tested: Any,
    gradients: Iterable[Grads],
    options: dict[str, Any],
    before_step: Callable[[int], None] | None = None,
) -> int:
    """Both runs over the same gradients, compared after every step. Returns how many bases were refreshed on the way.

    Args:
        reference: its state is copied into ``tested`` before each step.
        tested: what is judged.
        gradients: for each step the gradients (None for a parameter that has none).
        options: SOAP's options, shared by both (those that the oracle knows).
        before_step: called with the step's index, to change hyper-parameters on the way; may edit ``options``.
    """
    refreshed = 0
    for number, grads in enumerate(gradients):
        if before_step is not None:
            before_step(number)
        before = []
        for i, param in enumerate(reference.params):
            state = {key: value.clone() for key, value in reference.state_of(i).items()}
            before.append((param.detach().clone(), state))
            tested.adopt(i, param.detach(), state)
        reference.step(grads)
        tested.step(grads)
        for i, (param, state) in enumerate(before):
            if not state:  # offsets are an input of the oracle, not its result
                for run, other in ((reference, tested), (tested, reference)):
                    if isinstance(run, OracleRun):
                        offsets = {k: v.clone() for k, v in other.state_of(i).items() if k.startswith("refresh_offset")}
                        run.state_of(i).update(offsets)
            where = f"step {number}, parameter {i} of shape {tuple(param.shape)}"
            after = (reference.params[i].detach(), reference.state_of(i))
            got = (tested.params[i].detach(), tested.state_of(i))
            refreshed += compare_step(param, state, grads[i], after, got, options, where)
    return refreshed


def _widen(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() for key, value in state.items()}


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
    """
    spec_param, spec = after
    tested_param, tested = got
    assert tested.keys() == spec.keys(), f"{where}: state keys {list(tested)} != {list(spec)}"
    for key in spec:
        assert tested[key].dtype == spec[key].dtype, f"{where}: dtype of {key}"
        assert tested[key].shape == spec[key].shape, f"{where}: shape of {key}"
        if key in ("step", "initialized") or key.startswith("refresh_offset"):
            assert torch.equal(tested[key].cpu(), spec[key].cpu()), f"{where}: {key} {tested[key]} != {spec[key]}"

    moved = bool(before) and bool(spec["step"] != before["step"])
    if not moved:
        assert torch.equal(tested_param, spec_param), f"{where}: a parameter that must not move moved"
    if not spec or grad is None:
        return 0

    o = {**{"betas": (0.95, 0.95), "lr": 3e-3, "eps": 1e-8, "weight_decay": 0.01, "normalize_grads": False}, **options}
    view = View(tuple(param.shape), {**_VIEW_DEFAULTS, **options})
    dtype = spec["exp_avg"].dtype
    eps = torch.finfo(dtype).eps
    unit = eps / torch.finfo(torch.float32).eps
    beta1, beta2 = o["betas"]
    wide_spec, wide_tested, wide_before = _widen(spec), _widen(tested), _widen(before)
    grad = grad.to(dtype).double()

    for mode in view.modes:
        tolerance = gram_tolerance(param.numel() // view.merged[mode], eps)
        _norm_close(wide_tested[f"gram_{mode}"], wide_spec[f"gram_{mode}"], tolerance, f"{where}: gram_{mode}")

    if not moved:
        if not bool(spec["initialized"]) or (before and bool(before["initialized"])):
            for key in spec:
                assert torch.equal(tested[key], spec[key]), f"{where}: {key} must not change"
        else:
            for mode in view.modes:
                assert_eigenbasis(wide_spec[f"gram_{mode}"], wide_spec[f"basis_{mode}"], eps, f"{where}: reference")
                assert_eigenbasis(wide_tested[f"gram_{mode}"], wide_tested[f"basis_{mode}"], eps, f"{where}: basis_{mode}")
            for key in ("exp_avg", "exp_avg_sq"):
                assert not tested[key].any(), f"{where}: {key} after the first gradient"
        return 0

    # -- Rounding of G', entry by entry: inner products with unit vectors, a few eps of ||G||. Added up one after the other, d
    # terms that are all of one sign lose up to eps sqrt(d) (three standard deviations, see gram_tolerance): a column of G along
    # a column of Q. BLAS and register tiles that add many sums side by side lose less.
    delta = eps * max(4.0, max((view.merged[mode] for mode in view.modes), default=1) ** 0.5) * float(grad.norm())
    turned = to_eigenbasis(grad, wide_before, view)
    m = beta1 * wide_before["exp_avg"] + (1 - beta1) * turned
    v = beta2 * wide_before["exp_avg_sq"] + (1 - beta2) * turned.square()
    m_error = (1 - beta1) * delta + 4 * eps * m.norm()
    # (1 - b2) |G'| <= sqrt((1 - b2) v), because (1 - b2) G'^2 <= v
    v_error = 8 * eps * v + 2 * delta * ((1 - beta2) * v).sqrt() + (1 - beta2) * delta**2

    # -- The update: 5e-5 of its norm, and where an entry of G' is hardly more than rounding (a null space), what m / sqrt(v)
    # makes of that.
    root = v.sqrt()
    root_error = torch.minimum(v_error / (2 * root).clamp_min(1e-300), v_error.sqrt())
    direction = m / (root + o["eps"])
    noise = m_error / (root + o["eps"]) + direction.abs() * root_error / (root + o["eps"])
    relative = UPDATE_TOLERANCE * unit + float(noise.norm() / direction.norm().clamp_min(1e-300))
    spec_step = spec_param.double() - param.double()
    tested_step = tested_param.double() - param.double()
    lr = float(o["lr"])
    undecayed = spec_step + lr * o["weight_decay"] * spec_param.double()
    # the parameter is rounded at each of (at most) two operations, by at most half a unit in the last place
    allowed = relative * float(undecayed.norm()) + 2 * torch.finfo(param.dtype).eps * float(spec_param.double().norm())
    difference = float((tested_step - spec_step).norm())
    assert difference <= allowed + 1e-30, f"{where}: update differs by {difference:.3g}, {allowed:.3g} is allowed"

    # -- Bases, and how sure each of their columns is
    refreshed = 0
    sure: dict[int, Tensor] = {}
    signs: dict[int, Tensor] = {}
    turn_error = 0.0
    for mode in view.modes:
        key = f"basis_{mode}"
        old, new, got_basis = wide_before[key], wide_spec[key], wide_tested[key]
        size = new.shape[0]
        sure[mode] = torch.ones(size, dtype=torch.bool, device=new.device)
        signs[mode] = torch.ones(size, dtype=torch.float64, device=new.device)
        gram_error = gram_tolerance(param.numel() // size, eps)
        kept = torch.equal(new, old)
        if kept != torch.equal(got_basis, old) and _adaptive_by_luck(wide_spec[f"gram_{mode}"], old, gram_error, eps, options):
            sure[mode][:] = False
            continue
        if kept:
            assert torch.equal(got_basis, old), f"{where}: {key} was refreshed but must not be"
            continue
        refreshed += 1
        _assert_orthogonal(got_basis, eps, f"{where}: {key}")
        tolerance = column_tolerance(wide_spec[f"gram_{mode}"], old, gram_error, eps)
        sure[mode] = tolerance < 0.05
        signs[mode] = torch.where((got_basis * new).sum(0) < 0, -1.0, 1.0).double()
        error = (got_basis * signs[mode] - new).norm(dim=0)
        wrong = (error > tolerance) & sure[mode]
        assert not wrong.any(), f"{where}: columns {wrong.nonzero().flatten().tolist()} of {key} differ by {error[wrong]}"
        turn_error += float(tolerance[sure[mode]].max()) if sure[mode].any() else 0.0

    # -- m and v along the sure columns; v's own order in a refreshed mode is not that of `v` above, so its bound is remade
    m_spec, m_tested = view.see(wide_spec["exp_avg"]), view.see(wide_tested["exp_avg"])
    v_spec, v_tested = view.see(wide_spec["exp_avg_sq"]), view.see(wide_tested["exp_avg_sq"])
    trusted = torch.ones(v_spec.shape, dtype=torch.bool, device=v_spec.device)
    for mode in view.modes:
        along = [1] * v_spec.dim()
        along[mode] = -1
        trusted = trusted & sure[mode].view(along)
        m_tested = m_tested * signs[mode].view(along)
    v_allowed = 16 * eps * v_spec + 4 * delta * ((1 - beta2) * v_spec).sqrt() + (1 - beta2) * delta**2
    wrong = ((v_tested - v_spec).abs() > v_allowed) & trusted
    assert not wrong.any(), f"{where}: exp_avg_sq differs at {wrong.nonzero()[:4].tolist()}"
    m_allowed = 2 * m_error + turn_error * m.norm()
    wrong = ((m_tested - m_spec).abs() > m_allowed) & trusted
    assert not wrong.any(), (
        f"{where}: exp_avg differs at {wrong.nonzero()[:4].tolist()} by {(m_tested - m_spec).abs().max():.3g}, "
        f"{m_allowed:.3g} is allowed"
    )
    return refreshed


_VIEW_DEFAULTS = {"max_precond_dim": 10000, "merge_dims": False, "precondition_1d": False, "data_format": "channels_first"}


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


# Every rank from 0 to 5, sizes of 0 and 1, Kronecker pairs
RAGGED = [(8, 8), (6, 4, 3, 3), (5,), (), (17, 3, 4), (1, 7), (2, 3, 1, 4, 2), (0, 3), (40, 33)]


def random_basis(d, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q.to(dtype).contiguous()


def random_params(shapes: Sequence[tuple[int, ...]], seed: int = 0, dtype=torch.float32, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(0.1 * torch.randn(shape, generator=generator)).to(device=device, dtype=dtype) for shape in shapes]


def random_gradients(
    shapes: Sequence[tuple[int, ...]],
    steps: int,
    seed: int = 0,
    dtype=torch.float32,
    device="cpu",
    missing: float = 0.0,
    rank_one: float = 0.0,
) -> list[list[Tensor | None]]:
    """Gradients whose spectrum changes from step to step, so that refreshed eigenvalues do change places.

    Args:
        missing: probability that a parameter has no gradient at a step (never at the first).
        rank_one: probability that a gradient is an outer product, which leaves null spaces.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    result: list[list[Tensor | None]] = []
    for number in range(steps):
        row: list[Tensor | None] = []
        for shape in shapes:
            grad = torch.randn(shape, generator=generator)
            draws = torch.rand(2, generator=generator).tolist()
            if shape and draws[0] < rank_one:
                grad = torch.ones(shape)
                for mode, size in enumerate(shape):
                    along = [1] * len(shape)
                    along[mode] = size
                    grad = grad * torch.randn(size, generator=generator).view(along)
            for mode, size in enumerate(shape):
                along = [1] * len(shape)
                along[mode] = size
                grad = grad * torch.exp(0.5 * torch.randn(size, generator=generator)).view(along)
            row.append(None if number and draws[1] < missing else grad.to(device=device, dtype=dtype))
        result.append(row)
    return result
