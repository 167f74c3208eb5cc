"""The bits that the CPU's paths make of a fixed set of runs, as one hash a run: whether a change of the code changed a result.

    python -m bench.same_bits                 compare with bench/results/same_bits.json
    python -m bench.same_bits --write         write that file

Results depend on the processor, on PyTorch and on the number of threads (one here), so that the file holds for one machine:
write it with the code before a change, compare with the code after it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from soap_opt import SOAP

from .results import RESULTS, environment

FILE = RESULTS / "same_bits.json"
STEPS = 24
SHAPES = [(), (7,), (6, 5), (1, 9), (17, 3, 5, 5), (64, 33), (130, 66), (33, 20, 3, 3), (4, 4), (4, 4), (4, 4)]
PATHS: dict[str, dict[str, Any]] = {
    "single-tensor": {"foreach": False},
    "multi-tensor": {"foreach": True},
    "C++ engine": {"fused": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "together": {"refresh": "together"},
    "adaptive": {"refresh": "adaptive", "refresh_tolerance": 0.05, "precondition_frequency": 3},
    "merged": {"merge_dims": True, "max_precond_dim": 64},
    "1-D, normalised": {"precondition_1d": True, "normalize_grads": True},
    "clipped": {"max_grad_norm": 0.5},
    "maximised, uncorrected": {"maximize": True, "correct_bias": False, "eps": 0.0, "shampoo_beta": 0.8},
    "two groups": {"groups": [{"lr": 1e-3}, {"lr": 2e-2, "weight_decay": 0.0, "betas": (0.8, 0.9)}]},
    "many groups": {"groups": [{"lr": 1e-3 * (i + 1)} for i in range(len(SHAPES))]},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def run(path: dict[str, Any], options: dict[str, Any], dtype: torch.dtype) -> str:
    """The hash of all parameters and all state after STEPS steps, some of them without, or with unusable, gradients."""
    options = dict(options)
    groups = options.pop("groups", [{}])
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]
    dealt = [{"params": params[k :: len(groups)], **group} for k, group in enumerate(groups)]
    optimizer = SOAP(dealt, lr=1e-2, **options, **path)
    for step in range(STEPS):
        for place, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(dtype)
            if (step + place) % 7 == 3:
                grad.zero_()
            if step == 5 and place == 4:
                grad.fill_(float("nan"))
            param.grad = None if (step + 2 * place) % 11 == 10 else grad
        if step == STEPS // 2:
            state = optimizer.state_dict()
            optimizer = SOAP(dealt, lr=1e-2, **options, **path)
            optimizer.load_state_dict(state)
        optimizer.step()
    digest = hashlib.sha256()
    for param in params:
        for key, value in [("param", param.detach()), *sorted(optimizer.state[param].items())]:
            digest.update(f"{key} {value.dtype} {tuple(value.shape)} {value.stride()} ".encode() + raw(value))
    return digest.hexdigest()[:24]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def all_runs() -> dict[str, str]:
    found = {}
    for path, flags in PATHS.items():
        for name, options in OPTIONS.items():
            for dtype in DTYPES if name == "default" else ("float32",):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of the gradient that is not usable
                    found[f"{path}, {name}, {dtype}"] = run(flags, options, DTYPES[dtype])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.same_bits", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} instead of comparing with it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = {name: value for name, value in environment().items() if name in ("device", "torch")}
    found = all_runs()
    if arguments.write:
        FILE.write_text(json.dumps({"about": about, "runs": found}, indent=1) + "\n")
        return 0
    known = json.loads(FILE.read_text())
    if known["about"] != about:
        print(f"{FILE.name} is of {known['about']}, this is {about}: bits may differ for that alone")
    changed = [name for name, digest in found.items() if known["runs"].get(name) != digest]
    print(f"{len(found) - len(changed)} of {len(found)} runs have the same bits" + "".join(f"\n  not: {n}" for n in changed))
    return 1 if changed or known["runs"].keys() != found.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
