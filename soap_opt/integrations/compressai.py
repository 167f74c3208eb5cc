"""``import soap_opt.integrations.compressai`` puts "SOAP" into CompressAI's optimizer registry.

>>> import soap_opt.integrations.compressai
>>> from compressai.optimizers import net_aux_optimizer
>>> conf = {"net": {"type": "SOAP", "lr": 1e-3}, "aux": {"type": "Adam", "lr": 1e-3}}
>>> optimizers = net_aux_optimizer(net, conf)  # doctest: +SKIP

``net_aux_optimizer`` keeps the entropy bottlenecks' ``.quantiles`` apart; they stay with the auxiliary Adam.

:func:`latents` tells :class:`soap_opt.diagnostics.OutlierMeter` where to find a model's y and z.
"""

from __future__ import annotations

from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.registry import register_optimizer
from torch import nn

from soap_opt.soap import SOAP

register_optimizer("SOAP")(SOAP)


def latents(model: nn.Module) -> dict[str, dict[str, str]]:
    """Where the latents are, for :class:`~soap_opt.diagnostics.OutlierMeter`: ``OutlierMeter(net, **latents(net))``.

    y is the output of ``g_a`` where the model has one, as all of CompressAI's image models do, else the input of its only
    Gaussian conditional (for a model that codes y in slices, the meter then sees y slice by slice). z is the input of the
    entropy bottleneck, if y has a Gaussian conditional: in a factorized prior the bottleneck's input is y itself. Where a
    model has several of a kind, each is called after its module, "z (name)".
    """
    matching = [
        [name for name, module in model.named_modules() if isinstance(module, kind)]
        for kind in (GaussianConditional, EntropyBottleneck)
    ]
    conditionals, bottlenecks = matching
    outputs = {"y": "g_a"} if isinstance(getattr(model, "g_a", None), nn.Module) else {}
    inputs: dict[str, str] = {}
    for label, names in (("y", [] if outputs else conditionals), ("z" if conditionals else "y", bottlenecks)):
        if not (label == "y" and outputs):
            inputs |= {label if len(names) == 1 else f"{label} ({name})": name for name in names}
    return {"outputs": outputs, "inputs": inputs}
