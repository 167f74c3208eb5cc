"""Who is compared: soap_opt's implementations, other SOAPs, Adam, Muon; in this interpreter or in one of their own."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .models import MAX_PRECOND_DIM, Problem
from .worker import Stepper, versions

# Threads that have just run a parallel region spin for a moment before they sleep; two processes that take turns on the
# same cores wait that long before each other's steps. (libgomp: some milliseconds.)
SETTLE_SECONDS = 0.01

SOAP_OPTIONS = {"lr": 3e-3, "betas": (0.95, 0.95), "weight_decay": 0.01, "precondition_frequency": 10}


@dataclass(frozen=True)
class Contestant:
    """An optimizer under test.

    Attributes:
        name: in tables.
        kind: "ours", "reference" (the original SOAP or what stands for it), "peer" (an installed SOAP) or "other".
        target, options, matrices_only, setup: as for :class:`worker.Stepper`.
        python: the interpreter that runs it, None for this one.
    """

    name: str
    kind: str
    target: str
    options: dict[str, Any] = field(default_factory=dict)
    matrices_only: bool = False
    setup: dict[str, Any] = field(default_factory=dict)
    python: str | None = None

    def applies_to(self, problem: Problem) -> bool:
        """An optimizer of matrices alone is compared where they are nearly everything."""
        matrices = sum(p.numel() for p in problem.params if p.dim() == 2)
        return not self.matrices_only or matrices > 0.9 * problem.numel

    def stepper(self, problem: Problem) -> Stepper | RemoteStepper:
        if self.python is not None:
            return RemoteStepper(self, problem)
        return Stepper(problem.params, problem.grads, self.target, self.options, self.matrices_only, self.setup)


def _soap_opt(name: str, **options: Any) -> Contestant:
    return Contestant(f"soap_opt {name}", "ours", "soap_opt:SOAP", {**SOAP_OPTIONS, **options})


# The first is the one that the others are compared with. fused and foreach are explicit: what is measured is what is named.
OURS = (
    _soap_opt("fused", fused=True),
    _soap_opt("fused, together", fused=True, refresh="together"),
    _soap_opt("multi tensor", foreach=True),
    _soap_opt("multi tensor, together", foreach=True, refresh="together"),
    _soap_opt("single tensor", foreach=False),
)
STRAIGHTFORWARD = Contestant("bench/reference.py", "reference", "bench.reference:ReferenceSOAP", SOAP_OPTIONS)
INSTALLED = (Contestant("pytorch_optimizer SOAP", "peer", "pytorch_optimizer:SOAP", SOAP_OPTIONS),)
OTHERS = (
    Contestant("Adam foreach", "other", "torch.optim:Adam", {"foreach": True}),
    Contestant("Adam fused", "other", "torch.optim:Adam", {"fused": True}),
    Contestant("Muon (2-D only)", "other", "torch.optim:Muon", matrices_only=True),
)

# Peers that usually need an interpreter of their own: target, options, setup. HeavyBall compiles its elementwise passes at
# first use; with compile_mode="default" a step is no quicker here (README.md) and the first one takes 44 s for a small model.
KNOWN_PEERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "heavyball": (
        "heavyball:SOAP",
        {**SOAP_OPTIONS, "max_precond_dim": MAX_PRECOND_DIM, "merge_dims": False},
        {"heavyball.utils:compile_mode": None},
    ),
}


def parse_peer(text: str) -> Contestant:
    """``NAME=PYTHON[@MODULE:CLASS[@JSON]]`` -> a contestant that runs in the interpreter PYTHON.

    MODULE:CLASS may be left out for the names in KNOWN_PEERS; JSON replaces the class's options.
    """
    name, _, rest = text.partition("=")
    python, *target = rest.split("@", 2)
    if not python or (not target and name not in KNOWN_PEERS):
        raise ValueError(f"--peer {text}: expected NAME=PYTHON@MODULE:CLASS, or NAME=PYTHON with NAME in {list(KNOWN_PEERS)}")
    if shutil.which(python) is None:
        raise ValueError(f"--peer {text}: there is no interpreter {python}")
    known = KNOWN_PEERS.get(name, ("", SOAP_OPTIONS, {}))
    options = json.loads(target[1]) if len(target) > 1 else known[1]
    label = f"{name} SOAP" if not target else name
    return Contestant(label, "peer", target[0] if target else known[0], options, setup=known[2], python=python)


def parse_reference(text: str) -> Contestant:
    """``path/to/soap.py:CLASS`` -> a contestant: an implementation that takes the original's arguments."""
    path, _, name = text.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"--reference {text}: expected path/to/file.py:CLASS")
    if f"class {name}" not in Path(path).read_text():
        raise ValueError(f"--reference {text}: {path} has no class {name}")
    return Contestant("original SOAP", "reference", text, SOAP_OPTIONS)


class RemoteStepper:
    """:class:`worker.Stepper` in another interpreter: one answer for each question, so that interleaving stays as it is."""

    def __init__(self, contestant: Contestant, problem: Problem) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="bench-")
        problem_file, contestant_file = (Path(self.directory.name, name) for name in ("problem.pt", "contestant.json"))
        torch.save({"params": problem.params, "grads": problem.grads}, problem_file)
        arguments = {"threads": torch.get_num_threads(), **dataclasses.asdict(contestant)}
        for name in ("name", "kind", "python"):
            del arguments[name]
        contestant_file.write_text(json.dumps(arguments))
        worker = Path(__file__).with_name("worker.py")
        self.process = subprocess.Popen(
            [contestant.python, worker, problem_file, contestant_file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = contestant.name
        self.versions = self._answer()

    def step(self, k: int) -> float:
        """Milliseconds of one step on the k-th gradients, by the other process's own clock."""
        time.sleep(SETTLE_SECONDS)
        milliseconds = self._ask("step", k)
        time.sleep(SETTLE_SECONDS)
        return milliseconds

    def memory(self) -> dict[str, int]:
        return self._ask("memory")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.directory.cleanup()

    def _ask(self, *question: Any) -> Any:
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of {self.name} ended with status {self.process.wait()}; its last words are above")
        return json.loads(line)


def peer_versions(contestants: list[Contestant], steppers: dict[str, Any]) -> str:
    """What runs elsewhere, and which version it is of: 'heavyball 3.2.1, torch 2.14.1'."""
    found: dict[str, None] = {}
    for contestant in contestants:
        stepper = steppers.get(contestant.name)
        known = stepper.versions if isinstance(stepper, RemoteStepper) else versions(contestant.target)
        for package, version in known.items():
            found[f"{package} {version}"] = None
    return ", ".join(found)
