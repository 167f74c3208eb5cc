"""What holds an optimizer, or a parameter of one: autograd's graphs, modes, groups, trainers, threads."""

import copy
import gc
import warnings

import pytest
import torch
from comparison import NO_ENGINE, SoapRun, every_implementation, needs_engine, random_gradients, random_params
from small_model import model_of, train
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import soap_opt
from soap_opt import SOAP, cpu
from soap_opt.schedule import start_of, unit_flops
from soap_opt.state import refresh_offsets

# ---- autograd -------------------------------------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 4), (5,), (3, 4, 2, 2)], ids=str)
def test_a_graph_from_before_the_step_raises_torchs_own_error(flags, dtype, shape):
    """GAN training, two losses, retain_graph: gradients through stepped weights would be wrong without a word."""
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = SOAP([p], **flags)
    for _ in range(2):
        p.grad = torch.randn(shape).to(dtype)
        optimizer.step()
    loss = (p * p).sum()
    version = p._version
    optimizer.step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_implementation
def test_state_in_a_graph_raises_too(flags):
    """exp_avg of a step before, as a regulariser may hold it; the Grams likewise."""
    run = SoapRun(random_params([(5, 4)]), **flags, precondition_frequency=1)
    gradients = random_gradients([(5, 4)], 4)
    for grads in gradients[:3]:
        run.step(grads)
    for key in ("exp_avg", "exp_avg_sq", "gram_0", "gram_1", "basis_0"):
        w = torch.ones_like(run.state_of(0)[key], requires_grad=True)
        loss = (w * run.state_of(0)[key]).sum()
        run.step(gradients[3])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_implementation
def test_what_a_step_does_not_change_keeps_its_graph(flags):
    """A parameter without a gradient, and one whose gradient is not usable."""
    params = [nn.Parameter(p) for p in random_params([(4, 3), (4, 3)])]
    optimizer = SOAP(params, **flags)
    for _ in range(2):
        params[0].grad, params[1].grad = torch.randn(4, 3), torch.randn(4, 3)
        optimizer.step()
    loss = (params[0] * params[0]).sum()
    params[0].grad = None
    optimizer.step()
    params[0].grad = torch.full((4, 3), torch.nan)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    params[0].grad = None
    loss.backward()
    assert torch.equal(params[0].grad, 2 * params[0].detach())


# ---- modes ----------------------------------------------------------------------------------------------------------------


@every_implementation
def test_steps_under_fake_tensor_mode(flags):
    """Shapes alone: state of the right shapes, nothing computed, and no real optimizer is the worse for it afterwards."""
    shapes = [(7, 6), (5, 3, 3, 3), (9,), ()]
    cpu.layout_table.cache_clear()
    cpu.scratch_numel.cache_clear()
    with FakeTensorMode():
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = SOAP(params, **flags)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        state = optimizer.state_dict()["state"]
        if NO_ENGINE is None:
            soap_opt.memory_report(optimizer)
        other = SOAP(params, **flags)
        other.load_state_dict(optimizer.state_dict())
        other.step()
    real = SoapRun(random_params(shapes), **flags)
    for grads in random_gradients(shapes, 3):
        real.step(grads)
    for i in range(len(shapes)):
        assert state[i].keys() == real.state_of(i).keys()
        for key, value in real.state_of(i).items():
            assert state[i][key].shape == value.shape and state[i][key].dtype == value.dtype, key
        assert isinstance(state[i]["exp_avg"], FakeTensor)
    assert all(p.isfinite().all() for p in real.params)


@every_implementation
def test_meta_parameters(flags):
    if flags.get("fused"):
        with pytest.raises(RuntimeError, match="no kernels of its own for device type 'meta'"):
            SOAP([nn.Parameter(torch.empty(3, 2, device="meta"))], **flags)
        return
    params = [nn.Parameter(torch.empty(3, 2, device="meta")), nn.Parameter(torch.ones(3, 2))]
    optimizer = SOAP(params, **flags)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert {key: tuple(x.shape) for key, x in optimizer.state[params[0]].items()} == {
        key: tuple(x.shape) for key, x in optimizer.state[params[1]].items()
    }
    assert float(optimizer.state[params[0]]["step"]) == float(optimizer.state[params[1]]["step"]) == 2


