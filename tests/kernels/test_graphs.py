"""Steps recorded into a graph, without a GPU: a tape of every launch and every ATen call, played again on the same memory.

What a CUDA graph's capture forbids is an error here too: reading a tensor on the host, and copying memory that the host made
in the meantime. What was decided on the host while recording stays as it was, in a replay as in a graph's.
"""

import contextlib
import copy
import gc
import weakref

import numpy
import pytest
import torch
from comparison import SoapRun, needs_engine, random_gradients, random_params, run_lockstep
from lockstep import OPTIONS, QUICK_AND_SLOW
from torch.utils._python_dispatch import TorchDispatchMode

import soap_opt
import soap_opt.options
from bench.fake_driver import watched
from soap_opt import refresh_operator
from soap_opt.cuda import follow, graph, launch, memory, refresh, stepper
from soap_opt.state import allocate

pytestmark = [pytest.mark.usefixtures("fused_on_cpu"), needs_engine]

SHAPES = [(5,), (17, 33), (6, 5, 3, 3), (3, 17, 5), (5, 5), (2, 3, 2, 2, 2, 3, 2)]


class Tape(TorchDispatchMode):
    """Runs what it records, and again with :meth:`replay`."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.calls, self.launches, self.recording = [], 0, False
        self.pool = []  # what was allocated while recording
        monkeypatch.setattr(launch, "kernel_for", watched(self._launched))
        monkeypatch.setattr(stepper, "is_recording", lambda device: self.recording)
        for module in (memory, refresh, graph):
            monkeypatch.setattr(module, "to_device", self._to_device(module.to_device))
        monkeypatch.setattr(graph, "if_set", self._if_set)
        self.conditions = 0

    def __enter__(self):
        self.recording = True
        return super().__enter__()

    def __exit__(self, *exception):
        self.recording = False
        return super().__exit__(*exception)

    def _launched(self, launch, kernel, arguments, constants):
        if self.recording:
            self.launches += 1
            self.calls.append(launch)
        self._untracked(launch)

    @contextlib.contextmanager
    def _if_set(self, condition):
        """A conditional node: the body runs now, as everything does, and in a replay where the condition is set."""
        calls, self.calls = self.calls, []
        self.conditions += 1
        try:
            yield
        finally:
            body, self.calls = self.calls, calls
            calls.append(lambda: [call() for call in body] if bool(condition) else None)

    def _to_device(self, original):
        def refused(*arguments):
            assert not self.recording, "pinned memory inside a capture"
            return original(*arguments)

        return refused

    def _untracked(self, function, *arguments, **constants):
        """The interpreter's own ATen calls are part of the launch."""
        before, self.recording = self.recording, False
        try:
            function(*arguments, **constants)
        finally:
            self.recording = before

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result = function(*arguments, **keywords)
        if self.recording:
            assert "_local_scalar_dense" not in str(function) or arguments[0].dtype in (torch.int64, torch.bool), (
                "the host read a tensor that a capture would have on the device"
            )
            outputs = [x for x in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(x, torch.Tensor)]
            if str(function).startswith("aten.empty"):
                self.pool += outputs
            else:
                self.calls.append(lambda: self._again(function, arguments, keywords, outputs))
        return result

    @staticmethod
    def _again(function, arguments, keywords, outputs):
        result = function(*arguments, **keywords)
        for new, old in zip(result if isinstance(result, (list, tuple)) else [result], outputs):
            if new is not old and new.data_ptr() != old.data_ptr():  # not in place, and no view
                old.copy_(new)

    def replay(self):
        """A graph's pool gives memory to whatever the graph needs it for: nothing in it lasts from one replay to the next."""
        with torch.no_grad():
            for tensor in self.pool:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
            for call in self.calls:
                call()


class Recorded(SoapRun):
    """Steps in the ordinary way until there is a tape; then replays it, on gradients that stay where they are."""

    tape = None

    def step(self, grads):
        if self.tape is None:
            super().step(grads)
            return
        for param, grad in zip(self.params, grads):
            param.grad.copy_(grad)
        self.tape.replay()

    def record(self, tape, grads):
        """One step, which is recorded while it runs."""
        for param, grad in zip(self.params, grads):
            param.grad = grad.clone()
        with tape:
            self.optimizer.step()
        self.tape = tape


@pytest.mark.slow
@pytest.mark.parametrize("refresh", ["staggered", "together", "adaptive"])
def test_replays_are_the_specification(refresh, monkeypatch):
    """Also with unusable gradients on the way, and whatever t is: each replay refreshes what is due then."""
    options = {**OPTIONS, "refresh": refresh, "refresh_tolerance": 0.05}
    params = random_params(SHAPES)
    reference = SoapRun(params, foreach=False, **options)
    tested = Recorded(params, fused=True, capturable=True, **options)
    gradients = random_gradients(SHAPES, 12)
    gradients[7][1][0, 0] = torch.nan
    run_lockstep(reference, tested, gradients[:3], options)
    reference.step(gradients[3])
    tested.record(Tape(monkeypatch), gradients[3])
    with pytest.warns(UserWarning, match="not finite"):
        assert run_lockstep(reference, tested, gradients[4:], options) > 20
    assert tested.optimizer.skipped_steps(per_parameter=True) == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("refresh", QUICK_AND_SLOW)
