"""Refreshes of the Triton path: behind the next step, grouped; whose memory they use."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from comparison import SoapRun, needs_engine, random_gradients, random_params, run_lockstep
from lockstep import OPTIONS, QUICK_AND_SLOW, lockstep

from soap_opt.cuda import memory, refresh
from soap_opt.cuda.overlap import Overlap
from soap_opt.diagnostics.memory import _scratch_on_cuda
from soap_opt.state import refresh_offsets

pytestmark = pytest.mark.usefixtures("fused_on_cpu")


class Late(Overlap):
    """What runs behind is done as late as it may: until somebody waits, the optimizer's state is as it was."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer, self.late = optimizer, []

    @contextlib.contextmanager
    def behind(self, device, tensors):
        state = [value for of_parameter in self.optimizer.state.values() for value in of_parameter.values()]
        before = [value.clone() for value in state]
        yield
        results = [(value, value.clone()) for value, old in zip(state, before) if not torch.equal(value, old)]
        for value, old in zip(state, before):
            value.copy_(old)
        self.late.append((results, list(tensors)))

    def wait(self, device=None):
        late, self.late = self.late, []
        for results, _ in late:
            for value, new in results:
                value.copy_(new)


READERS = {
    "step": None,
    "state_dict": lambda optimizer: optimizer.state_dict()["state"],
    "deepcopy": lambda optimizer: copy.deepcopy(optimizer).state_dict()["state"],
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)).state_dict()["state"],
    "wait_for_refresh": lambda optimizer: optimizer.wait_for_refresh() or torch.optim.Optimizer.state_dict(optimizer)["state"],
}


@needs_engine
@pytest.mark.parametrize("refresh", QUICK_AND_SLOW)
@pytest.mark.parametrize(
    "reader", [pytest.param(name, marks=[] if name in ("step", "state_dict") else pytest.mark.slow) for name in READERS]
)
def test_whoever_reads_waits_for_refreshes_that_run_behind(reader, refresh):
    shapes = [(6, 5), (7,)]
    options = {**OPTIONS, "refresh": refresh}
    in_place = SoapRun(random_params(shapes), fused=True, overlap_refresh=False, **options)
    behind = SoapRun(random_params(shapes), fused=True, **options)
    behind.optimizer._cuda.overlap = Late(behind.optimizer)
    pending = 0
    for grads in random_gradients(shapes, 8):
        in_place.step(grads)
        behind.step(grads)
        pending += len(behind.optimizer._cuda.overlap.late)
        if reader != "step":
            states = READERS[reader](behind.optimizer)
            for i in range(len(shapes)):
                for key, value in in_place.state_of(i).items():
                    assert torch.equal(value, states[i][key]), (i, key)
    assert pending >= 2  # something did run behind
    assert all(torch.equal(p, q) for p, q in zip(in_place.params, behind.params))


@needs_engine
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_group_of_several_dtypes_of_state(launches, max_grad_norm):
    """float64 goes to the multi-tensor path; the others keep their kernels, their pieces, and refreshes that run behind."""
    params = random_params([(6, 5), (4,)]) + random_params([(3, 4)], 2, dtype=torch.float64) + random_params([(7, 3)], 3)
    options = {**OPTIONS, "max_grad_norm": max_grad_norm, "scratch_limit": 8 * 40}
    made = random_gradients([p.shape for p in params], 6)
    gradients = [[grad.to(p.dtype) for grad, p in zip(grads, params)] for grads in made]
    in_place = SoapRun(params, foreach=False, **options)
    behind = SoapRun(params, fused=True, **options)
    late = behind.optimizer._cuda.overlap = Late(behind.optimizer)
    pending = 0
    for grads in gradients:
        total = torch.stack([grad.norm().float() for grad in grads]).norm()
        small = [grad * (1.0 if max_grad_norm is None else (max_grad_norm / (total + 1e-6)).clamp(max=1.0)) for grad in grads]

        class Raw:  # judged by the tolerances of the clipped gradient, run on the raw one
            def __init__(self, run):
                self.run, self.params, self.state_of, self.adopt = run, run.params, run.state_of, run.adopt

            def step(self, _, grads=grads):
                launches.clear()
                self.run.step(grads)

        class Behind(Raw):  # its refreshes run when the comparison reads the state
            def step(self, _):
                nonlocal pending
                super().step(_)
                pending += len(late.late)

        run_lockstep(Raw(in_place), Behind(behind), [small], options)
    assert pending >= 2
    assert launches.count("project_first_kernel") == 2  # two pieces
    for i in range(len(params)):
        assert float(in_place.state_of(i)["step"]) == float(behind.state_of(i)["step"]) == 5