@needs_engine
def test_no_cache_keeps_what_was_made_in_inference_mode():
    cpu.layout_table.cache_clear()
    shapes = [(7, 3)]
    with torch.inference_mode():
        SoapRun(random_params(shapes)).step(random_gradients(shapes, 1)[0])
    run = SoapRun(random_params(shapes))
    for grads in random_gradients(shapes, 3):
        run.step(grads)
    layout = run.optimizer._layout(run.params[0], run.optimizer.param_groups[0])
    assert not cpu.layout_table((layout,)).is_inference()
    assert not cpu.scratch((layout,), torch.float32).is_inference()


# ---- groups ---------------------------------------------------------------------------------------------------------------


def test_a_parameter_that_stands_twice_in_a_group_is_refused():
    """torch only warns; two threads would step it at the same time."""
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"parameter 2 of shape \(2, 2\) stands in its param group a second time.*parameter 0"):
        SOAP([p, q, p])
    optimizer = SOAP([q])
    with pytest.raises(ValueError, match=r"parameter 2 \(b\).*a second time, first as parameter 1 \(a\)"):
        SOAP([("c", q), ("a", p), ("b", p)])
    with pytest.raises(ValueError, match="a second time"):
        optimizer.add_param_group({"params": [p, p]})
    assert len(optimizer.param_groups) == 1


