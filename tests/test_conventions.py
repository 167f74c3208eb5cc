"""class SOAP keeps torch.optim's conventions: hooks, schedulers, copies."""

import copy
import inspect
import multiprocessing
import pickle
import warnings

import pytest
import torch
from comparison import OracleRun, SoapRun, every_implementation, random_gradients, random_params, run_lockstep
from small_model import assert_same, assert_unchanged, model_of, snapshot, train
from torch import nn

import soap_opt
from soap_opt import SOAP, soap

BOTH = [False, True]


# ---- learning rate, closures, hooks, schedulers ---------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_learning_rate(flags, shape):
    lr = torch.full(shape, 0.25)
    by_tensor = SoapRun(random_params([(4, 3)]), lr=lr, **flags, weight_decay=0.5)
    by_float = SoapRun(random_params([(4, 3)]), lr=0.25, **flags, weight_decay=0.5)
    for number, grads in enumerate(random_gradients([(4, 3)], 6)):
        if number == 3:
            lr.fill_(0.125)  # in place, as a scheduler does
            by_float.optimizer.param_groups[0]["lr"] = 0.125
        by_tensor.step(grads)
        by_float.step(grads)
        assert torch.equal(by_tensor.params[0], by_float.params[0])
    assert by_tensor.optimizer.param_groups[0]["lr"] is lr


def test_the_closure_runs_with_gradients_enabled():
    model = model_of()
    optimizer = SOAP(model.parameters(), lr=0.01)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(torch.ones(3, 6)).square().mean()
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses == calls and losses[-1] < losses[0]
    assert optimizer.step() is None


def test_step_and_state_dict_hooks():
    model = model_of()
    optimizer = SOAP(model.parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append(f"load pre {state['extra']}"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("load post"))
    train(model, optimizer, 1)
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["pre", "post", "state_dict pre", "load pre 1", "load post"]


def test_a_step_pre_hook_may_change_gradients_and_the_closure():
    model, other = model_of(), model_of()
    clipped, plain = SOAP(model.parameters()), SOAP(other.parameters())
    clipped.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None)
    assert not torch.equal(train(model, clipped)[0], train(other, plain)[0])
    changed = []
    clipped.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: changed.append(1)), {}))
    clipped.step()
    assert changed == [1]


def test_global_optimizer_hooks():
    from torch.optim.optimizer import register_optimizer_step_post_hook

    seen = []
    handle = register_optimizer_step_post_hook(lambda opt, *_: seen.append(type(opt)))
    try:
        train(model_of(), SOAP(model_of().parameters()), 0)
        model = model_of()
        train(model, SOAP(model.parameters()), 2)
    finally:
        handle.remove()
    assert seen == [SOAP, SOAP]


SCHEDULERS = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: torch.optim.lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=2),  # cycles betas[0]
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=10),  # cycles betas[0]
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 1e-4, anneal_epochs=3),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: torch.optim.lr_scheduler.ChainedScheduler(
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)]
    ),
}


