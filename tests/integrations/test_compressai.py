"""SOAP in CompressAI's optimizer registry, on real CompressAI models."""

import pytest
import torch

pytest.importorskip("compressai")

from compressai.losses import RateDistortionLoss  # noqa: E402
from compressai.models import ScaleHyperprior  # noqa: E402
from compressai.optimizers import net_aux_optimizer  # noqa: E402
from compressai.registry import OPTIMIZERS  # noqa: E402

import soap_opt.integrations.compressai  # noqa: E402, F401
from soap_opt import SOAP  # noqa: E402

CONFIGURATION = {"net": {"type": "SOAP", "lr": 1e-3}, "aux": {"type": "Adam", "lr": 1e-3}}


def test_the_registry_knows_soap():
    assert OPTIMIZERS["SOAP"] is SOAP


def test_net_aux_optimizer_makes_soap_for_the_net_and_adam_for_the_quantiles():
    net = ScaleHyperprior(16, 24)
    optimizers = net_aux_optimizer(net, CONFIGURATION)
    assert type(optimizers["net"]) is SOAP and type(optimizers["aux"]) is torch.optim.Adam
    assert optimizers["net"].param_groups[0]["lr"] == 1e-3
    names = {id(p): name for name, p in net.named_parameters()}
    owned = {names[id(p)] for group in optimizers["net"].param_groups for p in group["params"]}
    assert not any(name.endswith(".quantiles") for name in owned)
    assert {name for name in names.values() if name.endswith(".quantiles")} == {
        names[id(p)] for group in optimizers["aux"].param_groups for p in group["params"]
    }


@pytest.mark.parametrize("named", [False, True])
def test_generators_and_named_parameters(named):
    net = ScaleHyperprior(16, 24)
    optimizer = SOAP(net.named_parameters() if named else (p for p in net.parameters()), lr=1e-3)
    assert len(optimizer.param_groups[0]["params"]) == len(list(net.parameters()))


def test_a_training_step_of_a_real_model_lowers_the_loss():
    torch.manual_seed(0)
    net, criterion = ScaleHyperprior(16, 24), RateDistortionLoss(lmbda=0.013)
    optimizers = net_aux_optimizer(net, {**CONFIGURATION, "net": {"type": "SOAP", "lr": 3e-3}})
    images = torch.rand(4, 3, 64, 64)
    losses = []
    for _ in range(12):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        torch.manual_seed(1)  # the same quantisation noise in every step
        loss = criterion(net(images), images)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizers["net"].step()
        auxiliary = net.aux_loss()
        auxiliary.backward()
        optimizers["aux"].step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and optimizers["net"].skipped_steps() == 0
