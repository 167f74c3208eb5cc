"""The class SOAP: its arguments, its state in torch.optim's form, and the order of a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from operator import attrgetter
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from . import compiled
from .checkpoint import restore_state
from .cuda.follow import Following
from .cuda.stepper import CudaStepper
from .eigenbasis import full_precision_matmul
from .functional import require_fused, step_batch
from .gradients import clipping_scale
from .init import initialize, step_dataless
from .layout import Layout
from .options import DEFAULTS, REFUSED, SCRATCH_LIMIT, Options, names_of
from .parameters import check_params, describe_place, first_step_costs
from .precondition import precondition
from .skipped import Skips, users_stacklevel
from .state import Layouts, add_missing_offsets, keep_on_host, step_tensor
from .work import Given, batch_of, check_capture, explained, looks_at_found_inf, together, with_grad


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
        max_precond_dim: larger modes are not preconditioned; their basis is the identity (default: 10000).
        merge_dims: merge neighbouring dimensions while their product is at most max_precond_dim (default: False).
        precondition_1d: precondition 1-D parameters too; otherwise they get plain Adam, as 0-D ones always do (default: False).
        normalize_grads: divide the update by its root mean square, layer by layer (default: False).
        data_format: "channels_first" or "channels_last": how the dimensions of a 4-D parameter are to be read when
            merge_dims merges them; it says nothing about memory formats (default: "channels_first").
        correct_bias: Adam's bias correction (default: True).
        refresh: "staggered" spreads the refreshes over the period so that no step stalls, "together" does all of them
            every precondition_frequency steps as the original does, "adaptive" is staggered and passes over bases that
            still diagonalise their Gram (default: "staggered").
        refresh_start: the number of this optimizer, where every parameter has an optimizer of its own (optimizer-in-backward).
            An optimizer spreads only its own refreshes: with equal numbers the refreshes of all optimizers would fall on the
            same step. Use ``SOAP([p], refresh_start=i)`` for the i-th optimizer (default: 0).
        refresh_tolerance: with "adaptive", the share of Q^T G Q (Frobenius norm) that may be off the diagonal (default: 0.01).
        maximize: maximize the objective (default: False).
        max_grad_norm: clip the norm of all gradients of a group together, as ``clip_grad_norm_`` before the step, but without
            changing the gradients; a gradient that is not usable does not count in the norm (default: None).
        precision: "high" lets the fused CUDA path project with TF32, never the Grams (default: "highest").
        overlap_refresh: let the fused CUDA path's refreshes run on a stream of their own, beside the next forward and backward
            pass (not with capturable). The optimizer's methods wait for these refreshes; before you read ``optimizer.state``
            yourself, call :meth:`wait_for_refresh` (default: True).
        scratch_limit: bytes of scratch of the fused CUDA path, 8 for each parameter element. Groups that together need more are
            stepped one by one; a group that alone needs more is stepped piece by piece, each piece with launches of its own. A
            CUDA graph keeps 8 bytes for each element whatever the limit (default: 2 GiB).
        capturable: keep ``step`` on the parameter's device, and with ``fused=True`` on CUDA let steps be recorded into CUDA
            graphs, whose replays refresh the due bases. Make an ordinary step before each capture, after every parameter's
            first gradient; a learning rate that is to change between replays must be a Tensor on the device (default: False).
        foreach: True selects the multi-tensor implementation, False the single-tensor one, which is the specification.
        fused: True selects the package's own kernels, and raises RuntimeError with the reason where they are missing. Where
            foreach and fused are both None, the fastest implementation that works is used.

    State of a parameter, all of it tensors: ``step`` (float32), ``exp_avg``, ``exp_avg_sq`` (the parameter's shape and memory
    format), for each preconditioned mode i of the merged view ``gram_i``, ``basis_i`` [d_i, d_i] and ``refresh_offset_i``
    (int64), and ``initialized`` (bool). Floating-point state is float32, or float64 for float64 parameters.

    Deviations from the original implementation (nikhilvyas/SOAP), each on purpose:

    - state is float32 for bfloat16 and float16 parameters, which are rounded once a step;
    - a closure runs with gradients enabled;
    - an all-zero first gradient (subnormal numbers count as zeros) allocates the state but leaves the parameter uninitialised:
      the basis is made from the first gradient that is not all zeros;
    - a gradient that is not finite, or whose squared norm may overflow (it is above a quarter of the largest number), changes
      neither its parameter nor the parameter's state (see :meth:`skipped_steps`);
    - a new basis that is not finite, or not orthogonal, is not taken (see :meth:`skipped_refreshes`);
    - U' is 0 where ``sqrt(v) + eps`` is 0, and an entry of a parameter keeps its value where its dtype cannot hold the new one;
    - an entry of m, v or a Gram that has decayed below the smallest normal number (1.2e-38; float64: 2.2e-308) becomes 0:
      rounding would hold it at a subnormal number, and a CPU takes ten times as long with those;
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
        given = locals()
        for name, value in unsupported.items():
            if name not in REFUSED:
                raise TypeError(f"SOAP.__init__() got an unexpected keyword argument {name!r}")
            if value:
                raise TypeError(f"SOAP does not support {name}={value!r}: {REFUSED[name]}")
        defaults = {name: given[name] for name in names_of()} | {"betas": tuple(betas)}
        Options.of(defaults).check()
        self._cuda = CudaStepper()
        self._number, self._traced_params = compiled.register(self), list[Tensor]()
        self._skips = Skips()
        self._layouts = Layouts()
        self._cubes = 0  # sum of d^3 over the Grams on the CPU, for the estimate of the first step's time
        super().__init__(params, defaults)
        self._support_amp_scaling()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked like the constructor's.

        The modes of late parameters are refreshed in the phases that have the least work.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            group = {**self.defaults, **param_group}
            options = Options.of(group)
            options.check()
            if not isinstance(param_group["params"], (Tensor, set)):
                param_group["params"] = list(param_group["params"])
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else params
            describe = partial(describe_place, params, sum(len(g["params"]) for g in self.param_groups))
            check_params(params, describe)
            for param in params:
                tensor = param[1] if isinstance(param, tuple) else param
                if isinstance(tensor, Tensor):
                    require_fused(options, tensor)
            self._cubes, warning = first_step_costs(params, group, self._cubes, describe)
            if warning is not None:  # before the parameters join, because a warning may be an exception
                warnings.warn(warning, stacklevel=users_stacklevel())
        super().add_param_group(param_group)
        self._traced_params = compiled.all_params(self)

    def _support_amp_scaling(self) -> None:
        """Let GradScaler hand its scale and found_inf to the step with ``fused=True``, as torch's optimizers do. Otherwise
        GradScaler divides the gradients, before trainers clip them (Lightning refuses to clip where this attribute is set)."""
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
            ValueError: an option in a param group is out of its range, or shapes the state and was changed under it.
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
    def _step(self, given: Given | None, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """:meth:`step` without a closure. given: for each parameter with a gradient, the tensor to update and the gradient;
        None stands for the parameters themselves and ``p.grad``."""
        self.wait_for_refresh()
        # Every check comes before the first change.
        keep_on_host(self.state.values())
        work = [with_grad(self, group, given) for group in self.param_groups]
        device_types = {device.type for w in work for device in set(map(attrgetter("device"), w.params))}
        kinds = set().union(*(map(type, w.params) for w in work))
        if "meta" in device_types or any(issubclass(kind, FakeTensor) for kind in kinds):
            work = [step_dataless(self, w) for w in work]
        pending = [
            (w.group, param, grad)
            for w in work
            for param, grad, state in zip(w.params, w.grads, w.states)
            if not (state and state["initialized"])
        ]
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            check_capture(work, [param for _, param, _ in pending], self._describe)
        # Where the kernels read found_inf on the device, the host need not wait for it
        if found_inf is not None and (pending or not all(map(looks_at_found_inf, work))):
            if float(found_inf) != 0:
                return
            found_inf = None
        with self._skips.warning_at_the_end(self._describe), full_precision_matmul(device_types):
            scales = [grad_scale] * len(work)
            if pending:
                groups = {id(group) for group, _, _ in pending}
                for i, w in enumerate(work):
                    limit = w.options.max_grad_norm
                    if limit is not None and id(w.group) in groups:  # else the steady step computes all norms itself
                        scales[i] = clipping_scale(w.grads, grad_scale, limit)
                initialize(self, pending, {id(w.group): scale for w, scale in zip(work, scales)})
                waiting = {param for _, param, _ in pending}
                work = [w.where([p not in waiting for p in w.params]) for w in work]
            for works, scale in together([(w, scale) for w, scale in zip(work, scales) if w.params]):
                with explained(works, self._describe):
                    batch = batch_of(works, clipped=scale is not grad_scale)
                    skipped = step_batch(batch, scale, found_inf, self._cuda)
                if any(skipped):
                    self._skips.add([param for w in works for param in w.params], skipped)

    @overload
    def skipped_steps(self, per_parameter: Literal[False] = False) -> int: ...
    @overload
    def skipped_steps(self, per_parameter: Literal[True]) -> list[int]: ...
    @overload
    def skipped_steps(self, per_parameter: bool) -> int | list[int]: ...
    def skipped_steps(self, per_parameter: bool = False) -> int | list[int]:
        """How often a gradient was not usable (not finite, or its squared norm overflowed): its parameter stayed as it was.

        Steps that GradScaler skipped whole (``found_inf``) do not count. The count is not part of the state_dict.

        Args:
            per_parameter: a list with one count for each parameter, in the order of ``param_groups``, instead of the sum.
        """
        counts = self._skips.totals(*self._counted()).steps
        return counts if per_parameter else sum(counts)

    @overload
    def skipped_refreshes(self, per_parameter: Literal[False] = False) -> int: ...
    @overload
    def skipped_refreshes(self, per_parameter: Literal[True]) -> list[int]: ...
    @overload
    def skipped_refreshes(self, per_parameter: bool) -> int | list[int]: ...
    def skipped_refreshes(self, per_parameter: bool = False) -> int | list[int]:
        """How often a basis was due and could not be refreshed: its Gram was not finite, or the Q of the QR
        decomposition was not finite or not orthogonal (:func:`soap_opt.eigenbasis.is_orthogonal`). The basis and the moments
        stayed as they were. The count is not part of the state_dict.

        Args:
            per_parameter: a list with one count for each parameter, in the order of ``param_groups``, instead of the sum.
        """
        counts = self._skips.totals(*self._counted()).refreshes
        return counts if per_parameter else sum(counts)

    def _counted(self) -> tuple[list[Tensor], list[Tensor | None], Following]:
        """Arguments of :meth:`Skips.totals`: parameters, their ``exp_avg`` (None without state), the CUDA path's counts."""
        params = compiled.all_params(self)
        exp_avgs = [self.state[p].get("exp_avg") if p in self.state else None for p in params]
        return params, exp_avgs, self._cuda.following

    def wait_for_refresh(self) -> None:
        """Let the current stream of every device wait for the last step's refreshes on their own stream (overlap_refresh).

        The host does not wait. Where no refresh runs, nothing happens. Call this before you read or write ``optimizer.state``
        by hand; step, state_dict, load_state_dict, deepcopy and pickle call it themselves.
        """
        self._cuda.wait()

    def release_graphs(self) -> None:
        """Free the tables, scratch and buffers of steps that were recorded into CUDA graphs. (They last as long as the
        optimizer and its state.)

        Call this when those graphs are gone: a graph that is replayed afterwards reads memory that others may use by then.
        """
        self._cuda.following.release_graphs()

    @torch._disable_dynamo
    @torch.no_grad()
    def precondition(self, grads: Iterable[Tensor | None]) -> list[Tensor | None]:
        """The update that the present state gives for gradients, without momentum: a step would subtract lr times it.

        ``U = c ((G x_1 Q_1 ... x_k Q_k) / (sqrt(v) + eps)) x_1 Q_1^T ... x_k Q_k^T`` with ``c = sqrt(1 - b2^t)`` (1 if not
        correct_bias), with v, Q_i and t as they are. U is linear in G, so that the updates of a loss's parts add up to the
        update of the loss. (A step with ``betas[0] = 0`` moves its parameters by ``-lr U``, with a v that already contains G.)
        The call changes nothing: no parameter, no state, no count. As in a step, ``maximize`` changes G's sign, and
        ``normalize_grads`` divides U by its root mean square (and U is no longer linear). Weight decay, the clipping of
        ``max_grad_norm`` and the check that G is finite are left out: the update of a NaN is NaN.

        Args:
            grads: for each parameter, in the order of ``param_groups``, a tensor of its shape and any real dtype, or None, as
                ``torch.autograd.grad(loss, params, allow_unused=True)`` returns them. Gradients of a scaled loss (GradScaler)
                give scaled updates.

        Returns:
            For each parameter a new tensor of its shape in the state's dtype (float32, or float64 for float64 parameters), or
            None where there is no gradient or no v to divide by yet (before the parameter's second usable gradient).

        Raises:
            ValueError: another number of gradients than of parameters, or a gradient of another shape; options that shape the
                state were changed under it.
            TypeError: grads is not a sequence of tensors and None.
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
        """The state in the form of every torch optimizer; waits for refreshes that still run on their own stream."""
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
            # So torch gets the groups alone, and __setstate__ puts the state in.
            self._restored = restore_state(self, loaded)
            return {**loaded, "state": {}} if self._restored is not None else loaded

        self.wait_for_refresh()  # a running refresh writes state that may be freed here
        handle = self.register_load_state_dict_pre_hook(restore)  # after the user's own hooks
        totals = self._skips.totals(*self._counted())
        try:
            super().load_state_dict(state_dict)
            self._skips.set_totals(*self._counted(), totals)  # (the counts on the device went with the old state)
        finally:
            handle.remove()
            self.__dict__.pop("_restored", None)

    def __getstate__(self) -> dict[str, Any]:
        self.wait_for_refresh()
        params, exp_avgs, following = self._counted()
        totals = self._skips.totals(params, exp_avgs, following)
        counts = [{p: count for p, count in zip(params, column) if count} for column in totals]
        return {**super().__getstate__(), "_skip_counts": tuple(counts)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        steps, refreshes = state.pop("_skip_counts", None) or (state.pop("_skipped", {}), {})  # (older pickles: steps alone)
        super().__setstate__(state)
        # An older version knew fewer options. torch adds `differentiable`, which no group of ours has, and which would be saved
        # with the next checkpoint.
        self.defaults = DEFAULTS | {name: value for name, value in self.defaults.items() if name != "differentiable"}
        if "_number" not in self.__dict__:  # a copy: streams and numbers belong to one process and one optimizer
            self._cuda, self._number = CudaStepper(), compiled.register(self)
        self._traced_params = compiled.all_params(self)
        if "_skips" not in self.__dict__:
            self._skips = Skips()
            self._skips.counts = dict(steps), dict(refreshes)
        self._support_amp_scaling()
        self.__dict__.setdefault("_cubes", 0)
        self._layouts = Layouts()
        restored = self.__dict__.pop("_restored", None)
        if restored is not None:
            self.state.update(restored)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            for param in group["params"]:
                param_state = self.state.get(param)
                if param_state:
                    if not torch.is_tensor(param_state["step"]):
                        param_state["step"] = step_tensor(float(param_state["step"]), param, Options.of(group))
                    self._layout(param, group)  # from here on the options that shape the state are pinned
        add_missing_offsets(self)

    # ---- state ----------------------------------------------------------------------------------------------------------

    def _layout(self, param: Tensor, group: dict[str, Any]) -> Layout:
        """See :meth:`soap_opt.state.Layouts.of`."""
        return self._layouts.of(param, group, self.state.get(param), self._describe)

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
