"""class SOAP: torch.optim's conventions. Arguments, groups, hooks, schedulers, the guard, and what may stand around a step."""

import copy
import gc
import inspect
import multiprocessing
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from comparison import OracleRun, SoapRun, random_gradients, random_params, run_lockstep
from oracle import Oracle
from torch import nn

import soap_opt
from soap_opt import SOAP, soap

BOTH = [False, True]


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def train(model, optimizer, steps=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(7, 6, generator=generator)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a, b):
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q)


def snapshot(optimizer):
    """Everything that a step may change."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p.detach().clone(), {key: value.clone() for key, value in optimizer.state.get(p, {}).items()}) for p in params]


def assert_unchanged(optimizer, before):
    for (p, state), (q, old) in zip(snapshot(optimizer), before, strict=True):
        assert torch.equal(p, q)
        assert state.keys() == old.keys()
        for key in state:
            assert torch.equal(state[key], old[key]), key


# ---- arguments ------------------------------------------------------------------------------------------------------------


def test_signature():
    """torch.optim.Adam's positional order, everything else keyword-only, the original's defaults."""
    parameters = inspect.signature(SOAP).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["params", "lr", "betas", "eps", "weight_decay"]
    assert positional == list(inspect.signature(torch.optim.Adam).parameters)[:5]
    named = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert named == {
        "shampoo_beta": None,
        "precondition_frequency": 10,
        "max_precond_dim": 10000,
        "merge_dims": False,
        "precondition_1d": False,
        "normalize_grads": False,
        "data_format": "channels_first",
        "correct_bias": True,
        "refresh": "staggered",
        "refresh_tolerance": 0.01,
        "maximize": False,
        "max_grad_norm": None,
        "precision": "highest",
        "capturable": False,
        "foreach": None,
        "fused": None,
    }
    defaults = {n: parameters[n].default for n in positional[1:]}
    assert defaults == {"lr": 3e-3, "betas": (0.95, 0.95), "eps": 1e-8, "weight_decay": 0.01}


def test_one_line_replaces_adam():
    """The same call as torch.optim.Adam's, by position and by name."""
    model = model_of()
    by_name = SOAP(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-9, weight_decay=0.1)
    by_position = SOAP(model.parameters(), 1e-3, (0.9, 0.999), 1e-9, 0.1)
    assert by_name.defaults == by_position.defaults
    train(model, by_name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1}, ValueError, "Invalid learning rate: -1"),
        ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
        ({"lr": torch.tensor([1.0, 2.0])}, ValueError, "Tensor lr must be 1-element"),
        ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1"),
        ({"betas": (0.9,)}, ValueError, "betas must be two numbers"),
        ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
        ({"weight_decay": -0.5}, ValueError, "Invalid weight_decay value: -0.5"),
        ({"shampoo_beta": 1.5}, ValueError, "Invalid shampoo_beta value: 1.5"),
        ({"precondition_frequency": 0}, ValueError, "Invalid precondition_frequency value: 0"),
        ({"precondition_frequency": 2.5}, ValueError, "Invalid precondition_frequency value: 2.5"),
        ({"precondition_frequency": 2.0}, ValueError, "Invalid precondition_frequency value: 2.0"),
        ({"precondition_frequency": float("inf")}, ValueError, "Invalid precondition_frequency value: inf"),
        ({"precondition_frequency": True}, ValueError, "Invalid precondition_frequency value: True"),
        ({"max_precond_dim": "big"}, ValueError, "Invalid max_precond_dim value: big"),
        ({"max_precond_dim": -1}, ValueError, "Invalid max_precond_dim value: -1"),
        ({"data_format": "nhwc"}, ValueError, "Invalid data_format: 'nhwc'"),
        ({"refresh": "sometimes"}, ValueError, "Invalid refresh policy: 'sometimes'"),
        ({"refresh_tolerance": -0.1}, ValueError, "Invalid refresh_tolerance value: -0.1"),
        ({"foreach": True, "fused": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
        ({"amsgrad": True}, TypeError, "amsgrad=True: .*eigenbases"),
        ({"differentiable": True}, TypeError, "differentiable=True: .*derivative"),
        ({"momentum": 0.9}, TypeError, "unexpected keyword argument 'momentum'"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        SOAP([nn.Parameter(torch.ones(2, 2))], **options)
    if error is ValueError:  # the same checks for a group, and nothing of it stays behind
        optimizer = SOAP([nn.Parameter(torch.ones(2, 2))])
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], **options})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "Invalid learning rate: -1"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"eps": -1}, "Invalid epsilon value: -1"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ],
)
def test_messages_are_torch_s(options, message):
    for optimizer in (SOAP, torch.optim.Adam):
        with pytest.raises(ValueError, match=message):
            optimizer([nn.Parameter(torch.ones(2, 2))], **options)


