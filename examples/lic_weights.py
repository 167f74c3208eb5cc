"""What training does to a model's weights besides stepping them: loads, looks at, averages and holds them in float32."""

import math
from pathlib import Path

import torch
from compressai.entropy_models import EntropyModel
from lic_checkpoint import load_file
from lic_files import InputError
from lic_stop import TrainingFailed
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present


def entropy_models_in_float32(model: nn.Module, device_type: str) -> None:
    """Keep a model's entropy models out of autocast: likelihoods go down to 1e-9, which float16 cannot hold, and are
    differences of near-equal numbers, of which bfloat16 leaves nothing."""

    def in_float32(forward):
        def wrapped(*args, **kwargs):
            args = [a.float() if isinstance(a, Tensor) else a for a in args]
            kwargs = {k: a.float() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
            with torch.autocast(device_type, enabled=False):
                return forward(*args, **kwargs)

        return wrapped

    for module in model.modules():
        if isinstance(module, EntropyModel):
            module.forward = in_float32(module.forward)


def not_finite(named: list[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds a value that is not finite."""
    named = [(name, t) for name, t in named if t.is_floating_point() and t.numel()]
    if not named:
        return None
    largest = torch._foreach_norm([t.detach() for _, t in named], ord=math.inf)  # one pass over all, NaN comes through
    finite = torch.stack([x.isfinite().to(named[0][1].device) for x in largest]).tolist()
    return next((name for (name, _), fine in zip(named, finite, strict=True) if not fine), None)


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Step `step`, counted from 0, of an exponential moving average of a model's parameters and buffers; those of integers are
    copied. It begins with the first step's, and its memory is shorter at the beginning, min(decay, (1 + n) / (10 + n)) at step
    n: otherwise the first steps would be in it for thousands. torch's AveragedModel copies its count to the device at each
    step and dtype, for which the host waits.
    """
    pairs = list(zip((*averaged.parameters(), *averaged.buffers()), (*model.parameters(), *model.buffers()), strict=True))
    mean = [(a, t) for a, t in pairs if a.is_floating_point() and step > 0]
    copied = [(a, t) for a, t in pairs if not (a.is_floating_point() and step > 0)]
    if mean:
        torch._foreach_lerp_(*map(list, zip(*mean)), 1 - min(decay, (1 + step) / (10 + step)))
    if copied:
        torch._foreach_copy_(*map(list, zip(*copied)))


@torch.no_grad()
def update_quantiles(model: nn.Module) -> None:
    """The entropy bottlenecks' quantiles to where the cumulative distributions say, by CompressAI's bisection. Their coder's
    tables are left as they are."""
    for name, module in model.named_modules():
        if hasattr(module, "_update_quantiles"):
            places = torch.tensor([-1e5, -1.0, 0.0, 1.0, 1e5], device=module.quantiles.device)  # from end to end of its search
            logits = module._logits_cumulative(places.expand(len(module.quantiles), 1, -1), stop_gradient=True)
            if not logits.isfinite().all():  # it would search for ever
                raise TrainingFailed(f"the cumulative distribution of {name} is not finite")
            module._update_quantiles()


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """--init: weights alone, of a checkpoint of this script (with any optimizer) or of CompressAI's."""
    state = load_file(path)
    try:
        weights = dict(state.get("state_dict", state))
        consume_prefix_in_state_dict_if_present(weights, "module.")  # of CompressAI's script on several GPUs
        model.load_state_dict(weights)
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--init {path} does not fit {name} of these widths: {reason[:300]}") from error