@every_implementation
def test_groups_that_differ_in_lr_and_weight_decay_alone(flags):
    """They share the engine's call; each parameter has its own numbers all the same, and other options keep a group apart."""
    shapes = [(5, 4), (3, 2, 3, 3), (5, 4), (7,), (5, 4)]
    each = [
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.02, "weight_decay": 0.1},
        {"lr": torch.tensor(0.3), "weight_decay": 0.01},
        {"lr": 0.0, "weight_decay": 0.5},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3, "maximize": True},
    ]
    start = random_params(shapes)
    params = [nn.Parameter(p.clone()) for p in start]
    together = SOAP([{"params": [p], **options} for p, options in zip(params, each)], refresh="together", **flags)
    alone = [SoapRun([p], **options, refresh="together", **flags) for p, options in zip(start, each)]
    for number, grads in enumerate(random_gradients(shapes, 12)):
        for i, (p, run, grad) in enumerate(zip(params, alone, grads)):
            missing = number == 3 and i == 1  # t differs within a call
            p.grad = None if missing else grad.clone()
            run.step([None if missing else grad])
        together.step()
    for p, run in zip(params, alone):
        if flags.get("foreach"):  # equal shapes are multiplied as one batch, which rounds otherwise
            torch.testing.assert_close(p, run.params[0], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(p, run.params[0])


def test_optimizers_of_one_parameter_each_spread_their_refreshes():
    """optimizer-in-backward: each has its own units only. Over a transformer's blocks no phase has twice the mean's flops."""
    shapes = [(96, 32), (32, 32), (64, 32), (32, 64)] * 12
    frequency, load = 10, [0.0] * 10
    for i, shape in enumerate(shapes):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = SOAP([p], precondition_frequency=frequency, refresh_start=i)
        for mode, offset in enumerate(refresh_offsets(optimizer)[p]):
            load[offset] += unit_flops(p.numel(), shape[mode])
    assert max(load) < 1.5 * sum(load) / frequency
    # any part of the numbers is spread evenly
    for first, stride in ((0, 4), (3, 5), (1, 10)):
        phases = [start_of(i, 10) for i in range(first, 400, stride)]
        counts = [phases.count(k) for k in range(10)]
        assert max(counts) <= 1.5 * len(phases) / 10
    one, two = (SOAP([nn.Parameter(torch.zeros(4, 3))], refresh_start=start) for start in (0, 1))
    assert list(refresh_offsets(one).values()) == [[0, 1]] and list(refresh_offsets(two).values()) == [[6, 7]]


# ---- warnings, copies, trainers -------------------------------------------------------------------------------------------


@every_implementation
def test_a_warning_that_is_an_error_comes_when_all_groups_are_stepped(flags):
    params = [nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
    optimizer = SOAP([{"params": [p], "eps": 10.0**-i} for i, p in enumerate(params, 6)], **flags)
    for number in range(3):
        for p in params:
            p.grad = torch.randn(3, 2)
        if number == 2:
            params[0].grad[0, 0] = torch.nan
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(UserWarning, match="parameter 0"):
                    optimizer.step()
        else:
            optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [1, 2, 2]
    assert optimizer.skipped_steps() == 1
    optimizer.step()  # of one parameter once


def test_a_loaded_state_adds_nothing_to_the_groups():
    model = model_of()
    optimizer = SOAP(model.parameters())
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    other = SOAP(model_of().parameters())
    for each in (optimizer, other, copy.deepcopy(optimizer)):
        each.load_state_dict(copy.deepcopy(saved))
        assert [group.keys() for group in each.state_dict()["param_groups"]] == [g.keys() for g in saved["param_groups"]]
        assert each.defaults.keys() == SOAP([nn.Parameter(torch.ones(1))]).defaults.keys()


def test_counts_stay_when_a_state_is_loaded():
    run = SoapRun(random_params([(4, 3)]))
    for number, grads in enumerate(random_gradients([(4, 3)], 4)):
        if number == 2:
            with pytest.warns(UserWarning, match="not finite"):
                run.step([grads[0] * torch.nan])
        else:
            run.step(grads)
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    assert run.optimizer.skipped_steps() == 1
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert run.optimizer.skipped_steps() == 1


def test_what_the_host_reads_comes_back_from_a_device():
    """Lightning moves all of a resumed state but `step` to the model's device."""
    run = SoapRun(random_params([(4, 3)]))
    gradients = random_gradients([(4, 3)], 4)
    for grads in gradients[:3]:
        run.step(grads)
    state = run.state_of(0)

    class Elsewhere(torch.Tensor):  # says that it is on a device, and counts who brings it back
        moved = 0

        @property
        def device(self):
            return torch.device("cuda")

        def cpu(self):
            Elsewhere.moved += 1
            return self.as_subclass(torch.Tensor)

    for key in ("initialized", "refresh_offset_0", "refresh_offset_1"):
        state[key] = state[key].as_subclass(Elsewhere)
    run.step(gradients[3])
    assert Elsewhere.moved == 3
    assert all(run.state_of(0)[key].device.type == "cpu" for key in ("initialized", "refresh_offset_0", "refresh_offset_1"))


def test_dtensor_parameters_are_refused_at_construction():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
        with pytest.raises(TypeError, match=r"DTensor parameters yet, and parameter 1 \(sharded\).*DistributedDataParallel"):
            SOAP([("plain", nn.Parameter(torch.ones(2))), ("sharded", p)])
    finally:
        distributed.destroy_process_group()
        gc.collect()


# ---- threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{"foreach": True}, pytest.param({"fused": True}, marks=needs_engine)])
def test_deterministic_algorithms_ask_for_the_same_bits_with_any_number_of_threads(flags):
    """One parameter that outweighs the others, sizes that LAPACK and BLAS get, Grams without full rank."""
    shapes = [(700, 24), (300, 70), (3, 600, 5), (64, 3, 3, 3), (20,)]

    def run(threads):
        torch.set_num_threads(threads)
        soap = SoapRun(random_params(shapes), **flags, precondition_frequency=2, normalize_grads=True)
        for grads in random_gradients(shapes, 4, rank_one=0.5):
            soap.step(grads)
        return [value.clone() for i, p in enumerate(soap.params) for value in (p.detach(), *soap.state_of(i).values())]

    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        first = run(1)
        for count in (2, 3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(count))), count
            assert torch.get_num_threads() == count
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