def test_every_scheduler_of_torch_is_here():
    ours = {
        name
        for name, value in vars(torch.optim.lr_scheduler).items()
        if inspect.isclass(value) and not name.startswith("_") and issubclass(value, torch.optim.lr_scheduler.LRScheduler)
    }
    assert ours - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("tensor_lr", BOTH, ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tensor_lr):
    """Against the oracle that is given the scheduler's lr and betas by hand: they take effect at the next step."""
    shapes = [(4, 3), (3,)]
    run = SoapRun(random_params(shapes), lr=torch.tensor(0.01) if tensor_lr else 0.01, refresh="together", shampoo_beta=0.9)
    reference = OracleRun(random_params(shapes), shampoo_beta=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = SCHEDULERS[name](run.optimizer)
    seen, options = set(), {"shampoo_beta": 0.9}

    def schedule(number):
        if number:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        group = run.optimizer.param_groups[0]
        options.update(lr=float(group["lr"]), betas=tuple(float(b) for b in group["betas"]))
        reference.oracle.options.update(options)
        seen.add((options["lr"], options["betas"][0]))

    run_lockstep(run, reference, random_gradients(shapes, 8), options, schedule)
    assert len(seen) > 1
    if name in ("CyclicLR", "OneCycleLR"):
        assert len({beta for _, beta in seen}) > 1
    scheduler.load_state_dict(scheduler.state_dict())


# ---- copies ---------------------------------------------------------------------------------------------------------------


def copy_by_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("copier", [copy.deepcopy, copy_by_pickle])
def test_copies_of_model_and_optimizer_go_on_alike(copier, before):
    """Copied together, the copy optimises the copied model; the original is not touched by it."""
    model = model_of()
    optimizer = SOAP(model.parameters(), precondition_frequency=2)
    train(model, optimizer, before)
    other, twin = copier((model, optimizer))
    assert twin.param_groups[0]["params"][0] is other[0].weight
    kept = snapshot(optimizer)
    result = train(other, twin, 5, seed=9)
    assert_unchanged(optimizer, kept)
    assert_same(train(model, optimizer, 5, seed=9), result)
    assert_unchanged(optimizer, snapshot(twin))


def test_copies_keep_the_count_of_skipped_steps():
    run = SoapRun(random_params([(4, 3), (2,)]))
    with pytest.warns(UserWarning, match="not finite"):
        run.step([torch.full((4, 3), float("nan")), torch.ones(2)])
    for copier in (copy.deepcopy, copy_by_pickle):
        assert copier(run.optimizer).skipped_steps(per_parameter=True) == [1, 0]


def test_setstate_fills_what_an_older_version_lacks():
    run, plain = (SoapRun(random_params([(4, 3)]), refresh="staggered") for _ in range(2))
    gradients = random_gradients([(4, 3)], 6)
    for grads in gradients[:3]:
        run.step(grads)
        plain.step(grads)
    state = run.optimizer.__getstate__()
    groups = [dict(group) for group in state["param_groups"]]
    for name in ("shampoo_beta", "refresh", "refresh_tolerance", "maximize", "capturable", "foreach", "fused", "data_format"):
        del groups[0][name]
    tensors = {p: {**s, "step": float(s["step"])} for p, s in state["state"].items()}
    old = SOAP.__new__(SOAP)
    old.__setstate__({"defaults": state["defaults"], "state": tensors, "param_groups": groups})
    assert old.param_groups[0]["refresh"] == "staggered" and old.param_groups[0]["foreach"] is None
    assert torch.is_tensor(old.state[run.params[0]]["step"])
    for grads in gradients[3:]:
        run.params[0].grad = grads[0].clone()
        old.step()
        plain.step(grads)
    assert torch.equal(run.params[0], plain.params[0])
    assert old.skipped_steps() == 0


def child(model, optimizer, threads, queue):
    torch.set_num_threads(threads)  # sums are taken in the order of the parent's
    train(model, optimizer, 2)
    queue.put([p.detach().sum().item() for p in model.parameters()])


@pytest.mark.slow
def test_an_optimizer_of_an_older_version_takes_another_group():
    optimizer = SOAP(random_params([(4, 3)]))
    state = optimizer.__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        for name in ("overlap_refresh", "fused", "refresh"):
            del options[name]
    restored = SOAP.__new__(SOAP)
    restored.__setstate__(state)
    (added,) = random_params([(2, 5)])
    restored.add_param_group({"params": [added]})
    for grads in random_gradients([(2, 5)], 2):
        added.grad = grads[0]
        restored.step()
    assert restored.state[added]["step"] == 1


@every_implementation
def test_betas_of_groups_may_be_lists(flags):
    """As a configuration file has them. Groups that share a call are told by their options, which betas are a part of."""
    shapes, runs = [(4, 3), (5, 2)], []
    for kind in (list, tuple):
        params = random_params(shapes)
        optimizer = SOAP(
            [{"params": [p], "betas": kind((0.8, 0.9)), "lr": 0.1 * (i + 1)} for i, p in enumerate(params)], **flags
        )
        for grads in random_gradients(shapes, 4):
            for param, grad in zip(params, grads):
                param.grad = grad
            optimizer.step()
        runs.append(params)
    assert all(map(torch.equal, *runs))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch wants gradients of the parameter's dtype")
@every_implementation
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_gradient_of_another_dtype_than_its_parameter(flags, dtype, grad_dtype):
    """The state is of the parameter's dtype."""
    param = nn.Parameter(random_params([(4, 3)])[0].detach().to(dtype))
    param.grad_dtype = grad_dtype
    optimizer = SOAP([param], **flags)
    before = param.detach().clone()
    for grads in random_gradients([(4, 3)], 3):
        param.grad = grads[0].to(grad_dtype)
        optimizer.step()
    state = optimizer.state[param]
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "gram_0", "basis_0", "gram_1", "basis_1")} == {dtype}
    assert not torch.equal(param, before)