@needs_engine
def test_memory_belongs_to_the_stream_that_it_was_made_on():
    """overlap_refresh switched in the middle: nothing that one stream allocated is used on the other."""
    run = SoapRun(random_params([(6, 5)]), fused=True, **{**OPTIONS, "precondition_frequency": 1})
    run.optimizer._cuda.overlap = Late(run.optimizer)
    kept = []
    for number, grads in enumerate(random_gradients([(6, 5)], 8)):
        run.optimizer.param_groups[0]["overlap_refresh"] = number < 4
        run.step(grads)
        run.optimizer.wait_for_refresh()
        kept += [plan.refreshes.buffers for plan in run.optimizer._cuda.plans(run.state_of(0)["exp_avg"])]
    assert kept[0] is kept[2] and kept[2] is not kept[3] and kept[3] is kept[6]


@needs_engine
@pytest.mark.parametrize("refresh", [pytest.param("together", marks=pytest.mark.slow), "staggered"])
def test_scratch_is_what_is_reported_and_goes_with_the_optimizer(refresh):
    shapes = [(17, 33), (6, 5, 3, 3), (5,)]
    run = SoapRun(random_params(shapes), fused=True, **{**OPTIONS, "refresh": refresh})
    for grads in random_gradients(shapes, 5):
        run.step(grads)
    group, optimizer = run.optimizer.param_groups[0], run.optimizer
    layouts = [optimizer._layout(p, group) for p in run.params]
    foretold = _scratch_on_cuda([({**group, "overlap_refresh": False}, layouts)], refresh_offsets(optimizer))
    (plan,) = run.optimizer._cuda.plans(run.state_of(0)["exp_avg"])
    tensors = [*optimizer._cuda.scratch.tensors(), *plan.refreshes.buffers.tensors()]
    tensors += [plan.tiles, plan.problems.tensor, plan.partials, plan.counters, plan.kronecker]
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    units = sum(len(layout.modes) for layout in layouts)
    assert foretold <= held <= foretold + 2 * 32 * units  # each piece begins at a multiple of 16 bytes
    references = [weakref.ref(tensor) for tensor in tensors]
    del run, group, optimizer, plan, tensors
    gc.collect()
    assert not any(reference() is not None for reference in references)


@needs_engine
def test_loading_a_state_waits_for_refreshes_that_run_behind():
    run = SoapRun(random_params([(6, 5)]), fused=True, **{**OPTIONS, "precondition_frequency": 1})
    run.optimizer._cuda.overlap = Late(run.optimizer)
    first, second = random_gradients([(6, 5)], 2)
    run.step(first)
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.step(second)
    assert run.optimizer._cuda.overlap.late
    run.optimizer.load_state_dict(saved)
    assert not run.optimizer._cuda.overlap.late
    assert all(torch.equal(value, run.state_of(0)[key]) for key, value in saved["state"][0].items())


@needs_engine
def test_everything_that_a_refresh_behind_writes_is_recorded():
    """Or the allocator could hand the memory out while the refresh still uses it."""
    shapes = [(6, 5), (4, 3, 3, 3)]
    run = SoapRun(random_params(shapes), fused=True, **OPTIONS)
    late = run.optimizer._cuda.overlap = Late(run.optimizer)
    written = 0
    for grads in random_gradients(shapes, 6):
        run.step(grads)
        states = [run.optimizer.state[p] for p in run.params]
        before = [{key: value.clone() for key, value in state.items()} for state in states]
        recorded = {tensor.data_ptr() for _, tensors in late.late for tensor in tensors}
        late.wait()
        for state, old in zip(states, before):
            for key, value in state.items():
                if not torch.equal(value, old[key]):
                    written += 1
                    assert value.data_ptr() in recorded, key
    assert written > 10


# Rank 2 to 5, Kronecker products alone, first, in the middle and last, one mode of a product due without the other
REEXPRESSED = [
    (17, 33),
    (65, 2),
    (3, 17, 5),
    (5, 5),
    (6, 5, 3, 3),
    (4, 3, 5, 5),
    (2, 3, 1, 5, 2),
    (64, 8, 4),
    (3, 5, 40),
    (9, 130),
]


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("refresh", ["staggered", "together", "adaptive"])
def test_refreshes_are_grouped(refresh, monkeypatch, launches):
    """m and v of all parameters together, in lockstep with the specification, and not one of them by itself."""

    def never(*_):
        raise AssertionError("a parameter was re-expressed alone")

    options = {"refresh": refresh, "refresh_tolerance": 0.05, "precondition_frequency": 2}
    monkeypatch.setattr("soap_opt.cuda.refresh.reexpress_", never)
    assert lockstep(REEXPRESSED, 5, options, missing=0.1) > 20
    counts = {name: launches.count(name) for name in set(launches)}
    assert 0 < counts["reexpress_kernel"] <= 5 * 5, counts


