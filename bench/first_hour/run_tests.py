"""The tests that need a GPU, six pytest processes at a time: a process that an illegal access has ruined ruins no other.

    python -m bench.first_hour.run_tests [--device cpu --quick]

What is listed holds tests that skip only for want of a GPU; the first are those that the others rest on. junit files and logs
lie in the results; what failed is printed with its first line. A group that was stopped, or not begun, is unfinished: the key
line names it, with the test that it was in.
"""

from __future__ import annotations

import re
import signal
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .common import deadline, make_parser, say_key
from .side_by_side import Part, kill, none_left_behind, still_running, wait_for

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
        "tests/test_around_a_step.py", "tests/test_guard.py", "tests/test_state.py", "tests/test_eigenbasis.py", "-k", "cuda",
    ],
    "compiled": [FUSED, "-k", "compiled_step"],
}  # fmt: skip
QUICK_GROUPS = ("refresh", "overlap")


# With -v the log names the test that runs, and what became of those before it
PYTEST = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "bench.first_hour.pytest_plugin"]
VERDICT = re.compile(r"^(\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.M)
BEGUN = re.compile(r"^(?:\S+/)?(\w+\.py::.+?)\s*$", re.M)
COUNTED_AS = {"PASSED": "passed", "XPASS": "passed", "SKIPPED": "skipped", "XFAIL": "skipped"}
GRACE = 4.0  # seconds for all groups that were interrupted to write their junit files


@dataclass
class Group(Part):
    """A pytest process, from its place in the queue to its end."""

    junit: Path = Path()
    began: float = 0.0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    at: str = ""  # the test during which it was stopped

    def start(self) -> None:
        super().start()
        self.began = time.monotonic()

    def end(self) -> None:
        self.seconds = time.monotonic() - self.began
        try:
            read(self)
        except (OSError, ElementTree.ParseError):  # it was killed, or ended otherwise before it wrote one
            read_log(self)
        if self.code not in (0, 1):
            begun = BEGUN.findall(VERDICT.sub("", self.output))
            self.at = begun[-1] if begun else ""

    @property
    def finished(self) -> bool:
        """Whether all its tests ran: pytest's other exit statuses are interruptions, errors of its own and no tests at all."""
        return not self.stopped and self.code in (0, 1)

    @property
    def how(self) -> str:
        how = "not begun" if self.process is None else "stopped" if self.stopped else f"exit status {self.code}"
        return f"{how} in {self.at}" if self.at else how

    def __str__(self) -> str:
        said = ", ".join(f"{number} {what}" for what, number in self.counts.items() if number)
        return f"{self.name}: {said or 'no results'} ({self.how}, {self.seconds:.0f} s)"


def group_of(name: str, folder: Path) -> Group:
    junit = (folder / f"{name}.xml").resolve()
    command = [*PYTEST, f"--junitxml={junit}", *GROUPS[name]]
    return Group(name, command, junit.with_suffix(".log"), directory=ROOT, junit=junit)


def read(group: Group) -> None:
    """Counts and failures from the junit file."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(group.junit).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        if problem is not None:
            counts["failed"] += 1
            message = (problem.get("message") or "").strip().splitlines()
            group.failures.append(f"{case.get('name')}: {message[0][:200] if message else problem.tag}")
        elif not case.get("name"):
            pass  # what pytest writes of a test that it was interrupted in
        elif any(child.tag == "skipped" for child in case):
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    group.counts = counts


def read_log(group: Group) -> None:
    """The same from what pytest printed, which does not say yet why a test failed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for test, verdict in VERDICT.findall(group.output):
        what = COUNTED_AS.get(verdict, "failed")
        counts[what] += 1
        if what == "failed":
            group.failures.append(f"{test.split('::', 1)[1]}: pytest ended before it said why")
    group.counts = counts


def interrupt(groups: list[Group]) -> None:
    """As Ctrl-C does, upon which pytest writes its junit file; processes that the GPU keeps waiting are killed."""
    for group in groups:
        group.stopped = True
        group.process.send_signal(signal.SIGINT)
    wait_for(groups, time.monotonic() + GRACE)
    kill(groups)


def ended(running: list[Group]) -> list[Group]:
    """Say what came of those that have ended; the others."""
    still = still_running(running)
    for group in running:
        if group not in still:
            group.end()
            print(group, flush=True)
    return still


def run(groups: list[Group], deadline: float) -> None:
    """Six at a time until the deadline; then those that run are stopped, all at once, and the rest is not begun."""
    # Who was started in the background of a script ignores SIGINT, and so would all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    queue, running = list(groups), []
    with none_left_behind(groups):
        while (queue or running) and time.monotonic() < deadline:
            while queue and len(running) < AT_ONCE:
                running.append(queue.pop(0))
                running[-1].start()
            time.sleep(0.1)
            running = ended(running)
        interrupt(running)
        for group in running:
            group.end()
            print(group, flush=True)


def failures(groups: list[Group]) -> Iterator[str]:
    for group in groups:
        for failure in group.failures:
            yield f"{group.name}: {failure}"


def main() -> int:
    parser = make_parser("run_tests", __doc__)
    arguments = parser.parse_args()
    folder = arguments.results / "tests"
    names = QUICK_GROUPS if arguments.quick else GROUPS
    groups = [group_of(name, folder) for name in names]
    run(groups, deadline(arguments))
    for line in failures(groups):
        print(f"FAILED {line}")
    total = {what: sum(group.counts.get(what, 0) for group in groups) for what in ("passed", "failed", "skipped")}
    unfinished = [f"{group.name} ({group.how})" for group in groups if not group.finished]
    said = ", ".join(f"{number} {what}" for what, number in total.items())
    say_key(said + (f"; UNFINISHED: {', '.join(unfinished)}" if unfinished else ""))
    return 1 if total["failed"] or unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
