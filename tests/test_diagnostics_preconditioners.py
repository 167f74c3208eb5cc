"""The preconditioners of ConflictMeter against steps without momentum."""

import pytest
import torch
from torch import nn

from soap_opt import SOAP
from soap_opt.diagnostics import ConflictMeter, preconditioner_of


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"foreach": True}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.Adam, {"amsgrad": True, "fused": True}),
        (torch.optim.Adam, {"maximize": True}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.Adam, {"lr": torch.tensor(0.5)}),
        (SOAP, {"maximize": True}),
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"maximize": True}),
    ],
    ids=str,
)
def test_preconditioners_are_what_a_step_without_momentum_moves_by(kind, options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
    betas = {} if kind is torch.optim.SGD else {"betas": (0.0, 0.9)}
    optimizer = kind(params, **{"lr": 0.5, "weight_decay": 0.0, **betas, **options})
    for k in range(4):
        for param in params:
            param.grad = torch.randn_like(param) / 2**k  # so that amsgrad's maximum is not the last
            param.data.zero_()
        optimizer.step()
    updates = preconditioner_of(optimizer)([param.grad for param in params])
    for param, update in zip(params, updates):
        torch.testing.assert_close(-0.5 * update, param.detach(), rtol=1e-5, atol=1e-7)


def test_no_second_moment_no_update():
    param = nn.Parameter(torch.ones(3))
    for optimizer in (torch.optim.AdamW([param]), SOAP([param])):
        assert preconditioner_of(optimizer)([torch.ones(3)]) == [None]


def test_other_optimizers_need_a_function():
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="no preconditioner of RMSprop is known"):
        ConflictMeter(torch.optim.RMSprop([param]))
    meter = ConflictMeter(torch.optim.RMSprop([param]), every=1, preconditioner=lambda grads: [2 * grads[0]])
    meter.measure(param[0], param[:2].sum())
    param.sum().backward()
    meter.optimizer.step()
    assert meter.records[0]["preconditioned"] == pytest.approx(0.5**0.5)
