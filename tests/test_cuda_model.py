"""The counts that the launch plan must reach, and that the table in bench/results is of this plan."""

import csv
from pathlib import Path

import pytest

cuda_model = pytest.importorskip("bench.cuda_model")
RESULTS = Path(__file__).parent.parent / "bench" / "results" / "cuda_model.csv"


def committed(model: str) -> list[dict[str, str]]:
    with RESULTS.open() as file:
        return [row for row in csv.DictReader(file) if row["model"] == model]


@pytest.mark.parametrize(("model", "tensor_bytes", "launches"), [("bmshj2018-hyperprior q3", 92, 7), ("GPT-2 small", 64, 5)])
def test_counts_of_named_models(model, tensor_bytes, launches):
    if "hyperprior" in model:
        pytest.importorskip("compressai")
    rows = cuda_model.model(model, cuda_model.MODELS[model]())
    total = next(row for row in rows if row["implementation"] == "soap_opt" and row["launch"] == "all")
    assert total["launches"] == launches
    assert total["flops_per_2.5U"] <= 1.25
    assert total["tensor_bytes_per_parameter"] <= tensor_bytes
    original = next(row for row in rows if row["implementation"] == "original SOAP")
    assert original["launches"] > 100 * launches and original["bytes"] > 2.5 * total["bytes"]
    for row, line in zip(rows, committed(model)):
        for key in ("implementation", "launch", "launches", "flops", "bytes"):
            assert str(row[key]) == line[key], "python -m bench.cuda_model writes the table anew"