def test_adam_s_arguments_that_are_off_are_accepted():
    SOAP([nn.Parameter(torch.ones(2, 2))], amsgrad=False, differentiable=False, maximize=False)


def test_complex_parameters_are_refused():
    with pytest.raises(RuntimeError, match="complex parameters, but parameter 1 is torch.complex64"):
        SOAP([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


def test_sparse_gradients_are_refused_and_nothing_changes():
    dense = nn.Parameter(torch.ones(3, 2))
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = SOAP([{"params": [("dense", dense)]}, {"params": [("table", embedding.weight)]}])
    before = snapshot(optimizer)
    dense.grad = torch.ones(3, 2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients, but that of parameter 1 \(table\) of shape \(4, 3\)"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_an_empty_parameter_list_is_torch_s_error():
    with pytest.raises(ValueError, match="empty parameter list"):
        SOAP([])
    with pytest.raises(TypeError, match="params argument given to the optimizer"):
        SOAP(torch.ones(2))
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        SOAP([torch.ones(2, requires_grad=True) * 2])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        SOAP([1.0])


def test_generators_groups_and_names():
    model = model_of()
    reference = train(model_of(), SOAP(list(model_of().parameters())), 0)
    assert_same(reference, model.parameters())
    results = []
    for make in (
        lambda m: m.parameters(),
        lambda m: list(m.parameters()),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters()}],
        lambda m: [{"params": m[0].named_parameters()}, {"params": m[2].named_parameters()}],
    ):
        model = model_of()
        results.append(train(model, SOAP(make(model), refresh="together", precondition_frequency=2), 6))
    for other in results[1:]:
        assert_same(results[0], other)
    assert SOAP(model.named_parameters()).param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="some parameters appear in more than one|duplicate|more than one"):
        SOAP([{"params": [model[0].weight]}, {"params": [model[0].weight]}])


def test_groups_have_their_own_options():
    """Each group runs as an optimizer of its own would."""
    shapes, options = [(4, 3), (5, 5)], [{"lr": 0.1, "betas": (0.9, 0.9)}, {"weight_decay": 0.5, "max_precond_dim": 0}]
    params = random_params(shapes)
    together = [nn.Parameter(p.clone()) for p in params]
    optimizer = SOAP([{"params": [p], **o} for p, o in zip(together, options)], refresh="together", precondition_frequency=2)
    apart = [SoapRun([p], refresh="together", precondition_frequency=2, **o) for p, o in zip(params, options)]
    for grads in random_gradients(shapes, 6):
        for p, run, grad in zip(together, apart, grads):
            p.grad = grad.clone()
            run.step([grad])
        optimizer.step()
    for p, run in zip(together, apart):
        assert torch.equal(p, run.params[0])


def test_an_empty_group_and_a_group_without_gradients():
    model = model_of()
    optimizer = SOAP([{"params": []}, {"params": model.parameters()}, {"params": [nn.Parameter(torch.ones(2, 2))]}])
    train(model, optimizer)
    assert len(optimizer.state) == 4
    optimizer.zero_grad()
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before)


def test_parameters_that_require_no_gradient_are_left_alone():
    model = model_of()
    model[0].weight.requires_grad_(False)
    kept = model[0].weight.clone()
    optimizer = SOAP(model.parameters())
    train(model, optimizer)
    assert torch.equal(model[0].weight, kept)
    assert model[0].weight not in optimizer.state
    with pytest.raises(KeyError):
        optimizer.state_dict()["state"][0]


def test_zero_size_and_scalar_parameters():
    shapes = [(0,), (0, 3), (3, 0, 2), (), (1,), (1, 1, 1, 1, 1)]
    for foreach in BOTH:
        for options in ({}, {"merge_dims": True}, {"precondition_1d": True}):
            run = SoapRun(random_params(shapes), foreach=foreach, precondition_frequency=1, **options)
            for grads in random_gradients(shapes, 5):
                run.step(grads)
            for i, shape in enumerate(shapes):
                assert not any(key.startswith("gram_") for key in run.state_of(i)), (shape, options)
            assert float(run.state_of(3)["step"]) == 4
    copy.deepcopy(run.optimizer).load_state_dict(run.optimizer.state_dict())


