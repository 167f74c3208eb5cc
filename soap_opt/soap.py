"""class SOAP: argument checks, state, step. The mathematics is in functional.py and eigenbasis.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from . import _ext, compiled, refresh_basis
from .checkpoint import expected_state, restore_state, state_dtype
from .eigenbasis import EigenDecompositionError, full_precision_matmul, init_bases
from .functional import clipping_scale, first_grams, runs_triton, soap, use_fused
from .fused_cuda import SCRATCH_LIMIT, GroupOptions, fused_cuda_soap, steps_on_device
from .options import (
    ADDED_DEFAULTS,
    LAYOUT_OPTIONS,
    REFUSED,
    check_options,
    shampoo_beta,
    step_options,
)
from .overlap import Overlap
from .parameters import LARGE_MODE, LONG_FIRST_STEP, check_params, describe_place, first_step_seconds, is_dataless
from .plan import Layout, layout_of, memory_order, outside_modes
from .precondition import precondition
from .refresh import complete_offsets, unit_flops
from .skipped import Skipped, Skips, users_stacklevel
from .work import Work, check_capture, keep_on_host, together


class SOAP(Optimizer):
    r"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321).

    A parameter of shape (d_1, ..., d_k) has one *mode* for each dimension;
    ``(X x_i M)[.., j, ..] = sum_a X[.., a, ..] M[a, j]``.

    .. code-block:: text

        -----------------------------------------------------------------------------------------------------------
        state   m exp_avg, v exp_avg_sq (both in the eigenbasis); G_i gram_i, Q_i basis_i for each mode; t step
        input   lr, (b1, b2) betas, eps, w weight_decay, f precondition_frequency, beta_s shampoo_beta (b2 when None)
        -----------------------------------------------------------------------------------------------------------
        first gradient G  (the parameter does not move, t stays 0)
            G_i <- (1 - beta_s) * (G contracted with itself over all modes but i)
            Q_i <- eigenvectors of G_i, largest eigenvalue first
        every later gradient G
          1 project       G' = G x_1 Q_1 ... x_k Q_k;   t <- t + 1
          2 adam          m <- b1 m + (1 - b1) G';   v <- b2 v + (1 - b2) G'^2;   U' = m / (sqrt(v) + eps)
          3 project back  U = U' x_1 Q_1^T ... x_k Q_k^T
          4 apply         p <- p - lr * sqrt(1 - b2^t) / (1 - b1^t) * U;   p <- p * (1 - lr w)
          5 gram EMA      G_i <- beta_s G_i + (1 - beta_s) * (G contracted with itself over all modes but i)
          6 refresh       when due:  P = G_i Q_i;  e = diag(Q_i^T P);  Q_i' = qr(columns of P by falling e).Q;
                          mode i of v is permuted likewise,  m <- m x_i (Q_i^T Q_i')
        -----------------------------------------------------------------------------------------------------------

    Args:
        params: parameters, named parameters or dicts defining groups, as for every torch optimizer.
        lr: learning rate, a float or a 1-element Tensor (default: 3e-3).
        betas: decay rates of m and v (default: (0.95, 0.95)).
        eps: added to sqrt(v) (default: 1e-8).
        weight_decay: decoupled weight decay, applied after the update (default: 0.01; torch.optim.Adam's is 0 and coupled).
        shampoo_beta: decay rate of the Grams; None or -1 takes ``betas[1]`` (default: None).
        precondition_frequency: steps between two refreshes of a basis (default: 10).
        max_precond_dim: larger modes are not preconditioned, their basis is the identity (default: 10000).
        merge_dims: merge neighbouring dimensions while their product is at most max_precond_dim (default: False).
        precondition_1d: precondition 1-D parameters too; otherwise they get plain Adam, as 0-D ones always do (default: False).
        normalize_grads: divide the update by its root mean square, layer by layer (default: False).
        data_format: "channels_first" or "channels_last": how the dimensions of a 4-D parameter are to be read when
            merge_dims merges them; it says nothing about memory formats (default: "channels_first").
        correct_bias: Adam's bias correction (default: True).
        refresh: "staggered" spreads the refreshes over the period so that no step stalls, "together" does all of them
            every precondition_frequency steps as the original does, "adaptive" is staggered and passes over bases that
            still diagonalise their Gram (default: "staggered").
        refresh_start: which of several optimizers this is, where there is one for each parameter (optimizer-in-backward): each
            spreads its own refreshes only, and those of all would come together. ``SOAP([p], refresh_start=i)`` for the i-th
            (default: 0).
        refresh_tolerance: with "adaptive", the share of Q^T G Q (Frobenius norm) that may be off the diagonal (default: 0.01).
        maximize: maximize the objective (default: False).
        max_grad_norm: clip the norm of all gradients of a group together, as ``clip_grad_norm_`` before the step, but without
            touching them; gradients that are not usable have no part in it (default: None).
        precision: "high" lets the fused CUDA path project with TF32, never the Grams (default: "highest").
        overlap_refresh: let the fused CUDA path's refreshes run on a stream of their own, behind the next forward and backward
            pass (not with capturable). The optimizer's methods wait for them; read ``optimizer.state`` itself after
            :meth:`wait_for_refresh` (default: True).
        scratch_limit: bytes of scratch of the fused CUDA path, 8 for each parameter element; groups that need more are stepped
            one by one, and a group that needs more piece by piece, each with launches of its own. A CUDA graph keeps 8 for each
            element whatever the limit (default: 2 GiB).
        capturable: keep ``step`` on the parameter's device, and with ``fused=True`` on CUDA let steps be recorded into CUDA
            graphs, whose replays refresh what is due. Make an ordinary step before each capture, after every parameter's
            first gradient; a learning rate that is to change between replays is a Tensor on the device (default: False).
        foreach: True the multi-tensor implementation, False the single-tensor one, which is the specification.
        fused: True the package's own kernels, or RuntimeError with the reason where they are missing. foreach and fused
            both None: the fastest that works.

    State of a parameter, all of it tensors: ``step`` (float32), ``exp_avg``, ``exp_avg_sq`` (the parameter's shape and memory
    format), for each preconditioned mode i of the merged view ``gram_i``, ``basis_i`` [d_i, d_i] and ``refresh_offset_i``
    (int64), and ``initialized`` (bool). Floating-point state is float32, or float64 for float64 parameters.

    Deviations from the original implementation (nikhilvyas/SOAP), each on purpose:

    - state is float32 for bfloat16 and float16 parameters, which are rounded once a step;
    - a closure runs with gradients enabled;
    - an all-zero first gradient (subnormal numbers count as zeros) allocates the state but leaves the parameter uninitialised:
      the basis is made from the first gradient that says something;
    - a gradient that is not finite, or whose squared norm (more than a quarter of the largest number) may overflow, changes
      nothing of its parameter or its state
      (see :meth:`skipped_steps`);
    - a new basis that is not finite, or not orthogonal, is not taken (see :meth:`skipped_refreshes`);
    - U' is 0 where ``sqrt(v) + eps`` is, and an entry of a parameter stays where its dtype could not hold the next;
    - what has decayed below the smallest normal number (1.2e-38; float64: 2.2e-308) in m, v and the Grams becomes 0: rounding
      would hold it there, and a CPU takes ten times as long with it;
    - refreshes are staggered unless ``refresh="together"`` asks for the original's schedule.

    Raises:
        ValueError: an argument is out of its range, or a parameter stands in a group twice.
        RuntimeError: complex parameters or sparse gradients; ``fused=True`` that cannot be met; eigh fails in float64 too.
        TypeError: ``amsgrad``, ``differentiable`` or ``decoupled_weight_decay``, which have no meaning here; DTensor
            parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        shampoo_beta: float | None = None,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        data_format: str = "channels_first",
        correct_bias: bool = True,
        refresh: str = "staggered",
        refresh_tolerance: float = 0.01,
        refresh_start: int = 0,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        precision: str = "highest",
        overlap_refresh: bool = True,
        scratch_limit: int = SCRATCH_LIMIT,
        capturable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **unsupported: Any,
    ) -> None:
        for name, value in unsupported.items():
            if name not in REFUSED:
                raise TypeError(f"SOAP.__init__() got an unexpected keyword argument {name!r}")
            if value:
                raise TypeError(f"SOAP does not support {name}={value!r}: {REFUSED[name]}")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "shampoo_beta": shampoo_beta,
            "precondition_frequency": precondition_frequency,
            "max_precond_dim": max_precond_dim,
            "merge_dims": merge_dims,
            "precondition_1d": precondition_1d,
            "normalize_grads": normalize_grads,
            "data_format": data_format,
            "correct_bias": correct_bias,
            "refresh": refresh,
            "refresh_tolerance": refresh_tolerance,
            "refresh_start": refresh_start,
            "maximize": maximize,
            "max_grad_norm": max_grad_norm,
            "precision": precision,
            "overlap_refresh": overlap_refresh,
            "scratch_limit": scratch_limit,
            "capturable": capturable,
            "foreach": foreach,
            "fused": fused,
        }
        check_options(defaults)
        self._overlap = Overlap()
        self._number, self._traced_params = compiled.register(self), []
        self._skips = Skips()
        self._layouts: dict[Tensor, tuple[tuple[Any, ...], Layout, tuple[int, ...]]] = {}  # derived, see plan.py
        self._option_tuples: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._cubes = 0  # of the sizes of all Grams: what a first step takes goes with it
        super().__init__(params, defaults)
        self._support_amp_scaling()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked like the constructor's. Late parameters take the lightest refresh phase."""
        if isinstance(param_group, dict) and "params" in param_group:
            check_options({**self.defaults, **param_group})
            if not isinstance(param_group["params"], (Tensor, set)):
                param_group["params"] = list(param_group["params"])
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else params
            describe = partial(describe_place, params, sum(len(g["params"]) for g in self.param_groups))
            check_params(params, describe)
            for param in params:
                tensor = param[1] if isinstance(param, tuple) else param
                if isinstance(tensor, Tensor):
                    _require_fused({**self.defaults, **param_group}, tensor.device.type)
            tensors = [param[1] if isinstance(param, tuple) else param for param in params]
            self._warn_of_first_step([param for param in tensors if isinstance(param, Tensor)], param_group, describe)
        super().add_param_group(param_group)
        self._traced_params = compiled.all_params(self)

    def _warn_of_first_step(self, params: list[Tensor], options: dict[str, Any], describe: Callable[[int], str]) -> None:
        """Warn where the eigendecompositions of these parameters, and of those before them, will keep a first step for seconds:
        once, when they become so many. Comes before the parameters join, because a warning may be an exception."""
        group = {**self.defaults, **options}
        shaping = {name: group[name] for name in LAYOUT_OPTIONS}
        sizes = [
            (size, place)
            for place, param in enumerate(params)
            if not is_lazy(param)
            for size in layout_of(tuple(param.shape), tuple(range(param.dim())), **shaping).sizes
        ]
        on_cpu = [size for size, place in sizes if params[place].device.type == "cpu"]
        before, self._cubes = self._cubes, self._cubes + sum(size**3 for size in on_cpu)
        seconds = first_step_seconds(self._cubes)
        if seconds > LONG_FIRST_STEP and not first_step_seconds(before) > LONG_FIRST_STEP:
            time = f"about {seconds:.0f} s on this machine"
        elif any(size > LARGE_MODE and params[place].device.type != "cpu" for size, place in sizes):
            time = "much time"
        else:
            return
        size, place = max(sizes)
        bytes_of_state = sum(2 * each * each * state_dtype(params[owner]).itemsize for each, owner in sizes)
        warnings.warn(
            f"SOAP's first step will take {time}: of {len(sizes)} Grams to decompose the largest is the {size} x {size} matrix "
            f"for {describe(place)}; Grams and bases are {bytes_of_state >> 20} MiB of state. max_precond_dim below "
            f"{size} leaves such modes alone" + (", so does merge_dims=False" if group["merge_dims"] else ""),
            stacklevel=users_stacklevel(),
        )

    def _support_amp_scaling(self) -> None:
        """As torch's optimizers do: with ``fused=True`` GradScaler hands its scale and found_inf to the step. Otherwise it
        divides the gradients itself, before trainers clip them (Lightning refuses to clip where this attribute is set)."""
        if self.defaults["fused"]:
            self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss; runs with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a sparse gradient; a step that cannot be recorded into the CUDA graph being captured; a Gram that
                eigh cannot decompose (named by its parameter; nothing has changed then).
            ValueError: an option in a param group is out of its range, or one that shapes the state was changed under it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            compiled.step_in_graph(self)
        else:
            self._step(None, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        return loss

    @torch.no_grad()
    def _step(
        self, given: dict[Tensor, tuple[Tensor, Tensor]] | None, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """:meth:`step` without a closure. given: of each parameter with a gradient the tensor that is updated and the gradient;
        None takes the parameters themselves and ``p.grad``."""
        self.wait_for_refresh()
        try:
            self._step_all(given, grad_scale, found_inf)
        finally:  # a warning may be an exception: not before all groups are stepped
            self._skips.warn(self._describe)

    def _step_all(
        self, given: dict[Tensor, tuple[Tensor, Tensor]] | None, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        # Every check comes before the first change.
        keep_on_host(self.state.values())
        work = [self._with_grad(group, given) for group in self.param_groups]
        device_types = {param.device.type for w in work for param in w.params}
        if "meta" in device_types or any(issubclass(kind, FakeTensor) for kind in {type(p) for w in work for p in w.params}):
            work = [self._step_dataless(w) for w in work]
        pending = [
            (w.group, param, grad)
            for w in work
            for param, grad, state in zip(w.params, w.grads, w.states)
            if not (state and state["initialized"])
        ]
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            check_capture(work, [param for _, param, _ in pending], self._describe)
        # Where the kernels look at found_inf, the host need not wait
        if found_inf is not None and (pending or not all(steps_on_device(w.group, p) for w in work for p in w.params)):
            if float(found_inf) != 0:
                return
            found_inf = None
        with full_precision_matmul(device_types):
            scales = [grad_scale] * len(work)
            if pending:
                groups = {id(group) for group, _, _ in pending}
                for i, w in enumerate(work):
                    limit = w.group["max_grad_norm"]
                    if limit is not None and id(w.group) in groups:  # else the steady step knows all norms itself
                        scales[i] = clipping_scale(w.grads, grad_scale, limit)
                self._initialize(pending, {id(w.group): scale for w, scale in zip(work, scales)})
                waiting = {param for _, param, _ in pending}
                work = [w.where([p not in waiting for p in w.params]) for w in work]
            for works, scale in together([(w, scale) for w, scale in zip(work, scales) if w.params]):
                self._steady_step(works, scale, found_inf, clip=scale is grad_scale)

    def skipped_steps(self, per_parameter: bool = False) -> int | list[int]:
        """How often a gradient was not usable (not finite, or its squared norm overflowed): its parameter stayed as it was.

        Steps that GradScaler skipped whole (``found_inf``) do not count. The count is not part of the state_dict.

        Args:
            per_parameter: a list with one count for each parameter, in the order of ``param_groups``, instead of the sum.
        """
        counts = self._skips.totals(*self._params_and_exp_avgs()).steps
        return counts if per_parameter else sum(counts)

    def skipped_refreshes(self, per_parameter: bool = False) -> int | list[int]:
        """How often a basis was due and could not be refreshed: its Gram was not finite, or what the QR decomposition made of
        it was not finite, or not orthogonal (:func:`soap_opt.eigenbasis.is_orthogonal`). The basis and the moments stayed as
        they were.

        The count is not part of the state_dict.

        Args:
            per_parameter: a list with one count for each parameter, in the order of ``param_groups``, instead of the sum.
        """
        counts = self._skips.totals(*self._params_and_exp_avgs()).refreshes
        return counts if per_parameter else sum(counts)

    def _params_and_exp_avgs(self) -> tuple[list[Tensor], list[Tensor | None]]:
        params = compiled.all_params(self)
        return params, [self.state[p].get("exp_avg") if p in self.state else None for p in params]

    def wait_for_refresh(self) -> None:
        """Let the current stream of every device wait for refreshes that still run behind the last step (overlap_refresh).

        The host does not wait, and where nothing runs behind nothing happens. To be called before ``optimizer.state`` is read
        or written by hand; step, state_dict, load_state_dict, deepcopy and pickle do it themselves.
        """
        self._overlap.wait()

    @torch._disable_dynamo
    @torch.no_grad()
    def precondition(self, grads: Iterable[Tensor | None]) -> list[Tensor | None]:
        """What the present state makes of given gradients, without momentum: the direction that the step subtracts lr times.

        ``U = c ((G x_1 Q_1 ... x_k Q_k) / (sqrt(v) + eps)) x_1 Q_1^T ... x_k Q_k^T`` with ``c = sqrt(1 - b2^t)`` (1 if not
        correct_bias), with v, Q_i and t as they are. Linear in G, so that the parts of a loss can be looked at one by one and
        add up. (A step with ``betas[0] = 0`` moves its parameters by ``-lr U``, with the v that has already taken G in.)
        Nothing is changed: no parameter, no state, no count. As the step does, it changes G's sign with ``maximize`` and with
        ``normalize_grads`` divides U by its root mean square (which is not linear any more). Left out are weight decay, the
        clipping of ``max_grad_norm``, and the look at whether G is finite: the update of a NaN is NaN.

        Args:
            grads: for each parameter, in the order of ``param_groups``, a tensor of its shape and any real dtype, or None; what
                ``torch.autograd.grad(loss, params, allow_unused=True)`` returns. Scaled ones (GradScaler) give scaled updates.

        Returns:
            For each parameter a new tensor of its shape in the state's dtype (float32, or float64 for float64 parameters), or
            None where there is no gradient, and where there is no v to divide by yet: before a parameter's second usable
            gradient.

        Raises:
            ValueError: another number of gradients than of parameters, or a gradient of another shape; options that shape the
                state were changed under it.
            TypeError: something else than a sequence of tensors and None.
            RuntimeError: a sparse gradient.

        .. code-block:: python

            params = [p for group in optimizer.param_groups for p in group["params"]]
            grads = torch.autograd.grad(rate, params, retain_graph=True, allow_unused=True)
            updates = optimizer.precondition(grads)
        """
        return precondition(self, grads)

    # ---- checkpoints ----------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state as every torch optimizer's; refreshes that run behind are waited for."""
        self.wait_for_refresh()
        return super().state_dict()

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict; every state tensor gets the dtype, device and memory format that a fresh run would give it.

        As with every torch optimizer, tensors that are right already are taken over, not copied.

        Raises:
            ValueError: the state does not fit the parameters; the optimizer is as it was.
        """

        def restore(optimizer: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            # torch casts state to the parameter's dtype, which would cost bfloat16 parameters their float32 state.
            # So it gets the groups alone, and __setstate__ puts the state in.
            self._restored = restore_state(self, loaded)
            return {**loaded, "state": {}} if self._restored is not None else loaded

        self.wait_for_refresh()  # its memory may be about to go
        handle = self.register_load_state_dict_pre_hook(restore)  # after the user's own hooks
        totals = self._skips.totals(*self._params_and_exp_avgs())
        try:
            super().load_state_dict(state_dict)
            self._skips.set_totals(*self._params_and_exp_avgs(), totals)  # a device counts for a state
        finally:
            handle.remove()
            self.__dict__.pop("_restored", None)

    def __getstate__(self) -> dict[str, Any]:
        self.wait_for_refresh()
        params, exp_avgs = self._params_and_exp_avgs()
        counts = [{p: count for p, count in zip(params, column) if count} for column in self._skips.totals(params, exp_avgs)]
        return {**super().__getstate__(), "_skip_counts": tuple(counts)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        counts = state.pop("_skip_counts", None) or (state.pop("_skipped", {}), {})  # an older version counted steps alone
        super().__setstate__(state)
        # torch adds `differentiable`, which no group of ours has, and which would be saved with the next checkpoint
        self.defaults = {name: value for name, value in self.defaults.items() if name != "differentiable"}
        if "_number" not in self.__dict__:  # a copy: streams and numbers are of one process and one optimizer
            self._overlap, self._number = Overlap(), compiled.register(self)
        self._traced_params = compiled.all_params(self)
        if "_skips" not in self.__dict__:
            self._skips = Skips()
            self._skips.counts = tuple(map(dict, counts))
        self._support_amp_scaling()
        self.__dict__.setdefault("_cubes", 0)
        self._layouts, self._option_tuples = {}, {}
        restored = self.__dict__.pop("_restored", None)
        if restored is not None:
            self.state.update(restored)
        for group in self.param_groups:
            for name, default in {**ADDED_DEFAULTS, **self.defaults}.items():
                group.setdefault(name, default)
            for param in group["params"]:
                param_state = self.state.get(param)
                if param_state:
                    if not torch.is_tensor(param_state["step"]):
                        param_state["step"] = _step_tensor(float(param_state["step"]), param, group)
                    self._layout(param, group)  # from here on the options that shape the state are pinned
        self._add_missing_offsets()

    # ---- state ----------------------------------------------------------------------------------------------------------

    def _layout(self, param: Tensor, group: dict[str, Any]) -> Layout:
        """The parameter's layout, anew where its shape or memory format is another; raises where that, or an option that shapes
        the state, was changed under existing state."""
        options = self._known_options(group)
        known, shape, stride = self._layouts.get(param), tuple(param.shape), param.stride()
        if known is not None and known[0] is options and known[1].shape == shape and known[2] == stride:
            return known[1]
        state = self.state.get(param)
        if state and tuple(state["exp_avg"].shape) != shape:
            raise ValueError(
                f"{self._describe(param)} had the shape {tuple(state['exp_avg'].shape)} when its state was made: to go on with "
                f"another, forget that state (del optimizer.state[param]) or make a new optimizer"
            )
        if known is not None and state and known[0] is not options:
            changed = [
                f"{name} from {old!r} to {new!r}" for name, old, new in zip(LAYOUT_OPTIONS, known[0], options) if old != new
            ]
            raise ValueError(
                f"{self._describe(param)} has state, which {' and '.join(changed)} would reshape: set it before the first "
                "step, or put the parameter into a new optimizer"
            )
        order = memory_order(torch.empty_like(param, device="meta"))  # the state's
        if state and memory_order(state["exp_avg"]) != order:
            # model.to(memory_format=..) after the first step: the state follows, as it would after load_state_dict
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].data = torch.empty_like(param, dtype=state[key].dtype).copy_(state[key])
        layout = layout_of(shape, order, **dict(zip(LAYOUT_OPTIONS, options)))
        self._layouts[param] = (options, layout, stride)
        return layout

    def _known_options(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The group's options that shape the state; the same tuple for equal ones."""
        options = tuple(group[name] for name in LAYOUT_OPTIONS)
        return self._option_tuples.setdefault(options, options)

    def _describe(self, param: Tensor) -> str:
        """'parameter 3 (layer.weight) of shape (4, 4)', counted over all groups."""
        before = 0
        for group in self.param_groups:
            for place, other in enumerate(group["params"]):
                if other is param:
                    named = list(zip(group["param_names"], group["params"])) if "param_names" in group else group["params"]
                    return describe_place(named, before, place)
            before += len(group["params"])
        return f"a parameter of shape {tuple(param.shape)}"

    def _with_grad(self, group: dict[str, Any], given: dict[Tensor, tuple[Tensor, Tensor]] | None = None) -> Work:
        """The group's parameters that have a gradient, after every check that could fail. given: as for :meth:`_step`."""
        check_options(group)
        # One tuple for all that are equal, so that identity tells them apart: this loop is a good part of a step of thousands
        # of small tensors, and everything in it is looked up once.
        options = self._known_options(group)
        params, tensors, grads, states, layouts = [], [], [], [], []
        strided, known_layout, known_state = torch.strided, self._layouts.get, self.state.get
        for param in group["params"]:
            if given is None:
                tensor, grad = param, param.grad
            else:
                tensor, grad = given.get(param, (param, None))
            if grad is None:
                continue
            if grad.layout is not strided:
                raise RuntimeError(
                    f"SOAP does not support sparse gradients, but that of {self._describe(param)} is {grad.layout}"
                )
            known = known_layout(param)
            # (a matrix has no memory formats to choose from)
            if (
                known is None
                or known[0] is not options
                or known[1].shape != param.shape
                or (len(known[2]) > 2 and known[2] != param.stride())
            ):
                layouts.append(self._layout(param, group))
            else:
                layouts.append(known[1])
            params.append(param)
            tensors.append(tensor)
            grads.append(grad)
            states.append(known_state(param))
        work = Work(group, params, tensors, grads, states, layouts)
        for device_type in {param.device.type for param in work.params} if group["fused"] else ():
            _require_fused(group, device_type)
        return work

    def _allocate(self, params: list[tuple[dict[str, Any], Tensor]]) -> None:
        """State without Grams and bases, in which initialized is False, for each of the parameters that has none."""
        new = [(group, p) for group, p in params if not self.state.get(p)]
        offsets = self._refresh_offsets() if new else {}
        for group, param in new:
            layout = self._layout(param, group)
            dtype = state_dtype(param)
            state = self.state[param]
            state["step"] = _step_tensor(0.0, param, group)
            state["initialized"] = torch.tensor(False, device="cpu")
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            for key, offset in zip(layout.offset_keys, offsets[param]):
                state[key] = torch.tensor(offset, dtype=torch.int64, device="cpu")

    def _add_missing_offsets(self) -> None:
        """Offsets for state that came without them: a checkpoint of the original implementation."""
        offsets = None
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param)
                for place, mode in enumerate(self._layout(param, group).modes if state else ()):
                    if f"refresh_offset_{mode}" not in state:
                        offsets = offsets or self._refresh_offsets()
                        state[f"refresh_offset_{mode}"] = torch.tensor(offsets[param][place], dtype=torch.int64, device="cpu")

    @outside_modes()
    def _refresh_offsets(self) -> dict[Tensor, list[int]]:
        """Refresh offsets of every parameter's modes: those in the state, and balanced ones where there are none."""
        offsets: dict[Tensor, list[int]] = {}
        for frequency in sorted({group["precondition_frequency"] for group in self.param_groups}):
            owners: list[Tensor] = []
            flops: list[float] = []
            known: list[int | None] = []
            starts: list[int] = []
            for group in self.param_groups:
                if group["precondition_frequency"] == frequency:
                    for param in group["params"]:
                        if is_lazy(param):  # its shape, and what that costs, are not known yet
                            continue
                        layout, state = self._layout(param, group), self.state.get(param, {})
                        offsets[param] = []
                        for mode, size in zip(layout.modes, layout.sizes):
                            offset = state.get(f"refresh_offset_{mode}")
                            owners.append(param)
                            flops.append(unit_flops(layout.numel, size))
                            known.append(None if offset is None else int(offset))
                            starts.append(group["refresh_start"])
            for param, offset in zip(owners, complete_offsets(flops, known, frequency, starts)):
                offsets[param].append(offset)
        return offsets

    def _initialize(self, pending: list[tuple[dict[str, Any], Tensor, Tensor]], scales: dict[int, Tensor | None]) -> None:
        """The first gradient: G_i <- (1 - beta_s) (G contracted over all modes but i), Q_i <- eigenvectors of G_i.

        Args:
            pending: group, parameter, gradient.
            scales: of each group, by its id: what the gradients are divided by.
        """
        usable: list[tuple[dict[str, Any], Tensor]] = []
        unusable: list[Tensor] = []
        grams: list[Tensor] = []
        owners: list[tuple[Tensor, str, str]] = []  # of each Gram: the parameter, the keys of the Gram and of its basis
        zeros: set[Tensor] = set()
        kinds: dict[tuple[int, torch.dtype], tuple[dict[str, Any], list[Tensor], list[Tensor]]] = {}
        for group, param, grad in pending:
            if grad.shape != param.shape:
                raise ValueError(
                    f"the gradient of {self._describe(param)} is of shape {tuple(grad.shape)}: it was made before the "
                    "parameter got its shape; zero_grad() and backward() make another"
                )
            _, params, gradients = kinds.setdefault((id(group), state_dtype(param)), (group, [], []))
            params.append(param)
            gradients.append(grad)
        engine = True
        for (_, dtype), (group, params, gradients) in kinds.items():
            layouts = [self._layout(p, group) for p in params]
            how = group["foreach"], group["fused"]
            compiled = all(refresh_basis.unavailable(grad.device.type) is None for grad in gradients)
            engine = engine and compiled and use_fused(gradients, *how)
            made = first_grams(gradients, layouts, dtype, *how, scales[id(group)], shampoo_beta(group))
            for param, layout, (outers, says_something) in zip(params, layouts, made):
                if outers is None:
                    unusable.append(param)
                    continue
                usable.append((group, param))
                if not says_something:
                    zeros.add(param)
                grams += outers
                owners += [(param, *keys) for keys in zip(layout.gram_keys, layout.basis_keys)]
        wanted = [i for i, (param, _, _) in enumerate(owners) if param not in zeros]
        try:
            engine = engine and len({gram.device for gram in grams}) == 1
            bases = dict(zip(wanted, init_bases([grams[i] for i in wanted], fused=engine)))
        except EigenDecompositionError as error:
            param, key, _ = owners[wanted[error.index]]
            state = self.state.get(param)
            raise RuntimeError(
                f"SOAP: eigh failed on the Gram of mode {key[5:]} of {self._describe(param)} at step "
                f"{int(state['step']) if state else 0}, in {state_dtype(param)} and in float64 ({error}); "
                "nothing has changed"
            ) from error

        self._skips.add(unusable, Skipped(list(range(len(unusable))), []))
        self._allocate(usable)
        for i, (param, gram_key, basis_key) in enumerate(owners):
            state = self.state[param]
            if param not in zeros or gram_key not in state:  # (a second gradient of zeros finds them in place)
                state[gram_key] = grams[i]
                state[basis_key] = bases[i] if i in bases else torch.zeros_like(grams[i])
        for _, param in usable:
            if param not in zeros:
                self.state[param]["initialized"].fill_(True)

    def _explain(self, works: list[Work], error: Exception) -> None:
        """Raise with the parameter's name, the cause and what to do where gradient or state do not fit a parameter."""
        remedy = (
            "Where the model was moved or converted after its first step, load_state_dict(optimizer.state_dict()) lets the "
            "state follow; where the state was changed by hand, del optimizer.state[param] forgets it"
        )
        for work in works:
            for param, grad, state, layout in zip(work.params, work.grads, work.states, work.layouts):
                what = f"SOAP cannot step {self._describe(param)}, {param.dtype} on {param.device}: "
                if grad.shape != param.shape:
                    raise RuntimeError(f"{what}its gradient is of shape {tuple(grad.shape)}") from error
                for key, shape, dtype, device in expected_state(param, layout):
                    value = state.get(key)
                    if value is None:
                        raise RuntimeError(f"{what}its state lacks {key}. {remedy}") from error
                    fits = tuple(value.shape) == shape and value.dtype == dtype and device in (None, value.device)
                    if not fits:
                        raise RuntimeError(
                            f"{what}its state {key} is {tuple(value.shape)}, {value.dtype} on {value.device}, and {shape}, "
                            f"{dtype} is needed. {remedy}"
                        ) from error

    def _step_dataless(self, work: Work) -> Work:
        """Step what has shapes and no numbers, and return the rest: state of the right shapes is all that can be made of it."""
        dataless = [is_dataless(param) for param in work.params]
        for param, layout in compress(zip(work.params, work.layouts), dataless):
            state = self.state.get(param)
            if state:
                with outside_modes() if not is_dataless(state["step"]) else nullcontext():
                    state["step"] += 1
                continue
            with outside_modes():
                self._allocate([(work.group, param)])
                self.state[param]["initialized"].fill_(True)
            state = self.state[param]
            for keys in (layout.gram_keys, layout.basis_keys):
                state.update({key: param.new_zeros(d, d, dtype=state_dtype(param)) for key, d in zip(keys, layout.sizes)})
        return work.where([not without for without in dataless])

    def _lists(self, works: list[Work]) -> tuple[list[Any], ...]:
        """What :func:`soap_opt.functional.soap` takes of them."""
        states = [state for work in works for state in work.states]
        layouts = [layout for work in works for layout in work.layouts]
        return (
            [tensor for work in works for tensor in work.tensors],
            [grad for work in works for grad in work.grads],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state[key] for state, layout in zip(states, layouts) for key in layout.gram_keys],
            [state[key] for state, layout in zip(states, layouts) for key in layout.basis_keys],
            [state[key] for state, layout in zip(states, layouts) for key in layout.offset_keys],
            [state["step"] for state in states],
            layouts,
        )

    def _steady_step(self, works: list[Work], grad_scale: Tensor | None, found_inf: Tensor | None, clip: bool = True) -> None:
        """One steady step of groups that one call may serve (:func:`soap_opt.work.together`). clip: grad_scale does not clip
        already."""
        group = works[0].group
        how = {
            "found_inf": found_inf,
            "precision": group["precision"],
            "overlap": self._overlap if group["overlap_refresh"] else None,
            "capturable": group["capturable"],
            "scratch_limit": group["scratch_limit"],
        }
        options = [step_options(work.group, clip) for work in works]
        try:
            lists = self._lists(works)
            fused = use_fused(lists[2][:1], group["foreach"], group["fused"])
            if len(works) > 1 and fused and runs_triton(lists[2][0]):
                counted = [(len(work.params), GroupOptions(**each)) for work, each in zip(works, options)]
                skipped = fused_cuda_soap(*lists, grad_scale, counted, **how)
            else:
                if len(works) > 1:
                    for name in ("lr", "weight_decay"):
                        options[0][name] = [float(each[name]) for each, work in zip(options, works) for _ in work.params]
                flags = {"foreach": group["foreach"], "fused": group["fused"]}
                skipped = soap(*lists, **flags, grad_scale=grad_scale, **options[0], **how)
        except (RuntimeError, KeyError) as error:
            self._explain(works, error)
            raise
        if any(skipped):
            self._skips.add([param for work in works for param in work.params], skipped)


def _step_tensor(value: float, param: Tensor, group: dict[str, Any]) -> Tensor:
    # float32 always: torch.set_default_dtype must not decide what a checkpoint holds
    device = param.device if group["capturable"] or group["fused"] or steps_on_device(group, param) else "cpu"
    return torch.tensor(value, dtype=torch.float32, device=device)


def _require_fused(group: dict[str, Any], device_type: str) -> None:
    if group["fused"]:
        reason = _ext.unavailable(device_type)
        if reason is not None:
            raise RuntimeError(f"fused=True cannot be met: {reason}")
