import importlib.util
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as `python examples/train_lic.py` does

# What CompressAI's models are needed for is not collected without it; the trainers' tests skip themselves
collect_ignore = (
    []
    if importlib.util.find_spec("compressai")
    else sorted(f.name for f in Path(__file__).parent.glob("test_*.py") if f.name != "test_trainers.py")
)


@pytest.fixture(scope="session")
def examples() -> Path:
    return EXAMPLES


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are too small for a second thread, which would only spin beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def signals_are_not_ignored():
    """Under nohup SIGHUP is, in a shell's background job SIGINT, and in every process that these start: what a closed terminal
    and Ctrl-C do is tested all the same."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGHUP, before[0])
    signal.signal(signal.SIGINT, before[1])


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Some of the photographs in CompressAI's layout: six to train on, two to test on."""
    root = tmp_path_factory.mktemp("photos")
    for split, source, count in (("train", "train", 6), ("test", "eval", 2)):
        (root / split).mkdir()
        for file in sorted((EXAMPLES / "photos" / source).iterdir())[:count]:
            shutil.copy(file, root / split)
    return root


@pytest.fixture
def no_curves(monkeypatch):
    """They have tests of their own, and take longer than a short training."""
    monkeypatch.setattr("train_lic.plot_curves", lambda *args, **kwargs: None)


@pytest.fixture
def few_samples(monkeypatch):
    """As many as tiny models need: what quantising them costs is the sampling."""
    monkeypatch.setattr("lic_quantization.POSITIONS", 1024)
    monkeypatch.setattr("lic_quantization.SAMPLES", 4096)