@needs_engine
def test_parameters_that_the_grouped_refresh_cannot_take():
    """Seven modes; state that does not lie in its layout's order."""
    assert lockstep([(2, 3, 2, 2, 2, 3, 2), (6, 5)], 4, {"precondition_frequency": 1}) > 10
    options = {**OPTIONS, "precondition_frequency": 1}
    runs = [SoapRun(random_params([(6, 5, 3)]), **kind, **options) for kind in ({"foreach": False}, {"fused": True})]
    first, *rest = random_gradients([(6, 5, 3)], 5)
    for run in runs:
        run.step(first)
    state = runs[1].state_of(0)
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = state[key].movedim(0, -1).contiguous().movedim(-1, 0)
    run_lockstep(*runs, rest, options)


@needs_engine
@pytest.mark.slow
def test_a_refresh_sends_its_table_once(monkeypatch):
    """The same units a period later: nothing goes to the device again."""
    sent = []
    original = memory.to_device
    for module in (memory, refresh):
        monkeypatch.setattr(module, "to_device", lambda array, device: sent.append(array.shape) or original(array, device))
    run = SoapRun(random_params([(6, 5), (4, 3, 3)]), fused=True, **OPTIONS)
    counts = []
    first, *rest = random_gradients([(6, 5), (4, 3, 3)], 13)
    run.step(first)
    for grads in rest:
        for param, grad in zip(run.params, grads):
            param.grad.copy_(grad)
        run.optimizer.step()
        counts.append(len(sent))
    assert counts[4] > counts[0] > 0  # tiles and pointers of the step, then of the first period's phases
    assert counts[7:] == [counts[7]] * 5


@needs_engine
def test_a_skipped_step_refreshes_nothing_of_its_parameter():
    options = {**OPTIONS, "precondition_frequency": 1}
    run = SoapRun(random_params([(6, 5), (4, 4)]), fused=True, **options)
    gradients = random_gradients([(6, 5), (4, 4)], 4)
    for grads in gradients[:3]:
        run.step(grads)
    before = {key: value.clone() for key, value in run.state_of(0).items()}
    other = run.state_of(1)["basis_0"].clone()
    run.step([torch.full((6, 5), torch.inf), gradients[3][1]])
    assert all(torch.equal(value, before[key]) for key, value in run.state_of(0).items())
    assert not torch.equal(run.state_of(1)["basis_0"], other)


@needs_engine
@pytest.mark.parametrize("overlap_refresh", [False, True])
def test_a_refresh_that_fails_is_counted_on_the_device(overlap_refresh):
    """Its basis, m and v stay, its neighbours go on; nobody waits to hear of it."""
    shapes = [(6, 5), (4, 3)]
    options = {**OPTIONS, "refresh": "together", "precondition_frequency": 3, "overlap_refresh": overlap_refresh}
    run = SoapRun(random_params(shapes), fused=True, **options)
    gradients = random_gradients(shapes, 8)
    for grads in gradients[:3]:
        run.step(grads)
    run.state_of(0)["gram_0"][1, 1] = torch.inf
    kept = {key: run.state_of(i)[key].clone() for i, key in ((0, "basis_0"),)}
    others = [run.state_of(i)[key].clone() for i, key in ((0, "basis_1"), (1, "basis_0"))]
    run.step(gradients[3])
    assert run.optimizer.skipped_refreshes(per_parameter=True) == [1, 0]
    assert torch.equal(run.state_of(0)["basis_0"], kept["basis_0"])
    for old, (i, key) in zip(others, ((0, "basis_1"), (1, "basis_0"))):
        assert not torch.equal(run.state_of(i)[key], old)
    assert all(run.state_of(0)[key].isfinite().all() for key in ("exp_avg", "exp_avg_sq"))
    copied = copy.deepcopy(run.optimizer)
    for grads in gradients[4:7]:
        run.step(grads)
    assert run.optimizer.skipped_refreshes() == 2 and copied.skipped_refreshes() == 1
    assert run.optimizer.skipped_steps() == 0
