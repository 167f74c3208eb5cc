"""basis_health against what is known of a basis: eigenvectors, a basis that was spoilt, spectra with a known rank."""

import csv
import math

import pytest
import torch
from comparison import random_basis, random_gradients, random_params
from small_model import assert_unchanged, snapshot
from torch import nn

from soap_opt import SOAP
from soap_opt.diagnostics import basis_health
from soap_opt.eigenbasis import gram_times_basis, off_diagonal_share

SHAPES = [(8, 3, 5, 5), (6, 4), (7,), (), (1, 9)]
NUMBERS = ("orthogonality", "off_diagonal", "largest", "smallest", "condition", "effective_rank")


def trained(steps, shapes=SHAPES, **options):
    params = [nn.Parameter(p) for p in random_params(shapes, dtype=options.pop("dtype", torch.float32))]
    optimizer = SOAP(params, **options)
    for grads in random_gradients(shapes, steps):
        for param, grad in zip(params, grads):
            param.grad = grad.to(param.dtype)
        optimizer.step()
    return params, optimizer


def has_numbers(row):
    return not any(math.isnan(row[name]) for name in NUMBERS)


def test_rows_before_and_during_training():
    expected = [
        ("0", 0, 8),
        ("0", 1, 3),
        ("0", 2, 5),
        ("0", 3, 5),
        ("1", 0, 6),
        ("1", 1, 4),
        ("2", 0, 7),
        ("4", 0, 1),
        ("4", 1, 9),
    ]
    for steps in (0, 1, 4):
        params, optimizer = trained(steps)
        before = snapshot(optimizer)
        table = basis_health(optimizer)
        assert_unchanged(optimizer, before)
        assert [(row["parameter"], row["mode"], row["size"]) for row in table] == expected
        for row in table:
            preconditioned = row["parameter"] != "2" and row["size"] > 1
            assert row["basis"] == ("no" if not preconditioned else "yes" if steps else "later")
            assert has_numbers(row) == (row["basis"] == "yes") and row["step"] == max(0, steps - 1)
            assert ((row["parameter"], row["mode"]) in table.spectra) == has_numbers(row)
    assert table[0]["shape"] == "8x3x5x5"


def test_eigenvectors_of_a_first_gram():
    params, optimizer = trained(1, dtype=torch.float64)
    table = basis_health(optimizer)
    for row in filter(has_numbers, table):
        gram = optimizer.state[params[int(row["parameter"])]][f"gram_{row['mode']}"]
        want = torch.linalg.eigvalsh(gram).flip(0)
        torch.testing.assert_close(table.spectra[row["parameter"], row["mode"]], want, atol=1e-14, rtol=1e-12)
        assert row["off_diagonal"] < 1e-12 and row["orthogonality"] < 1e-12
        assert row["largest"] == pytest.approx(float(want[0]))
        shares = want.clamp(min=0) / want.clamp(min=0).sum()
        assert row["effective_rank"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares.tolist() if p > 0)))


def test_later_bases_are_judged_as_refreshes_judge_them():
    params, optimizer = trained(6, precondition_frequency=100)
    for row in filter(has_numbers, basis_health(optimizer)):
        state = optimizer.state[params[int(row["parameter"])]]
        gram, basis = state[f"gram_{row['mode']}"].double(), state[f"basis_{row['mode']}"].double()
        assert row["off_diagonal"] == pytest.approx(float(off_diagonal_share(basis, *gram_times_basis(gram, basis))), rel=1e-4)
        assert row["off_diagonal"] > 0.01  # nothing was refreshed
        assert row["orthogonality"] < 1e-5
        assert row["condition"] == pytest.approx(row["largest"] / row["smallest"])


def test_spoilt_bases_and_known_spectra():
    (param,), optimizer = trained(1, [(6, 4)])
    state = optimizer.state[param]
    state["basis_0"].copy_(random_basis(6) * 1.1)
    state["gram_0"].copy_(3 * torch.eye(6))
    x = torch.randn(4)
    state["gram_1"].copy_(torch.outer(x, x))
    state["basis_1"].copy_(torch.linalg.eigh(state["gram_1"].double()).eigenvectors)
    scaled, rank_one = basis_health(optimizer)
    assert scaled["orthogonality"] == pytest.approx(0.21 * 6**0.5, rel=1e-4)
    assert scaled["effective_rank"] == pytest.approx(6, rel=1e-5) and scaled["condition"] == pytest.approx(1, rel=1e-5)
    assert scaled["off_diagonal"] < 1e-6 and scaled["largest"] == pytest.approx(3 * 1.21, rel=1e-5)
    assert rank_one["effective_rank"] == pytest.approx(1, abs=1e-3) and rank_one["condition"] > 1e4
    state["gram_1"].zero_()
    zeros = basis_health(optimizer)[1]
    assert zeros["off_diagonal"] == 0 and math.isnan(zeros["condition"]) and math.isnan(zeros["effective_rank"])
    state["gram_1"].fill_(math.nan)
    assert math.isnan(basis_health(optimizer)[1]["off_diagonal"])


def test_tiny_gradients():
    shapes = [(5, 5)]  # full rank: in a null space any basis is right
    rows = []
    for scale in (1.0, 1e-10):
        param = nn.Parameter(random_params(shapes)[0])
        optimizer = SOAP([param])
        for (grad,) in random_gradients(shapes, 3):
            param.grad = grad * scale
            optimizer.step()
        rows.append(basis_health(optimizer))
    for one, other in zip(*rows):
        for name in ("off_diagonal", "condition", "effective_rank"):
            assert other[name] == pytest.approx(one[name], rel=1e-2, abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"merge_dims": True, "max_precond_dim": 30}, [(24, "yes"), (25, "yes")]),
        ({"max_precond_dim": 5}, [(8, "no"), (3, "yes"), (5, "yes"), (5, "yes")]),
    ],
    ids=str,
)
def test_modes_of_the_merged_view(options, sizes):
    _, optimizer = trained(2, [(8, 3, 5, 5)], **options)
    assert [(row["size"], row["basis"]) for row in basis_health(optimizer)] == sizes


def test_a_first_gradient_of_zeros_leaves_no_basis():
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = SOAP([param])
    param.grad = torch.zeros(3, 2)
    optimizer.step()
    assert {row["basis"] for row in basis_health(optimizer)} == {"later"}


def test_lazy_parameters_are_left_out():
    net = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    assert {row["parameter"] for row in basis_health(SOAP(net.parameters()), net)} == {"1.weight", "1.bias"}


def test_names_table_and_csv(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    optimizer = SOAP(net.parameters())
    net(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    table = basis_health(optimizer, net)
    assert list(dict.fromkeys(table.column("parameter"))) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(dict.fromkeys(basis_health(optimizer).column("parameter"))) == ["0", "1", "2", "3"]
    named = SOAP(net.named_parameters())
    assert list(dict.fromkeys(basis_health(named).column("parameter"))) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert str(table).splitlines()[0].split() == table.columns and "0.weight" in str(table)
    table.to_csv(tmp_path / "bases.csv")
    with open(tmp_path / "bases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(table) and float(rows[0]["largest"]) == table[0]["largest"] and rows[2]["largest"] == "nan"


def test_misuse():
    param = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(TypeError, match="looks at soap_opt.SOAP, got Adam"):
        basis_health(torch.optim.Adam([param]))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module or None, got int"):
        basis_health(SOAP([param]), 3)
