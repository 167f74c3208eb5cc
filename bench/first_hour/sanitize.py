"""compute-sanitizer on parts of the smoke: memcheck on launches, steps and refresh, racecheck on the refresh's shared memory.

    python -m bench.first_hour.sanitize [--device cpu --quick]

Side by side, since each takes many times as long as without. Where the tool is missing the key line says so; on a CPU the parts
run as they are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from .common import make_parser, passed_on, say_key

PLACES = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")
# tool, part of the smoke
RUNS = [("memcheck", "refresh"), ("memcheck", "stages"), ("racecheck", "refresh"), ("memcheck", "steps")]
ERRORS = 99  # the exit status that stands for what the tool found


def tool() -> str | None:
    found = shutil.which("compute-sanitizer")
    return found or next((place for place in PLACES if Path(place).exists()), None)


def main() -> int:
    arguments = make_parser("sanitize", __doc__).parse_args()
    sanitizer = tool()
    if sanitizer is None and arguments.device == "cuda":
        say_key("compute-sanitizer is missing here: nothing was checked")
        return 0
    arguments.quick, arguments.results = True, arguments.results / "sanitize"
    # Without PyTorch's cache every tensor is an allocation of its own, so that reading behind its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    started = {}
    for name, part in RUNS[:1] if arguments.device == "cpu" else RUNS:
        wrapper = [sanitizer, "--tool", name, "--error-exitcode", str(ERRORS), "--print-limit", "20"] if sanitizer else []
        command = [*wrapper, sys.executable, "-m", "bench.first_hour.smoke", *passed_on(arguments), "--part", part]
        started[f"{name} {part}"] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    try:
        said, failed = verdicts(started, time.monotonic() + arguments.seconds)
    finally:  # the tool's end is not that of the Python under it, which would keep the GPU busy
        for process in started.values():
            stop(process)
    say_key("; ".join([*said, *([] if sanitizer else ["without compute-sanitizer, which is missing here"])]))
    return 1 if failed else 0


def stop(process: subprocess.Popen) -> None:
    """It and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def verdicts(started: dict[str, subprocess.Popen], end: float) -> tuple[list[str], bool]:
    """What the tool said of each, and whether it found anything."""
    said, failed = [], False
    for name, process in started.items():
        try:
            output, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
            verdict = next(
                (line.strip("= ") for line in output.splitlines() if "SUMMARY" in line), f"exit {process.returncode}"
            )
            failed |= process.returncode != 0
        except subprocess.TimeoutExpired:
            stop(process)
            output = process.communicate()[0]
            errors = sum("Invalid" in line or "hazard" in line for line in output.splitlines())
            verdict, failed = f"out of time, {errors} errors so far", failed or errors > 0
        print(f"\n== {name}\n{output[-20_000:]}")
        said.append(f"{name}: {verdict}")
    return said, failed


if __name__ == "__main__":
    sys.exit(main())
