"""The tests that need a GPU, six pytest processes at a time: a process that an illegal access has ruined ruins no other.

    python -m bench.first_hour.run_tests [--device cpu --quick]

What is listed holds tests that skip only for want of a GPU; the first are those that the others rest on. junit files lie in the
results; what failed is printed with its first line.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .common import make_parser, say_key

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = 6
FUSED = "tests/test_fused_cuda.py"

# name -> files and what to choose of them, in the order in which they start
GROUPS: dict[str, list[str]] = {
    "refresh": ["tests/csrc/test_cuda.py", "-k", "host_waits or graph_capture or many_matrices"],
    "operator": ["tests/csrc/test_refresh_basis.py", "-k", "cuda"],
    "float32": [FUSED, "-k", "lockstep and dtype0"],
    "waiting": [FUSED, "-k", "wait_for_the_device or same_to_the_bit or unusable or grad_scaler"],
    "overlap": ["tests/test_overlap.py", FUSED, "-k", "on_a_gpu or behind_the_next"],
    "graphs": [FUSED, "-k", "cuda_graph"],
    "bfloat16": [FUSED, "-k", "lockstep and dtype1"],
    "float16": [FUSED, "-k", "lockstep and dtype2"],
    "groups": [FUSED, "-k", "param_groups_step or several_dtypes or high_precision or taken_where"],
    "functional": ["tests/test_functional.py", "-k", "cuda"],
    "parity": ["tests/test_parity.py", "-k", "cuda"],
    "conventions": [
        "tests/test_conventions.py", "tests/test_guard.py", "tests/test_soap.py", "tests/test_eigenbasis.py", "-k", "cuda",
    ],
    "compiled": [FUSED, "-k", "compiled_step"],
}  # fmt: skip
QUICK_GROUPS = ("refresh", "overlap")


@dataclass
class Group:
    """A pytest process, from its place in the queue to its end."""

    name: str
    arguments: list[str]
    junit: Path
    process: subprocess.Popen | None = None
    seconds: float = 0.0
    stopped: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def start(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        log = self.junit.with_suffix(".log").open("w")
        self.process = subprocess.Popen(
            [*command, f"--junitxml={self.junit}", *self.arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        self.seconds = time.monotonic()

    def stop(self) -> None:
        """As Ctrl-C does, upon which pytest writes its junit file; a process that the GPU keeps waiting is killed."""
        self.stopped = True
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def end(self) -> None:
        self.seconds = time.monotonic() - self.seconds
        if self.junit.exists():
            read(self)

    def __str__(self) -> str:
        said = ", ".join(f"{number} {what}" for what, number in self.counts.items() if number)
        how = "stopped" if self.stopped else f"exit status {self.process.returncode}" if self.process else "not begun"
        return f"{self.name}: {said or 'no results'} ({how}, {self.seconds:.0f} s)"


def read(group: Group) -> None:
    """Counts and failures from the junit file."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(group.junit).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        if problem is not None:
            counts["failed"] += 1
            message = (problem.get("message") or "").strip().splitlines()
            group.failures.append(f"{case.get('name')}: {message[0][:200] if message else problem.tag}")
        elif any(child.tag == "skipped" for child in case):
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    group.counts = counts


def run(groups: list[Group], deadline: float) -> None:
    """Six at a time until the deadline; then the rest is stopped."""
    queue, running = list(groups), []
    while queue or running:
        for group in running:
            late = time.monotonic() > deadline
            if late and group.process.poll() is None:
                group.stop()
            if group.process.poll() is not None:
                group.end()
                print(group, flush=True)
        running = [group for group in running if group.process.returncode is None]
        if time.monotonic() > deadline:
            queue = []
        while queue and len(running) < AT_ONCE:
            running.append(queue.pop(0))
            running[-1].start()
        time.sleep(0.1)


def failures(groups: list[Group]) -> Iterator[str]:
    for group in groups:
        for failure in group.failures:
            yield f"{group.name}: {failure}"


def main() -> int:
    parser = make_parser("run_tests", __doc__)
    arguments = parser.parse_args()
    folder = arguments.results / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    names = QUICK_GROUPS if arguments.quick else GROUPS
    groups = [Group(name, GROUPS[name], (folder / f"{name}.xml").resolve()) for name in names]
    run(groups, time.monotonic() + arguments.seconds)
    for line in failures(groups):
        print(f"FAILED {line}")
    total = {what: sum(group.counts.get(what, 0) for group in groups) for what in ("passed", "failed", "skipped")}
    unfinished = [group.name for group in groups if not group.counts]
    said = ", ".join(f"{number} {what}" for what, number in total.items())
    say_key(said + (f"; without results: {', '.join(unfinished)}" if unfinished else ""))
    return 1 if total["failed"] or unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