def test_bases_beyond_shared_memory_are_refreshed_in_conditional_nodes(refresh, monkeypatch):
    """A device with little shared memory; one parameter is re-expressed by itself (seven modes)."""
    monkeypatch.setattr(graph, "has_conditional_nodes", lambda: True)
    monkeypatch.setattr(graph, "shared_memory_limit", lambda device: 18432)  # d = 55
    shapes = [(5,), (60, 33), (6, 70, 3, 3), (64, 58), (5, 5), (2, 3, 2, 2, 2, 3, 2)]
    options = {**OPTIONS, "refresh": refresh, "refresh_tolerance": 0.05}
    params = random_params(shapes)
    reference = SoapRun(params, foreach=False, **options)
    tested = Recorded(params, fused=True, capturable=True, **options)
    gradients = random_gradients(shapes, 10)
    gradients[7][1][0, 0] = torch.nan
    run_lockstep(reference, tested, gradients[:3], options)
    reference.step(gradients[3])
    tape = Tape(monkeypatch)
    tested.record(tape, gradients[3])
    assert tape.conditions == (2 if refresh == "together" else 2 * 3)  # a period of 3 steps
    (plan,) = tested.optimizer._cuda.following.of(tested.state_of(0)["exp_avg"]).plans_of_graphs
    assert [plan.graph_refresh.refresh.sizes[n] for n in plan.graph_refresh.small].count(33) == 1
    with pytest.warns(UserWarning, match="not finite"):
        assert run_lockstep(reference, tested, gradients[4:], options) > 10


@pytest.mark.slow
def test_the_recorded_step_itself_and_ordinary_steps_after_it(monkeypatch):
    params = random_params(SHAPES[:3])
    runs = [Recorded(params, fused=True, capturable=capturable, **OPTIONS) for capturable in (False, True)]
    gradients = random_gradients(SHAPES[:3], 10)
    for grads in gradients[:3]:
        for run in runs:
            run.step(grads)
    runs[0].step(gradients[3])
    runs[1].record(Tape(monkeypatch), gradients[3])
    for number, grads in enumerate(gradients[4:]):
        runs[0].step(grads)
        tape, runs[1].tape = runs[1].tape, None if number % 3 == 2 else runs[1].tape  # an ordinary step between two replays
        memory = [p.grad for p in runs[1].params]
        runs[1].step(grads)
        runs[1].tape = tape
        for param, grad in zip(runs[1].params, memory):
            param.grad = grad
    for first, second in zip(*(run.params for run in runs)):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    states = [run.optimizer.state_dict()["state"] for run in runs]
    assert [int(states[1][i]["step"]) for i in range(3)] == [9, 9, 9]


def test_launches_of_a_recorded_step(monkeypatch):
    """9 for the step of convolutions; 1 to see what is due, at most 4 behind the operator."""
    shapes = [(6, 5, 3, 3), (17, 33), (5,)]
    run = Recorded(random_params(shapes), fused=True, capturable=True, **OPTIONS)
    gradients = random_gradients(shapes, 3)
    for grads in gradients[:2]:
        run.step(grads)
    tape = Tape(monkeypatch)
    run.record(tape, gradients[2])
    assert tape.launches <= 9 + 1 + 4


def test_a_learning_rate_on_the_device_moves_between_replays(monkeypatch):
    lr = torch.tensor(0.1)
    run = Recorded(random_params([(6, 5)]), fused=True, capturable=True, **{**OPTIONS, "lr": lr})
    gradients = random_gradients([(6, 5)], 4)
    for grads in gradients[:2]:
        run.step(grads)
    monkeypatch.setattr(soap_opt.options.Options, "check", lambda options: None)  # reads a learning rate on the CPU
    run.record(Tape(monkeypatch), gradients[2])
    lr.fill_(0.0)
    before = run.params[0].detach().clone()
    run.step(gradients[3])
    assert torch.equal(before, run.params[0])


def test_a_capture_needs_an_ordinary_step_before(monkeypatch):
    run = Recorded(random_params([(6, 5)]), fused=True, capturable=True, **OPTIONS)
    first, second = random_gradients([(6, 5)], 2)
    run.step(first)  # init: nothing is stepped yet
    state = copy.deepcopy(run.optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError, match="after a step with capturable=True that was not"):
        run.record(Tape(monkeypatch), second)
    for key, value in run.state_of(0).items():
        assert torch.equal(value, state[0][key]), key


