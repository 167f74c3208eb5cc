"""One optimizer on one problem, stepped on demand; as a program, for another interpreter, it serves that over a pipe.

    path/to/python bench/worker.py PROBLEM.pt CONTESTANT.json      (started by peers.RemoteStepper)

This file imports nothing but torch and the standard library, so that an interpreter without soap_opt can run it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Stepper:
    """An optimizer on its own copy of the parameters.

    Args:
        params: initial parameters; copied.
        grads: [batches][params] gradients, shared with other steppers and never written.
        target: "package.module:Class" or "path/to/file.py:Class".
        options: keyword arguments of the class.
        matrices_only: step only the 2-D parameters (torch.optim.Muon takes no others).
        setup: "package.module:NAME" -> value, set before the class is made (a package's global switches).
    """

    def __init__(
        self,
        params: list[Tensor],
        grads: list[list[Tensor]],
        target: str,
        options: dict[str, Any],
        matrices_only: bool = False,
        setup: dict[str, Any] | None = None,
    ) -> None:
        for place, value in (setup or {}).items():
            module, name = place.split(":")
            setattr(importlib.import_module(module), name, value)
        used = [i for i, p in enumerate(params) if p.dim() == 2 or not matrices_only]
        self.params = [torch.nn.Parameter(params[i].clone()) for i in used]
        self.grads = [[batch[i] for i in used] for batch in grads]
        self.versions = [[grad._version for grad in batch] for batch in self.grads]
        self.optimizer = load(target)(self.params, **options)

    def step(self, k: int) -> float:
        """Milliseconds of ``optimizer.step()`` on the k-th gradients, which are taken in turn."""
        batch = k % len(self.grads)
        for p, grad in zip(self.params, self.grads[batch]):
            p.grad = grad
        gc.disable()  # as timeit does: a collection walks everybody's objects and lands on whoever comes next
        start = time.perf_counter()
        self.optimizer.step()
        elapsed = time.perf_counter() - start
        gc.enable()
        if self.versions[batch] != [grad._version for grad in self.grads[batch]]:
            raise RuntimeError(f"{type(self.optimizer)} wrote to its gradients, which others share")
        return 1e3 * elapsed

    def memory(self) -> dict[str, int]:
        """Bytes of optimizer state, and of resident memory: now, and at most since the last call."""
        usage = {"state_bytes": state_bytes(self.optimizer), **resident()}
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        return usage

    def close(self) -> None:
        pass


def load(target: str) -> Any:
    """The object that "package.module:NAME" or "path/to/file.py:NAME" names."""
    place, name = target.rsplit(":", 1)
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the distinct tensors in ``optimizer.state``, in whatever containers they are."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for inner in value.values():
                visit(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                visit(inner)

    visit(dict(optimizer.state))
    return sum(found.values())


def resident() -> dict[str, int]:
    """Resident bytes of this process: now and the high-water mark. (Linux.)"""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(lines[key].split()[0]) for name, key in (("rss", "VmRSS"), ("peak_rss", "VmHWM"))}


def versions(target: str) -> dict[str, str]:
    """Of torch, and of the distribution that a target's package comes from, where there is one."""
    found = {"torch": torch.__version__}
    package = target.split(":")[0].split(".")[0]
    try:
        found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    return found


def serve(problem_file: str, contestant_file: str) -> None:
    """Answer each line of standard input, a JSON list [method, *arguments], with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not get between the answers
    contestant = json.loads(Path(contestant_file).read_text())
    torch.set_num_threads(contestant.pop("threads"))
    problem = torch.load(problem_file)
    stepper = Stepper(problem["params"], problem["grads"], **contestant)
    print(json.dumps(versions(contestant["target"])), file=answers)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(stepper, method)(*arguments)), file=answers)


if __name__ == "__main__":
    # Not bench/, whose files have everyday names; and last, so that another soap_opt of this interpreter is not shadowed
    sys.path[:] = [*sys.path[1:], str(Path(__file__).parent.parent)]
    serve(*sys.argv[1:])