def test_tied_parameters_count_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    optimizer = SOAP(model.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 2
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert float(optimizer.state[layer.weight]["step"]) == 2


def test_a_warning_for_a_mode_above_4096():
    """merge_dims=True can do that: a (64, 65) weight gets a 4160 x 4160 Gram."""
    weight = nn.Parameter(torch.zeros(64, 65))
    with pytest.warns(UserWarning, match=r"4160 x 4160 matrix for parameter 0 of shape \(64, 65\).*merge_dims=False") as caught:
        SOAP([weight], merge_dims=True)
    assert caught[0].filename == __file__  # it points at the caller's line
    with pytest.warns(UserWarning, match=r"parameter 1 \(wide\) of shape \(5000, 2\)"):
        SOAP([("small", nn.Parameter(torch.zeros(2, 2))), ("wide", nn.Parameter(torch.zeros(5000, 2)))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SOAP([weight])
        SOAP([nn.Parameter(torch.zeros(64, 64))], merge_dims=True)  # 4096 itself is not above it
        SOAP([nn.Parameter(torch.zeros(5000, 2))], max_precond_dim=4096)
        SOAP([nn.Parameter(torch.zeros(5000))])


# ---- state ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_state_is_plain_tensors_under_flat_keys(device, dtype):
    run = SoapRun(random_params([(6, 1, 3)], dtype=dtype, device=device))
    for grads in random_gradients([(6, 1, 3)], 3, dtype=dtype, device=device):
        run.step(grads)
    state = run.state_of(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "step": (torch.float32, ()),
        "initialized": (torch.bool, ()),
        "exp_avg": (wide, (6, 1, 3)),
        "exp_avg_sq": (wide, (6, 1, 3)),
        "gram_0": (wide, (6, 6)),
        "basis_0": (wide, (6, 6)),
        "refresh_offset_0": (torch.int64, ()),
        "gram_2": (wide, (3, 3)),
        "basis_2": (wide, (3, 3)),
        "refresh_offset_2": (torch.int64, ()),
    }
    for value in state.values():
        assert not value.requires_grad and value.is_contiguous()
    for key in ("exp_avg", "exp_avg_sq", "gram_0", "basis_2"):
        assert state[key].device.type == torch.device(device).type
    # a view of a stack would drag the whole stack into every checkpoint
    for value in state.values():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_no_state_tensor_drags_a_batch_along():
    """Batched eigh and QR make stacks; none of them may stay behind as a view's storage."""
    shapes = [(8, 8)] * 6 + [(8, 70)] * 2
    run = SoapRun(random_params(shapes), foreach=True, precondition_frequency=1)
    for grads in random_gradients(shapes, 4):
        run.step(grads)
    for i in range(len(shapes)):
        for key, value in run.state_of(i).items():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), key


@pytest.mark.parametrize("foreach", BOTH)
def test_gradients_missing_on_some_steps(foreach):
    """A parameter without a gradient is as if the step had not been; its t counts its own steps."""
    shapes = [(6, 5), (4, 3)]
    params = random_params(shapes)
    both = SoapRun(params, foreach=foreach, refresh="together", precondition_frequency=2)
    alone = SoapRun(params[1:], foreach=foreach, refresh="together", precondition_frequency=2)
    for number, grads in enumerate(random_gradients(shapes, 12)):
        absent = number % 3 == 1
        both.step([grads[0], None if absent else grads[1]])
        if not absent:
            alone.step(grads[1:])
    assert float(both.state_of(0)["step"]) == 11 and float(both.state_of(1)["step"]) == 7
    # not to the bit: elementwise kernels round a vector and its tail differently (with and without FMA)
    torch.testing.assert_close(both.params[1], alone.params[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("foreach", BOTH)
def test_parameters_added_later(foreach):
    """A late group starts with its own first gradient and leaves the others as they would have been."""
    shapes = [(6, 5), (4, 3)]
    params = random_params(shapes)
    run = SoapRun(params[:1], foreach=foreach, precondition_frequency=2, refresh="together")
    alone = SoapRun(params[:1], foreach=foreach, precondition_frequency=2, refresh="together")
    late = nn.Parameter(params[1].clone())
    late_alone = SoapRun(params[1:], foreach=foreach, precondition_frequency=2, refresh="together", lr=0.5)
    for number, grads in enumerate(random_gradients(shapes, 10)):
        if number == 4:
            run.optimizer.add_param_group({"params": late, "lr": 0.5})
        if number >= 4:
            late.grad = grads[1].clone()
            late_alone.step(grads[1:])
        run.step(grads[:1])
        alone.step(grads[:1])
    assert torch.equal(run.params[0], alone.params[0])
    assert torch.equal(late, late_alone.params[0])
    assert float(run.optimizer.state[late]["step"]) == 5


def test_an_all_zero_first_gradient_waits():
    """It allocates state but makes no basis of a zero Gram: the first gradient that says something does."""
    shapes = [(6, 5), (4,)]
    for foreach in BOTH:
        options = {"refresh": "together", "precondition_frequency": 2, "lr": 0.01, "weight_decay": 0.1}
        waiting, prompt = (SoapRun(random_params(shapes), foreach=foreach, **options) for _ in range(2))
        start = [p.detach().clone() for p in waiting.params]
        for _ in range(2):
            waiting.step([torch.zeros(6, 5), torch.zeros(4)])
            assert_same(waiting.params, start)
            assert all(not waiting.state_of(i)["initialized"] for i in range(2))
            assert not waiting.state_of(0)["gram_0"].any()
        gradients = random_gradients(shapes, 8)
        gradients[3] = [torch.zeros(6, 5), torch.zeros(4)]  # a later one is a gradient like any other
        for grads in gradients:
            waiting.step(grads)
            prompt.step(grads)
        assert_unchanged(waiting.optimizer, snapshot(prompt.optimizer))
        oracle = OracleRun(random_params(shapes), **options)
        again = SoapRun(random_params(shapes), foreach=foreach, **options)
        zeros = [[torch.zeros(6, 5), torch.zeros(4)]]
        run_lockstep(again, oracle, zeros + gradients, options)


@pytest.mark.parametrize(
    "change",
    [
        {"max_precond_dim": 3},
        {"merge_dims": True},
        {"precondition_1d": True},
        {"data_format": "channels_last"},
    ],
    ids=str,
)
def test_options_that_shape_the_state_may_not_change_under_it(change):
    shapes = [(6, 5), (4,)]
    run = SoapRun(random_params(shapes))
    gradients = random_gradients(shapes, 3)
    group = run.optimizer.param_groups[0]
    original = {name: group[name] for name in change}
    group.update(change)  # before there is state they may
    run.step(gradients[0])
    group.update(original)
    before = snapshot(run.optimizer)
    (name, value), *_ = original.items()
    with pytest.raises(ValueError, match=rf"parameter 0 of shape \(6, 5\) has state.*{name}.*to {value!r}"):
        run.step(gradients[1])
    assert_unchanged(run.optimizer, before)
    group.update(change)
    run.step(gradients[1])
    assert float(run.state_of(0)["step"]) == 1


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"precondition_frequency": 0}, {"refresh": "never"}])
def test_bad_values_put_into_a_group_are_found_at_the_next_step(bad):
    run = SoapRun(random_params([(4, 3)]))
    gradients = random_gradients([(4, 3)], 2)
    run.step(gradients[0])
    run.optimizer.param_groups[0].update(bad)
    before = snapshot(run.optimizer)
    with pytest.raises(ValueError, match="Invalid"):
        run.step(gradients[1])
    assert_unchanged(run.optimizer, before)


def test_tampered_state_takes_effect():
    """optimizer.state is the user's: the next step uses what stands there, nothing cached."""
    options = {"refresh": "together", "precondition_frequency": 2}
    for foreach in BOTH:
        run, twin = SoapRun(random_params([(6, 5)]), foreach=foreach, **options), OracleRun(random_params([(6, 5)]), **options)

        def tamper(number, run=run):
            if number == 3:
                state = run.state_of(0)
                state["exp_avg"].zero_()
                state["exp_avg_sq"] = 2 * state["exp_avg_sq"]  # another tensor object
                state["basis_0"] = torch.linalg.qr(torch.randn(6, 6)).Q
                state["gram_1"] = state["gram_1"].clone().mul_(3)
                state["step"] = torch.tensor(7.0)

        run_lockstep(run, twin, random_gradients([(6, 5)], 8), options, tamper)


def test_state_cleared_starts_afresh():
    run, fresh = SoapRun(random_params([(4, 3)])), SoapRun(random_params([(4, 3)]))
    gradients = random_gradients([(4, 3)], 6)
    run.step(gradients[0])
    run.optimizer.state.clear()
    for grads in gradients[1:]:
        run.step(grads)
        fresh.step(grads)
    assert_unchanged(run.optimizer, snapshot(fresh.optimizer))


def test_the_optimizer_is_collected():
    """No cycle through hooks or module-level caches keeps parameters alive."""
    run = SoapRun(random_params([(4, 3)]))
    run.step(random_gradients([(4, 3)], 1)[0])
    reference = weakref.ref(run.params[0])
    del run
    gc.collect()
    assert reference() is None


# ---- learning rate, closures, hooks, schedulers ---------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", BOTH)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_learning_rate(foreach, shape):
    lr = torch.full(shape, 0.25)
    by_tensor = SoapRun(random_params([(4, 3)]), lr=lr, foreach=foreach, weight_decay=0.5)
    by_float = SoapRun(random_params([(4, 3)]), lr=0.25, foreach=foreach, weight_decay=0.5)
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
    oracle = Oracle(random_params(shapes), shampoo_beta=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = SCHEDULERS[name](run.optimizer)
    seen = set()
    for grads in random_gradients(shapes, 8):
        group = run.optimizer.param_groups[0]
        seen.add((float(group["lr"]), float(group["betas"][0])))
        oracle.options.update(lr=float(group["lr"]), betas=tuple(float(b) for b in group["betas"]))
        run.step(grads)
        oracle.step(grads)
        for p, q in zip(run.params, oracle.params):
            torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-6)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(seen) > 1
    if name in ("CyclicLR", "OneCycleLR"):
        assert len({beta for _, beta in seen}) > 1
    scheduler.load_state_dict(scheduler.state_dict())


# ---- GradScaler and the guard ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", BOTH)
def test_grad_scaler_on_the_cpu(foreach):
    """Scaled training equals unscaled training (powers of two round nothing), inf gradients are skipped whole."""
    scaled, plain = model_of(), model_of()
    optimizers = [SOAP(m.parameters(), foreach=foreach, precondition_frequency=2) for m in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for number in range(8):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(scaled(x).square().mean()).backward()
        plain(x).square().mean().backward()
        if number == 4:
            scaled[0].bias.grad[0] = float("inf")
            before = snapshot(optimizers[0])
            scaler.step(optimizers[0])
            assert_unchanged(optimizers[0], before)
            assert optimizers[0].skipped_steps() == 0  # the scaler's step, not a parameter's
            scaler.update()
            assert scaler.get_scale() == 2.0**9
            continue
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
    assert_same(scaled.parameters(), plain.parameters())
    assert_unchanged(optimizers[0], snapshot(optimizers[1]))
    assert float(optimizers[0].state[scaled[0].weight]["step"]) == 6


def test_grad_scaler_with_an_unscale_before_clipping():
    """After scaler.unscale_ nothing may be divided out again."""
    scaled, plain = model_of(), model_of()
    optimizers = [SOAP(m.parameters(), precondition_frequency=2) for m in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(5):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(scaled(x).square().mean()).backward()
        plain(x).square().mean().backward()
        scaler.unscale_(optimizers[0])
        for model in (scaled, plain):
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
    assert_same(scaled.parameters(), plain.parameters())


def test_a_first_gradient_that_the_scaler_rejects_leaves_no_state():
    model = model_of()
    optimizer = SOAP(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(1, 6)).sum()).backward()
    model[0].weight.grad[0, 0] = float("nan")
    scaler.step(optimizer)
    scaler.update()
    assert all(not state or not state["initialized"] for state in optimizer.state.values())


def test_found_inf_by_attribute(device):
    """GradScaler's protocol for optimizers that say _step_supports_amp_scaling: attributes, tensors on any device."""
    assert SOAP._step_supports_amp_scaling
    run = SoapRun(random_params([(4, 3)], device=device))
    gradients = random_gradients([(4, 3)], 3, device=device)
    run.step(gradients[0])
    run.optimizer.found_inf = torch.ones((), device=device)
    before = snapshot(run.optimizer)
    run.step(gradients[1])
    assert_unchanged(run.optimizer, before)
    run.optimizer.found_inf = torch.zeros((), device=device)
    run.step(gradients[1])
    assert float(run.state_of(0)["step"]) == 1


def test_a_disabled_grad_scaler():
    scaled, plain = model_of(), model_of()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = SOAP(scaled.parameters())
    train(plain, SOAP(plain.parameters()), 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(scaled(torch.randn(7, 6, generator=generator)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(scaled.parameters(), plain.parameters())


BAD = {
    "nan": lambda g: g.index_fill(0, torch.tensor(0), float("nan")),
    "inf": lambda g: g.index_fill(0, torch.tensor(0), float("inf")),
    "-inf": lambda g: g.index_fill(0, torch.tensor(0), -float("inf")),
    "all nan": lambda g: g * float("nan"),
    "finite, its squared norm is not": lambda g: g * 1e25,
    "finite, only the sum of the squares is not": lambda g: torch.full_like(g, 1.2e19),
}


@pytest.mark.parametrize("first", BOTH, ids=["later", "first gradient"])
@pytest.mark.parametrize("foreach", BOTH)
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore:SOAP. the gradient of")
def test_a_bad_gradient_touches_nothing_but_the_count(kind, foreach, first):
    """One bad parameter among equal shapes (they are batched): it stays, the others go on to the bit as without it."""
    shapes = [(4, 3), (4, 3), (4, 3), (3,)]
    run, others = (SoapRun(random_params(shapes), foreach=foreach, precondition_frequency=1) for _ in range(2))
    for number, grads in enumerate(random_gradients(shapes, 6)):
        grads = list(grads)
        if number == (0 if first else 3):
            before = snapshot(run.optimizer)[1]
            run.step([grads[0], BAD[kind](grads[1]), *grads[2:]])
            others.step([grads[0], None, *grads[2:]])
            after = snapshot(run.optimizer)[1]
            assert torch.equal(before[0], after[0])
            assert before[1].keys() == after[1].keys() or not after[1]["initialized"]
            for key in before[1]:
                assert torch.equal(before[1][key], after[1][key]), key
        else:
            run.step(grads)
            others.step(grads)
    assert run.optimizer.skipped_steps() == 1
    assert run.optimizer.skipped_steps(per_parameter=True) == [0, 1, 0, 0]
    for i in range(4):
        torch.testing.assert_close(run.params[i], others.params[i], rtol=1e-5, atol=1e-6)
        assert float(run.state_of(i)["step"]) == (4 if i == 1 else 5)


def test_one_warning_for_each_parameter():
    """And its text names the parameter; the warning points at the caller's line."""
    params = [nn.Parameter(p) for p in random_params([(4, 3), (3,)])]
    optimizer = SOAP([("weight", params[0]), ("bias", params[1])])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(5):
            params[0].grad = torch.full((4, 3), float("nan")) if number else torch.ones(4, 3)
            params[1].grad = torch.full((3,), float("nan")) if number > 2 else torch.ones(3)
            optimizer.step()
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and {w.filename for w in caught} == {__file__}
    assert "parameter 0 (weight) of shape (4, 3)" in texts[0] and "parameter 1 (bias) of shape (3,)" in texts[1]
    assert optimizer.skipped_steps() == 4 + 2
    assert optimizer.skipped_steps(per_parameter=True) == [4, 2]


def test_a_gradient_that_overflows_float16_only():
    """70,000 is inf in float16 but state is float32: only what the gradient itself cannot hold is bad."""
    run = SoapRun([torch.zeros(2, 2, dtype=torch.float16)], lr=0.1)
    for value in (1.0, 60000.0, 60000.0):
        run.step([torch.full((2, 2), value, dtype=torch.float16)])
    assert run.optimizer.skipped_steps() == 0 and run.params[0].isfinite().all() and (run.params[0] < 0).all()


@pytest.mark.parametrize("foreach", BOTH)
def test_tiny_and_huge_gradients_stay_finite(foreach):
    for scale in (1e-30, 1e-20, 1e15):
        run = SoapRun(random_params([(6, 5), (4,)]), foreach=foreach, precondition_frequency=1)
        for grads in random_gradients([(6, 5), (4,)], 6):
            run.step([g * scale for g in grads])
        assert run.optimizer.skipped_steps() == 0
        for i in range(2):
            assert run.params[i].isfinite().all()
            assert all(value.isfinite().all() for value in run.state_of(i).values())


class FailingEigh:
    """torch.linalg.eigh that does not converge for some dtypes."""

    def __init__(self, *dtypes):
        self.original, self.dtypes, self.calls = torch.linalg.eigh, dtypes, []

    def __call__(self, matrix, *args, **kwargs):
        self.calls.append((matrix.dtype, tuple(matrix.shape)))
        if matrix.dtype in self.dtypes:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return self.original(matrix, *args, **kwargs)


def test_eigh_is_retried_in_float64(monkeypatch):
    eigh = FailingEigh(torch.float32)
    run, plain = SoapRun(random_params([(6, 5), (6, 5)])), SoapRun(random_params([(6, 5), (6, 5)]))
    grads = random_gradients([(6, 5), (6, 5)], 1)[0]
    plain.step(grads)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", eigh)
        run.step(grads)
    assert {dtype for dtype, _ in eigh.calls} == {torch.float32, torch.float64}
    for i in range(2):
        for key in ("basis_0", "basis_1"):
            got, want = run.state_of(i)[key], plain.state_of(i)[key]
            assert got.dtype == torch.float32
            signs = (got * want).sum(0).sign()
            rank = 5  # a 6 x 5 gradient: the sixth eigenvector of the 6 x 6 Gram is free up to sign too
            torch.testing.assert_close((got * signs)[:, :rank], want[:, :rank], rtol=1e-3, atol=1e-3)


def test_eigh_that_fails_in_float64_too(monkeypatch):
    """An error that names the parameter's index, shape and step; nothing has changed, of no parameter."""
    params = [nn.Parameter(p) for p in random_params([(3, 3), (6, 5)])]
    optimizer = SOAP([("first", params[0]), ("second", params[1])])
    gradients = random_gradients([(3, 3), (6, 5)], 3)
    params[0].grad = gradients[0][0]
    optimizer.step()
    for param, grad in zip(params, gradients[1]):
        param.grad = grad
    before = snapshot(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", FailingEigh(torch.float32, torch.float64))
        message = r"mode 0 of parameter 1 \(second\) of shape \(6, 5\) at step 0.*float32 and in float64"
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.step()  # and it can go on
    assert bool(optimizer.state[params[1]]["initialized"])


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


def child(model, optimizer, queue):
    train(model, optimizer, 2)
    queue.put([p.detach().sum().item() for p in model.parameters()])


@pytest.mark.slow
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
    process = context.Process(target=child, args=(model, optimizer, queue))
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


# ---- what may stand around a step -----------------------------------------------------------------------------------------


def result_of(foreach=None, around=None, **options):
    """Parameters and state after five steps, each made inside ``around()``."""
    shapes = [(12, 9), (6, 4, 3, 3), (4,)]
    run = SoapRun(random_params(shapes), foreach=foreach, precondition_frequency=2, **options)
    for grads in random_gradients(shapes, 5):
        if around is None:
            run.step(grads)
        else:
            with around():
                run.step(grads)
    return run


def assert_runs_equal(a, b):
    for i in range(len(a.params)):
        assert torch.equal(a.params[i], b.params[i])
        for key, value in a.state_of(i).items():
            assert torch.equal(value, b.state_of(i)[key]), key
            assert value.dtype == b.state_of(i)[key].dtype, key


class Setting:
    """Sets something for a with block and puts the old value back."""

    def __init__(self, get, set_, value):
        self.get, self.set, self.value = get, set_, value

    def __enter__(self):
        self.old = self.get()
        self.set(self.value)

    def __exit__(self, *_):
        assert self.get() == self.value, "the step changed a global setting"
        self.set(self.old)


AROUND = {
    "default dtype float64": lambda: Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default dtype float16": lambda: Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float16),
    "default device meta": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "matmul precision medium": lambda: Setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "matmul precision high": lambda: Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "deterministic algorithms": lambda: Setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "default device set": lambda: Setting(torch.get_default_device, torch.set_default_device, torch.device("cpu")),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("foreach", BOTH)
@pytest.mark.parametrize("name", AROUND)
def test_what_stands_around_a_step_does_not_change_it(name, foreach):
    assert_runs_equal(result_of(foreach, AROUND[name]), result_of(foreach))


def test_constructed_under_another_default_dtype_and_device():
    with Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64), torch.device("meta"):
        run = SoapRun([p.to("cpu", torch.float32) for p in CPU_PARAMS])
    plain = SoapRun(CPU_PARAMS)
    for grads in random_gradients([(4, 3)], 3):
        run.step(grads)
        plain.step(grads)
    assert_runs_equal(run, plain)


CPU_PARAMS = random_params([(4, 3)])


# In a process of its own: torch's switch from the old settings to the new ones cannot be taken back.
@pytest.mark.parametrize("order", ["4,3,0,4,5,1,2,4,0,2", pytest.param("0,1,2,3,4,5", marks=pytest.mark.slow)])
def test_the_new_precision_api_mixed_with_the_old_one(order):
    """torch raises when one is read after the other was written; a step must not, and must leave them as they were."""
    script = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from comparison import SoapRun, random_gradients, random_params
plain = SoapRun(random_params([(6, 5)]), precondition_frequency=2)
for grads in random_gradients([(6, 5)], 5):
    plain.step(grads)
settings = [
    lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    lambda: torch.set_float32_matmul_precision("medium"),
    lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
]
def read(f):
    try:
        return f()
    except RuntimeError as error:
        return "raises"
def all_of():
    return [read(f) for f in (
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
        lambda: torch.backends.fp32_precision,
        lambda: torch.get_float32_matmul_precision(),
        lambda: torch.backends.cuda.matmul.allow_tf32,
    )]
for number in map(int, sys.argv[2].split(",")):
    try:
        settings[number]()
    except RuntimeError:
        pass
    before = all_of()
    run = SoapRun(random_params([(6, 5)]), precondition_frequency=2)
    for grads in random_gradients([(6, 5)], 5):
        run.step(grads)
    assert all_of() == before, (number, before, all_of())
    assert torch.equal(run.params[0], plain.params[0]), number
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), order], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_inference_mode_around_every_step():
    """State made in inference mode consists of inference tensors, as with torch.optim.Adam: it may change there only."""
    run, plain = SoapRun(random_params([(4, 3)])), SoapRun(random_params([(4, 3)]))
    for grads in random_gradients([(4, 3)], 5):
        run.params[0].grad = grads[0].clone()
        with torch.inference_mode():
            run.optimizer.step()
        plain.step(grads)
    assert torch.equal(run.params[0], plain.params[0])


@pytest.mark.slow
@pytest.mark.parametrize("foreach", BOTH)
def test_compiled_training_step(foreach):
    """torch.compile of forward, backward and step: one graph break around the optimizer, the same result."""
    from torch._dynamo.utils import counters

    eager, compiled = model_of(), model_of()
    optimizers = [SOAP(m.parameters(), foreach=foreach, precondition_frequency=2) for m in (eager, compiled)]

    def training_step(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def breaks(model, optimizer):
        torch._dynamo.reset()
        counters.clear()
        fast = torch.compile(training_step, backend="aot_eager")
        for number in range(5):
            x = torch.randn(7, 6, generator=torch.Generator().manual_seed(number))
            expected = training_step(eager, optimizers[0], x) if model is compiled else None
            loss = fast(model, optimizer, x)
            if expected is not None:
                torch.testing.assert_close(loss, expected)
        # zero_grad and backward break graphs too, in every training step
        return {k: n for k, n in counters["graph_break"].items() if "zero_grad" not in k and "backward" not in k}

    ours = breaks(compiled, optimizers[1])
    for p, q in zip(eager.parameters(), compiled.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    # One break at the call of step; dynamo counts it twice, before and inside the wrapper that torch puts around every
    # optimizer's step.
    assert ours and all("SOAP.step" in reason for reason in ours) and sum(ours.values()) <= 2, ours
    other = model_of()
    assert sum(ours.values()) <= sum(breaks(other, torch.optim.Adam(other.parameters())).values())
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_capturing_a_step_is_refused_with_a_reason():
    run = SoapRun(random_params([(4, 3)], device="cuda"), capturable=True)
    for grads in random_gradients([(4, 3)], 2, device="cuda"):
        run.step(grads)
    assert run.state_of(0)["step"].device.type == "cuda"
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(graph):
        run.optimizer.step()


def test_capturable_keeps_step_on_the_parameter_s_device(device):
    run = SoapRun(random_params([(4, 3)], device=device), capturable=True)
    plain = SoapRun(random_params([(4, 3)], device=device))
    for grads in random_gradients([(4, 3)], 4, device=device):
        run.step(grads)
        plain.step(grads)
    assert run.state_of(0)["step"].device.type == torch.device(device).type
    assert torch.equal(run.params[0], plain.params[0])


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
