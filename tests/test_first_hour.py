"""bench/first_hour.sh in its dry mode, and what of its stages can be judged without a GPU."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from _pytest.mark.expression import Expression

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from bench.first_hour import common, in_turn, pytest_plugin, run_tests, sanitize, smoke  # noqa: E402
from bench.first_hour.gradients import recorded  # noqa: E402
from bench.first_hour.kernel_times import Event, by_launch, others  # noqa: E402
from bench.first_hour.training import whole  # noqa: E402

pytest.importorskip("triton")
STAGES = ["unpack", "build", "report", "smoke", "tests", "steps", "profile", "sweep", "sanitizer", "training"]


def run(command, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("OUT", "TRITON_INTERPRET")}
    return subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_the_dry_mode_runs_every_stage(tmp_path):
    """Minutes where nothing stands in Triton's cache yet, one and a half where it does."""
    done = run(["bash", "bench/first_hour.sh", "--dry"], OUT=str(tmp_path / "out"), FIRST_HOUR_PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    verdicts = dict(
        re.findall(
            r"^(\w+): (ok|FAILED|OUT OF TIME) \(exit \d+, [\d.]+ of \d+ s, -?\d+ kernels new in the cache\)", summary, re.M
        )
    )
    assert verdicts == dict.fromkeys(STAGES, "ok"), done.stdout
    assert done.stdout.rstrip().endswith(summary.rstrip())
    smoke = next(line for line in summary.splitlines() if line.startswith("smoke: "))
    assert set(re.findall(r"(\d+) misses", smoke)) == {"0"}, "what the stage build compiled is not what steps launch"
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8 and {path.name for path in files} == {"summary.txt", "results.tar.gz"}
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    assert {f"logs/{stage}.log" for stage in STAGES} <= names
    assert {"cuda_steps.csv", "cuda_kernels.csv", "cuda_sweep.csv", "cuda_training.csv", "smoke_steps.csv"} <= names


def test_a_stage_that_fails_or_hangs_stops_nothing(tmp_path):
    """Without a Python at all, every stage fails, and says so."""
    done = run(["bash", "bench/first_hour.sh", "--dry"], OUT=str(tmp_path), FIRST_HOUR_PYTHON="false")
    assert done.returncode == 0
    summary = (tmp_path / "summary.txt").read_text()
    assert re.findall(r"^(\w+): FAILED \(exit 1,", summary, re.M) == STAGES


def script(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
    return str(path)


def test_a_stage_is_told_when_to_end(tmp_path):
    """Ten seconds before its limit, which is what is left of the whole."""
    python = script(tmp_path / "python", 'echo "key: $((${FIRST_HOUR_UNTIL%.*} - $(date +%s))) s"')
    command = ["bash", "bench/first_hour.sh", "--dry", "smoke"]
    run(command, OUT=str(tmp_path / "out"), FIRST_HOUR_PYTHON=python, FIRST_HOUR_SECONDS="60")
    said = re.search(r"^smoke: ok .* of (\d+) s, .* (\d+) s$", (tmp_path / "out" / "summary.txt").read_text(), re.M)
    limit, own = map(int, said.groups())
    assert 40 <= limit <= 53 and limit - 12 <= own <= limit - 9  # (seconds are cut off in two places)


@pytest.mark.slow
def test_the_whole_ends_in_time(tmp_path):
    """The first stage hangs until nothing is left; what it said is kept, and the others are named."""
    python = script(tmp_path / "python", "echo begun\nsleep 60")
    began = time.monotonic()
    command = ["bash", "bench/first_hour.sh", "--dry"]
    done = run(command, OUT=str(tmp_path / "out"), FIRST_HOUR_PYTHON=python, FIRST_HOUR_SECONDS="16")
    assert time.monotonic() - began < 16
    lines = done.stdout.split("== summary\n")[1].splitlines()
    assert re.match(r"unpack: OUT OF TIME \(exit \d+, \S+ of [89] s, .*says last: begun", lines[0])
    assert lines[1:-1] == [f"{stage}: skipped: no time left" for stage in STAGES[1:]]
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert archive.extractfile("./logs/unpack.log").read() == b"begun\n"


def test_what_is_left_is_counted_by_the_clock(monkeypatch):
    arguments = common.make_parser("smoke", "").parse_args(["--seconds", "7"])
    assert common.seconds_left(arguments) == 7
    monkeypatch.setenv(common.UNTIL, str(time.time() + 3))
    assert common.seconds_left(arguments) == pytest.approx(3, abs=0.5)
    assert common.deadline(arguments) == pytest.approx(time.monotonic() + 3, abs=0.5)


def stage_main(monkeypatch, module, *arguments):
    """Its exit status and the seconds it took, as a process's are."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    began = time.monotonic()
    return module.main(), time.monotonic() - began


def no_longer_runs(pid):
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_part_of_the_smoke_that_hangs_is_named(tmp_path, monkeypatch, capsys):
    """The others' results are printed, what it said so far too, and nothing that it started runs on."""
    text = f"""
case "$*" in
  *"--part graph") echo "graph: nearly"; sleep 60 & echo $! >{tmp_path}/pid; wait ;;
  *"--part steps") echo "no key here"; exit 3 ;;
  *) echo "key: 5 of 5 pieces ran" ;;
esac
"""
    monkeypatch.setattr(sys, "executable", script(tmp_path / "python", text))
    code, seconds = stage_main(monkeypatch, smoke, "--results", tmp_path, "--seconds", 1)
    out = capsys.readouterr().out
    assert code == 1 and seconds < 5
    key = "refresh: 5 of 5 pieces ran; stages: 5 of 5 pieces ran; steps: exit status 3 after no key here"
    assert out.splitlines()[-1] == f"key: {key}; graph: OUT OF TIME after graph: nearly"
    assert "== graph: OUT OF TIME\ngraph: nearly" in out
    assert (tmp_path / "smoke" / "graph.log").read_text() == "graph: nearly\n"
    assert no_longer_runs(int((tmp_path / "pid").read_text()))


def test_the_sanitizers_verdicts_survive_the_end_of_time(tmp_path, monkeypatch, capsys):
    text = """
case "$*" in
  *memcheck*"--part refresh") echo "========= Invalid __global__ read of size 4"; sleep 60 ;;
  *racecheck*) trap '' TERM; sleep 60 ;;
  *"--part stages") echo "========= ERROR SUMMARY: 0 errors" ;;
  *) echo "========= ERROR SUMMARY: 2 errors"; exit 99 ;;
esac
"""
    script(tmp_path / "compute-sanitizer", text)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    code, seconds = stage_main(monkeypatch, sanitize, "--results", tmp_path, "--seconds", 1)
    assert code == 1 and seconds < 5
    assert capsys.readouterr().out.splitlines()[-1] == (
        "key: memcheck refresh: OUT OF TIME, 1 errors so far; memcheck stages: ERROR SUMMARY: 0 errors; "
        "racecheck refresh: OUT OF TIME, 0 errors so far; memcheck steps: ERROR SUMMARY: 2 errors"
    )
    assert "Invalid" in (tmp_path / "sanitize" / "memcheck_refresh.log").read_text()


HANGING_TESTS = """
import signal, time
def test_hashes():
    from bench.fake_driver import kernels
    assert kernels()["due_kernel"].hash is not None
def test_wrong(): assert 1 == 2, "off by one"
def test_interrupted(): time.sleep(60)
def test_deaf():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(60)
"""


@pytest.mark.slow
def test_groups_that_hang_are_unfinished(tmp_path, monkeypatch, capsys):
    """One that Ctrl-C ends, one that it does not, and one that was not begun; what failed before is named of both."""
    file = tmp_path / "test_hanging.py"
    file.write_text(HANGING_TESTS)
    groups = {
        "slow": [str(file), "-k", "hashes or wrong or interrupted"],
        "deaf": [str(file), "-k", "wrong or deaf"], "late": [str(file)],
    }  # fmt: skip
    monkeypatch.setattr(run_tests, "GROUPS", groups)
    monkeypatch.setattr(run_tests, "AT_ONCE", 2)
    monkeypatch.setattr(run_tests, "GRACE", 1.0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        code, seconds = stage_main(monkeypatch, run_tests, "--results", tmp_path, "--seconds", 8)
    finally:
        signal.signal(signal.SIGINT, before)
    lines = capsys.readouterr().out.splitlines()
    assert code == 1 and seconds < 12
    assert lines[-3:] == [
        "FAILED slow: test_wrong: AssertionError: off by one",
        "FAILED deaf: test_wrong: pytest ended before it said why",
        "key: 1 passed, 2 failed, 0 skipped; UNFINISHED: slow (stopped in test_hanging.py::test_interrupted), "
        "deaf (stopped in test_hanging.py::test_deaf), late (not begun)",
    ]


def test_the_plugin_does_nothing_without_compiled_kernels(monkeypatch):
    called = []
    monkeypatch.setattr(common, "same_hashes", lambda: called.append(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest_plugin.pytest_configure()
    monkeypatch.delenv("TRITON_INTERPRET")
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda name: None)
        pytest_plugin.pytest_configure()
    assert not called
    pytest_plugin.pytest_configure()
    assert called


@pytest.mark.slow
@pytest.mark.parametrize("part", ["stages", "steps"])
def test_what_the_smoke_compares_agrees_under_the_interpreter(tmp_path, part):
    """So that an error on a GPU is the GPU's."""
    command = [sys.executable, "-m", "bench.first_hour.smoke", "--device", "cpu", "--quick", "--all", "--part", part]
    done = run([*command, "--results", str(tmp_path)], TRITON_INTERPRET="1")
    if "AttributeError" in done.stdout + done.stderr and "numpy" in done.stderr:
        pytest.skip("this Triton's interpreter does not run with this numpy")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    head, rows = rows[0], rows[2:]
    for row in (dict(zip(head, row)) for row in rows):
        if part == "stages":
            # (the interpreter truncates to bfloat16 where a GPU rounds)
            assert float(row["error"]) < (0.01 if row["what"] == "parameter" and "bfloat16" in row["case"] else 1e-5), row
        elif row["case"] not in ("bfloat16", "float16"):
            assert float(row["step"]) < 5e-5 and float(row["gram"]) < 1e-6 and float(row["t"]) == 0, row


@pytest.mark.slow
def test_every_test_that_needs_a_gpu_is_in_one_group():
    """Of test_fused_cuda.py, where nearly all are."""
    out = run([sys.executable, "-m", "pytest", "-q", "--collect-only", run_tests.FUSED]).stdout
    names = [line.split("::")[1] for line in out.splitlines() if "::" in line]
    without_gpu = {"test_import_neither_needs_nor_waits_for_triton", "test_kernels_go_by_one_name_only"}
    assert without_gpu < set(names)
    for name in names:
        chosen = [
            group
            for group, arguments in run_tests.GROUPS.items()
            if run_tests.FUSED in arguments
            and Expression.compile(arguments[-1]).evaluate(lambda word, name=name, **_: word in name)
        ]
        assert len(chosen) == (name not in without_gpu), (name, chosen)
    for arguments in run_tests.GROUPS.values():
        assert all((ROOT / file).exists() for file in arguments if file.endswith(".py"))


def test_junit_files_are_read(tmp_path):
    group = run_tests.Group("a", [], tmp_path / "a.log", junit=tmp_path / "a.xml")
    group.junit.write_text(
        '<testsuites><testsuite><testcase name="x"/><testcase name="y"><failure message="off by 2&#10;more"/></testcase>'
        '<testcase name="z"><skipped message="no GPU"/></testcase><testcase time="0.0"/></testsuite></testsuites>'
    )
    run_tests.read(group)
    assert group.counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert list(run_tests.failures([group])) == ["a: y: off by 2"]


def events(*named):
    return [Event(name, float(place), us) for place, (name, us) in enumerate(named)]


def test_kernels_are_matched_with_launches():
    step = [("project_first_kernel", 1.0), ("project_kernel", 2.0), ("refresh", 9.0), ("project_kernel", 3.0)]
    kernels = ["project_first_kernel", "project_kernel", "project_kernel"]
    assert by_launch(events(*step, *step), kernels) == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert others(events(*step, *step), 2) == {"refresh": (1.0, 9.0)}
    with pytest.raises(ValueError, match="multiple"):
        by_launch(events(*step[:2]), kernels)
    with pytest.raises(ValueError, match="is project_kernel, not"):
        by_launch(events(*step[1:], ("project_kernel", 1.0)), kernels)


def test_recorded_gradients(tmp_path):
    """In float16, scaled by their root mean square: 1e-9 survives. Drawn ones have the sizes of those that were."""
    generator = torch.Generator().manual_seed(0)
    grads = [scale * torch.randn(20, 30, generator=generator) for scale in (1e-9, 3.0)]
    sizes = [float(g.square().mean().sqrt()) for g in grads]
    kept = {"name": "m", "shapes": [(20, 30)] * 2, "param_rms": [0.5, 2.0], "grad_rms": [sizes]}
    torch.save({**kept, "grads": [[(g / s).half() for g, s in zip(grads, sizes)]]}, tmp_path / "real.pt")
    torch.save({**kept, "grads": []}, tmp_path / "drawn.pt")
    real, drawn = recorded(tmp_path / "real.pt"), recorded(tmp_path / "drawn.pt")
    for want, got in zip(grads, real.grads[0]):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().mean()))
    for size, got in zip(sizes, drawn.grads[1]):
        assert float(got.square().mean().sqrt()) == pytest.approx(size, rel=0.1)
    for p in (real.params, drawn.params):
        assert [float(x.square().mean().sqrt()) for x in p] == pytest.approx([0.5, 2.0], rel=0.1)


CHILD = """
import sys, time, json
from bench.first_hour.in_turn import report, wait_for_turn
name, ready_after, works_for = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
time.sleep(ready_after)
wait_for_turn()
start = time.monotonic()
time.sleep(works_for)
report({"name": name, "start": start, "end": time.monotonic()})
"""


@pytest.mark.slow
def test_one_after_the_other_and_none_for_ever(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)

    def entry(name, *seconds):
        path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        return in_turn.Entry(name, [str(tmp_path / "child.py"), name, *map(str, seconds)], path)

    began = time.monotonic()
    broken = in_turn.Entry("broken", ["-c", "raise SystemExit(3)"])
    entries = [entry("a", 0, 0.2), broken, entry("late", 90, 0), entry("b", 0, 0.2)]
    rows, failed = in_turn.in_turn(entries, seconds=8, get_ready=0.5)
    assert [row["name"] for row in rows] == ["a", "b"] and rows[0]["end"] <= rows[1]["start"]
    assert failed == ["broken (exit status 3)", "late (out of time)"]
    assert time.monotonic() - began < 10


def test_the_shares_of_a_training_step():
    history = [{"step": 10 * k, "seconds": 0.1 * k, "loss": 1.0} for k in range(1, 11)]
    row = whole(history, [9.0] * 50 + [1.0] * 50)
    assert row["training_step_ms"] == pytest.approx(10) and row["optimizer_ms"] == 1.0 and row["share_by_events"] == 0.1
    assert json.dumps(whole([], []))  # nothing was measured
