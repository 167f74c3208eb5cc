"""cuda/overlap.py without a GPU: streams and events that keep vector clocks, so that any access out of order is an error."""

import contextlib

import pytest
import torch

from soap_opt.cuda.overlap import Overlap

GPU0, GPU1 = torch.device("cuda", 0), torch.device("cuda", 1)


class Event:
    def __init__(self, clock):
        self.clock = dict(clock)


class Stream:
    """Work in a stream is ordered, between streams only what waits. clock[s]: how much of s this stream has waited for."""

    def __init__(self, cuda, device):
        self.cuda, self.device = cuda, device
        self.clock = {self: 0}

    def work(self):
        self.clock[self] += 1
        return dict(self.clock)

    def merge(self, clock):
        for stream, time in clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)

    def wait_stream(self, other):
        self.cuda.log.append("wait_stream")
        self.merge(other.clock)

    def record_event(self):
        self.cuda.log.append("record_event")
        return Event(self.clock)

    def wait_event(self, event):
        self.cuda.log.append("wait_event")
        self.merge(event.clock)


class Cuda:
    """The stand-in for torch.cuda."""

    def __init__(self):
        self.log = []
        self.capturing = False
        self.made = 0
        self.current = {device: Stream(self, device) for device in (GPU0, GPU1)}

    def Stream(self, device):
        self.made += 1
        return Stream(self, device)

    def current_stream(self, device):
        return self.current[device]

    def is_current_stream_capturing(self):
        return self.capturing

    @contextlib.contextmanager
    def stream(self, stream):
        before = self.current[stream.device]
        self.current[stream.device] = stream
        try:
            yield
        finally:
            self.current[stream.device] = before


class State:
    """A tensor of the optimizer's state: notes who touched it, and fails where nothing orders two of them."""

    def __init__(self, cuda, device):
        self.cuda, self.device, self.last = cuda, device, None
        self.recorded = []

    def touch(self):
        stream = self.cuda.current_stream(self.device)
        if self.last is not None:
            writer, time = self.last
            if stream.clock.get(writer, 0) < time:
                raise AssertionError("a race: this stream has not waited for the last write")
        self.last = (stream, stream.work()[stream])

    def record_stream(self, stream):
        self.recorded.append(stream)

    def free(self):
        """The caching allocator gives the memory away when the streams it knows of have got this far."""
        stream, time = self.last
        if stream is not self.cuda.current[self.device] and stream not in self.recorded:
            raise AssertionError("memory handed out while another stream uses it")


@pytest.fixture
def cuda():
    return Cuda()


def step(overlap, states):
    """One optimizer step over states of any devices; the refresh of each device behind."""
    overlap.wait()
    for state in states:
        state.touch()
    for device in {state.device: None for state in states}:
        mine = [state for state in states if state.device == device]
        with overlap.behind(device, mine):
            for state in mine:
                state.touch()


def test_steps_on_several_devices_and_groups(cuda):
    overlap = Overlap(backend=cuda)
    groups = [[State(cuda, GPU0), State(cuda, GPU1)], [State(cuda, GPU0)]]
    for _ in range(5):
        for group in groups:  # SOAP.step: one call for each param group
            step(overlap, group)
    assert cuda.made == 2
    for state in (state for group in groups for state in group):
        assert state.last[0] is not cuda.current[state.device]  # the refresh did run behind
        state.free()


def test_the_stand_in_sees_a_missing_wait(cuda):
    overlap = Overlap(backend=cuda)
    state = State(cuda, GPU0)
    step(overlap, [state])
    with pytest.raises(AssertionError, match="race"):
        state.touch()
    overlap.wait()
    state.touch()


def test_the_stand_in_sees_a_missing_record_stream(cuda):
    overlap = Overlap(backend=cuda)
    state = State(cuda, GPU0)
    with overlap.behind(GPU0, []):
        state.touch()
    with pytest.raises(AssertionError, match="handed out"):
        state.free()


def test_a_missing_wait_for_the_step_is_seen(cuda):
    """If the side stream did not wait for the current one, the refresh would race with the step."""
    Stream.wait_stream, kept = (lambda self, other: None), Stream.wait_stream
    try:
        with pytest.raises(AssertionError, match="race"):
            step(Overlap(backend=cuda), [State(cuda, GPU0)])
    finally:
        Stream.wait_stream = kept


def test_every_reader_waits_whatever_its_stream(cuda):
    """The event is not used up by the first who waits."""
    overlap = Overlap(backend=cuda)
    state = State(cuda, GPU0)
    step(overlap, [state])
    for stream in (cuda.current[GPU0], Stream(cuda, GPU0), Stream(cuda, GPU0)):
        with cuda.stream(stream):
            overlap.wait()
            writer, time = state.last
            assert stream.clock.get(writer, 0) >= time


def test_wait_for_one_device(cuda):
    overlap = Overlap(backend=cuda)
    states = [State(cuda, GPU0), State(cuda, GPU1)]
    step(overlap, states)
    overlap.wait(GPU1)
    states[1].touch()
    with pytest.raises(AssertionError, match="race"):
        states[0].touch()


def test_two_refreshes_behind_one_another(cuda):
    """A second param group on the same device, whose state the first shares."""
    overlap = Overlap(backend=cuda)
    state = State(cuda, GPU0)
    for _ in range(2):
        with overlap.behind(GPU0, [state]):
            state.touch()
    overlap.wait()
    state.touch()


def test_in_place_while_capturing(cuda):
    overlap = Overlap(backend=cuda)
    cuda.capturing = True
    state = State(cuda, GPU0)
    for _ in range(3):
        step(overlap, [state])
        state.touch()
    assert cuda.log == [] and cuda.made == 0


def test_other_devices_run_in_place(cuda):
    ran = []
    overlap = Overlap(backend=cuda)
    with overlap.behind(torch.device("cpu"), []):
        ran.append(1)
    overlap.wait()
    assert ran == [1] and cuda.log == []


def test_an_exception_leaves_what_was_enqueued_ordered(cuda):
    overlap = Overlap(backend=cuda)
    state = State(cuda, GPU0)
    with pytest.raises(RuntimeError, match="out of memory"), overlap.behind(GPU0, [state]):
        state.touch()
        raise RuntimeError("out of memory")
    assert state.last[0] is not cuda.current[GPU0]
    overlap.wait()
    state.touch()
    state.free()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_what_runs_in_place():
    device = torch.device("cuda", torch.cuda.current_device())
    start = torch.randn(256, 256, device=device)
    results = []
    for behind in (False, True):
        overlap, x = Overlap(), start.clone()
        for _ in range(20):
            overlap.wait()
            x.mul_(0.5).add_(start)
            with overlap.behind(device, [x]) if behind else contextlib.nullcontext():
                for _ in range(10):
                    x.copy_(x @ start.T / 256)
            torch.randn(1024, 1024, device=device) @ torch.randn(1024, 1024, device=device)  # the forward pass
        overlap.wait()
        results.append(x.clone())
    assert torch.equal(*results)