def test_a_plan_is_one_captures(monkeypatch):
    """Two graphs do not share tables: the second capture takes what the step between made ready."""
    run = Recorded(random_params([(6, 5)]), fused=True, capturable=True, **OPTIONS)
    gradients = random_gradients([(6, 5)], 5)
    for grads in gradients[:2]:
        run.step(grads)
    run.record(Tape(monkeypatch), gradients[2])
    with pytest.raises(RuntimeError, match="before each capture"):
        run.record(Tape(monkeypatch), gradients[3])
    run.tape = None
    run.step(gradients[3])
    run.record(Tape(monkeypatch), gradients[4])
    plans = run.optimizer._cuda.following.of(run.state_of(0)["exp_avg"]).plans_of_graphs
    assert len(plans) == 2 and plans[0] is not plans[1]


def test_a_graphs_plan_is_kept_until_it_is_released(monkeypatch):
    shapes = [(6, 5), (4, 3, 3)]
    run = Recorded(random_params(shapes), fused=True, capturable=True, **OPTIONS)
    gradients = random_gradients(shapes, 4)
    for grads in gradients[:2]:
        run.step(grads)
    run.record(Tape(monkeypatch), gradients[2])
    plans = [weakref.ref(plan) for plan in run.optimizer._cuda.following.of(run.state_of(0)["exp_avg"]).plans_of_graphs]
    run.tape = None
    gc.collect()
    assert len(plans) == 1 and plans[0]() is not None
    run.optimizer.release_graphs()
    gc.collect()
    assert plans[0]() is None
    run.step(gradients[3])  # t is read again
    assert [int(run.state_of(i)["step"]) for i in range(2)] == [3, 3]


def test_an_ordinary_step_after_a_capture_waits_once(monkeypatch):
    """Replays may have moved t of every parameter: all of them come in one transfer, not one by one."""
    shapes = [(6, 5), (4, 3, 3), (7,)]
    run = Recorded(random_params(shapes), fused=True, capturable=True, **OPTIONS)
    gradients = random_gradients(shapes, 5)
    for grads in gradients[:2]:
        run.step(grads)
    run.record(Tape(monkeypatch), gradients[2])
    run.tape = None
    read = []
    original = follow._values
    monkeypatch.setattr(follow, "_values", lambda steps: read.append(len(steps)) or original(steps))
    for grads in gradients[3:]:
        run.step(grads)
    assert read == [3, 3]
    # (the tape ran the step that it recorded; the first gradient moved nothing)
    assert [int(run.state_of(i)["step"]) for i in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("present", [False, True])
def test_conditional_nodes_are_looked_for(present, monkeypatch):
    """torch 2.11 has none, whatever CUDA it is built with."""
    cuda_graph = type("CUDAGraph", (), {"begin_capture_to_if_node": None} if present else {})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", cuda_graph)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert graph.has_conditional_nodes() == present


def test_what_cannot_be_captured_is_refused(monkeypatch):
    """As in a capture on cuda:0; the parameters are on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(soap_opt._ext, "_triton_error", lambda: None)
    run = SoapRun(random_params([(6, 5)]), fused=True, capturable=True, **OPTIONS)
    run.params[0].grad = torch.ones(6, 5)

    def refused(match):
        with pytest.raises(RuntimeError, match=f"cannot be recorded into a CUDA graph: .*{match}"):
            run.optimizer.step()

    refused("parameter 0 of shape .* is not initialised")
    allocate(run.optimizer, [(run.optimizer.param_groups[0], run.params[0])])
    run.state_of(0)["initialized"].fill_(True)
    reason = "soap_opt was installed without its CUDA part"
    monkeypatch.setattr(refresh_operator, "why_missing", lambda device_type: reason)
    refused(reason)
    monkeypatch.setattr(refresh_operator, "why_missing", lambda device_type: None)
    run.optimizer.param_groups[0]["fused"] = None
    refused("not stepped by the fused CUDA path")
    run.optimizer.param_groups[0]["fused"] = True
    refused("is on cpu, and the graph on cuda:0")
    monkeypatch.setattr(soap_opt.cuda.problems, "MAX_NUMEL", 20)
    refused("beyond the kernels. int32 offsets")
    run.optimizer.param_groups[0]["capturable"] = False
    refused("capturable=False")


def test_nothing_runs_behind_a_step_that_a_graph_may_follow():
    """A replay waits for no event from outside."""
    run = SoapRun(random_params([(6, 5)]), fused=True, capturable=True, **{**OPTIONS, "precondition_frequency": 1})

    class Never:
        def behind(self, *_):
            raise AssertionError("a refresh runs behind")

        def wait(self):
            pass

    run.optimizer._cuda.overlap = Never()
    before = None
    for grads in random_gradients([(6, 5)], 3):
        run.step(grads)
        before, after = run.state_of(0)["basis_0"].clone(), before
    assert not torch.equal(before, after)


def test_a_table_that_could_not_be_sent_is_sent_again(monkeypatch):
    table = memory.DeviceTable((2,), torch.device("cpu"))
    source = numpy.asarray([1, 2])

    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(memory, "to_device", out_of_memory)
        table.send(source, lambda pointers: pointers)
    table.send(source, lambda pointers: pointers)
    assert table.tensor.tolist() == [1, 2]