def test_shared_memory_and_another_process():
    """A shared model trained by a child process (Hogwild): the optimizer pickles through multiprocessing."""
    model, twin = model_of(), model_of()
    model.share_memory()
    optimizer, other = SOAP(model.parameters()), SOAP(twin.parameters())
    train(model, optimizer, 2)
    train(twin, other, 2)
    for state in optimizer.state.values():
        for value in state.values():
            value.share_memory_()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(model, optimizer, torch.get_num_threads(), queue))
    process.start()
    queue.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    train(twin, other, 2)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert multiprocessing.active_children() == []


def test_repr_names_the_options():
    text = repr(SOAP([nn.Parameter(torch.ones(2, 2))], lr=0.5))
    assert text.startswith("SOAP (") and "lr: 0.5" in text and "refresh: staggered" in text


# ---- frequencies, training, names -----------------------------------------------------------------------------------------


def test_a_very_large_precondition_frequency_means_never():
    """10^12 must neither be slow nor overflow, and its offsets must not make a unit due."""
    for refresh in ("together", "staggered", "adaptive"):
        run = SoapRun(random_params([(6, 5), (4, 4)]), precondition_frequency=10**12, refresh=refresh)
        gradients = random_gradients([(6, 5), (4, 4)], 6)
        run.step(gradients[0])
        kept = run.state_of(0)["basis_0"].clone()
        for grads in gradients[1:]:
            run.step(grads)
        assert torch.equal(run.state_of(0)["basis_0"], kept)


def test_a_frequency_given_as_a_numpy_integer():
    import numpy

    runs = [SoapRun(random_params([(4, 3)]), precondition_frequency=f) for f in (2, numpy.int64(2))]
    for grads in random_gradients([(4, 3)], 6):
        for run in runs:
            run.step(grads)
    assert torch.equal(runs[0].params[0], runs[1].params[0])


def test_training_really_trains():
    """Ill-conditioned least squares: SOAP is far below Adam's loss after the same steps at the same learning rate."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(256, 12, generator=generator)
        @ torch.diag(torch.logspace(0, -2, 12))
        @ torch.randn(12, 12, generator=generator)
    )
    y = x @ torch.randn(12, 8, generator=generator)
    losses = {}
    for name in ("SOAP", "Adam"):
        weight = nn.Parameter(torch.zeros(12, 8))
        optimizer = SOAP([weight], lr=0.05, weight_decay=0) if name == "SOAP" else torch.optim.Adam([weight], lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (x @ weight - y).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["SOAP"] < 0.5 * losses["Adam"]


def test_public_names():
    assert set(soap_opt.__all__) == {"SOAP", "__version__", "load_original_state_dict", "memory_report"}
    assert soap.SOAP is SOAP and issubclass(SOAP, torch.optim.Optimizer)
    assert "project back" in SOAP.__doc__ and "Deviations" in SOAP.__doc__
