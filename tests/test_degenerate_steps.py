"""Steps on degenerate Grams in lockstep with the specification, and refreshes that fail."""

import warnings

import pytest
import torch
from comparison import SoapRun, every_implementation, needs_engine
from torch import nn

from soap_opt import SOAP

# ---- lockstep on degenerate Grams -----------------------------------------------------------------------------------------


def degenerate_gradients(kind, step, shape):
    """Gradients of networks in which something is equal, dead, tiny or of low rank."""
    generator = torch.Generator().manual_seed(step)
    rows, columns = shape
    x = torch.randn(shape, generator=generator)
    if kind == "equal rows":
        return x[:1].expand(shape).clone()
    if kind == "rank 1":
        u, v = (torch.randn(n, 1, generator=torch.Generator().manual_seed(n)) for n in shape)
        return u @ v.mT * (1 + step % 3)
    if kind == "dead rows and columns":
        x[rows // 3 :] = 0
        x[:, columns // 2 :] = 0
    elif kind == "a tiny block":
        x[rows // 2 :] *= 1e-21
    elif kind == "one entry":
        x = torch.zeros(shape)
        x[1, 2] = 1.0 + step
    elif kind == "zeros in turn":
        x *= step % 2
    elif kind == "integers":
        x = (2 * x).round()
    return x


@pytest.mark.parametrize("flags", [{"foreach": True}, pytest.param({"fused": True}, marks=needs_engine)])
@pytest.mark.parametrize(
    "kind",
    ["equal rows", "rank 1", "dead rows and columns", "a tiny block", "one entry", "zeros in turn", "integers"],
)
@pytest.mark.parametrize("shape", [(6, 5), (24, 40)], ids=str)
def test_lockstep_where_the_gram_says_something(flags, kind, shape):
    """From the same state the update agrees in the eigenvectors that the Grams determine; in the others G' is rounding, which
    m / sqrt(v) makes as large as everything else. What is finite and orthogonal is so everywhere."""
    options = {"precondition_frequency": 3, "weight_decay": 0.0, "refresh": "together"}
    start = [torch.zeros(shape)]
    reference, tested = SoapRun(start, foreach=False, **options), SoapRun(start, **flags, **options)
    judged = 0
    for step in range(24):
        grad = degenerate_gradients(kind, step + 1, shape)
        state = {key: value.clone() for key, value in reference.state_of(0).items()}
        if state.get("initialized"):
            tested.adopt(0, reference.params[0].detach(), state)
        before = reference.params[0].detach().double()
        reference.step([grad])
        tested.step([grad])
        own = tested.state_of(0)
        assert all(value.isfinite().all() for value in (tested.params[0], *own.values()))
        for key in ("basis_0", "basis_1"):
            q = own[key].double()
            assert (q.mT @ q - torch.eye(len(q))).norm() <= 16 * torch.finfo(torch.float32).eps * len(q) ** 0.5
        for key in ("gram_0", "gram_1"):
            assert (own[key] - reference.state_of(0)[key]).norm() <= 2e-6 * reference.state_of(0)[key].norm() + 1e-37
        if not state.get("initialized"):
            continue
        moved = [run.params[0].detach().double() - before for run in (reference, tested)]
        determined = []
        for k in (0, 1):
            q, gram = state[f"basis_{k}"].double(), state[f"gram_{k}"].double()
            values = (q * (gram @ q)).sum(0)
            determined.append(q[:, values > 100 * len(q) * torch.finfo(torch.float32).eps * values.max()])
        turned = [determined[0].mT @ u @ determined[1] for u in moved]
        # An entry of G' is rounded by max(4, sqrt(d)) eps ||G||: of those above 1e-3 ||G|| less than 1e-3 is rounding, and of
        # what Adam makes of them twice as much. (Smaller ones may be rounding, though their eigenvectors are determined.)
        g = determined[0].mT @ grad.double() @ determined[1]
        sure = (g.abs() > 1e-3 * grad.norm()) if kind != "zeros in turn" else torch.ones_like(g, dtype=torch.bool)
        scale = turned[0].norm() + 1e-12
        assert ((turned[1] - turned[0]) * sure).norm() <= 2e-3 * scale, step
        judged += int(sure.sum())
    assert judged > 20 or kind == "one entry" and judged > 10


# ---- the guard ------------------------------------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("refresh", ["together", "adaptive"])
def test_a_refresh_that_fails_changes_nothing_but_the_count(flags, refresh):
    """A Gram that somebody broke: its unit's basis, m and v stay as a step without refresh leaves them, other units go on."""

    def made(frequency):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in ((6, 5), (4, 3), (40, 7))]
        options = {"refresh": refresh, "precondition_frequency": frequency, **flags}
        optimizer = SOAP([("a", params[0]), ("b", params[1]), ("c", params[2])], **options)
        for step in range(3):
            if step == 2:
                optimizer.param_groups[0]["precondition_frequency"] = 2 if frequency < 100 else frequency
                for p in (params[0], params[2]):
                    optimizer.state[p]["gram_0"][1, 1] = torch.inf
                    for key in ("refresh_offset_0", "refresh_offset_1"):
                        optimizer.state[p][key].zero_()
            for p in params:
                p.grad = torch.randn(p.shape)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
        return params, optimizer, caught

    params, optimizer, caught = made(50)
    stays, without, _ = made(1000)
    assert optimizer.skipped_refreshes() == 2 and optimizer.skipped_refreshes(per_parameter=True) == [1, 0, 1]
    assert optimizer.skipped_steps() == 0
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and "a basis of parameter 0 (a) of shape (6, 5) could not be refreshed" in texts[0]
    for p, q in zip(params, stays):
        assert torch.equal(p, q)
    for i in (0, 2):
        assert torch.equal(optimizer.state[params[i]]["basis_0"], without.state[stays[i]]["basis_0"])
        assert optimizer.state[params[i]]["exp_avg"].isfinite().all()
        # the other mode of the same parameter was refreshed
        assert not torch.equal(optimizer.state[params[i]]["basis_1"], without.state[stays[i]]["basis_1"])
    for p in params:
        p.grad = torch.randn(p.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of one parameter once
        optimizer.step()
        optimizer.step()
    assert optimizer.skipped_refreshes() == 4


@every_implementation
def test_a_qr_that_is_wrong_is_thrown_away(flags, monkeypatch):
    """The guard itself, in PyTorch: whatever QR makes. (In C++ and CUDA nothing makes a wrong Q on purpose; see
    tests/csrc/test_degenerate_grams.py, test_what_is_orthogonal_enough.)"""
    if flags.get("fused"):
        pytest.skip("its QR is compiled")
    right = torch.linalg.qr
    p = nn.Parameter(torch.randn(5, 4))
    optimizer = SOAP([p], precondition_frequency=1, **flags)
    for _ in range(3):
        p.grad = torch.randn(5, 4)
        optimizer.step()
    kept = {key: optimizer.state[p][key].clone() for key in ("basis_0", "basis_1")}
    monkeypatch.setattr(torch.linalg, "qr", lambda x: type(right(x))((right(x).Q * 1.001, right(x).R)))
    p.grad = torch.randn(5, 4)
    with pytest.warns(UserWarning, match="could not be refreshed"):
        optimizer.step()
    assert all(torch.equal(optimizer.state[p][key], value) for key, value in kept.items())
    assert optimizer.skipped_refreshes() == 2
