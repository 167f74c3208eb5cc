"""Checkpoints: torch.save, torch.distributed.checkpoint, load_state_dict's rules, and those that the original SOAP wrote."""

import copy
import io
import warnings

import pytest
import torch
from comparison import (
    IMPLEMENTATIONS,
    OracleRun,
    SoapRun,
    every_implementation,
    implementations,
    random_gradients,
    random_params,
    run_lockstep,
)
from oracle import Oracle, original_state_dict
from test_parity import Theirs
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import soap_opt
from soap_opt import SOAP

BOTH = [False, True]
POLICIES = ["together", "staggered", "adaptive"]
SHAPES = [(6, 5), (4, 3, 3, 3), (4,), (6, 5), (1, 7), ()]


def saved(thing):
    """Through torch.save and torch.load(weights_only=True)."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def resumed(run, **options):
    """A new process: new parameters, a new optimizer, both loaded from files."""
    other = SoapRun([torch.zeros_like(p) for p in run.params], **options)
    for param, value in zip(other.params, saved([p.detach() for p in run.params])):
        param.data.copy_(value)
    other.optimizer.load_state_dict(saved(run.optimizer.state_dict()))
    return other


def assert_equal_runs(a, b):
    for i, (p, q) in enumerate(zip(a.params, b.params, strict=True)):
        assert torch.equal(p, q), f"parameter {i}"
        assert a.state_of(i).keys() == b.state_of(i).keys()
        for key, value in a.state_of(i).items():
            other = b.state_of(i)[key]
            assert torch.equal(value, other), (i, key)
            assert (value.dtype, value.stride(), value.device) == (other.dtype, other.stride(), other.device), (i, key)


# ---- resuming -------------------------------------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("refresh", POLICIES)
def test_a_checkpoint_of_any_step_resumes_to_the_bit(refresh, flags):
    """Written at each of eight steps, through a whole period and past it; options come from the checkpoint."""
    options = {"refresh": refresh, "precondition_frequency": 3, "lr": 0.02, "refresh_tolerance": 0.1, **flags}
    gradients = random_gradients(SHAPES, 14, missing=0.1)
    run = SoapRun(random_params(SHAPES), **options)
    others = []
    for number, grads in enumerate(gradients):
        if number < 8:
            others.append(resumed(run, **flags))
        run.step(grads)
        for other in others if number < 8 else ():
            other.step(grads)
    for other in others:
        for grads in gradients[8:]:
            other.step(grads)
        assert_equal_runs(run, other)


@pytest.mark.parametrize("refresh", POLICIES)
def test_resuming_before_some_parameter_saw_its_first_gradient(refresh):
    """Its refresh offset must be the one that the uninterrupted run gives it."""
    shapes = [(6, 5), (8, 4), (7, 7), (5, 5)]
    options = {"refresh": refresh, "precondition_frequency": 4}
    gradients = random_gradients(shapes, 16)
    for number, grads in enumerate(gradients):
        for late, start in ((1, 5), (3, 9)):
            if number < start:
                grads[late] = None
    run = SoapRun(random_params(shapes), **options)
    for number, grads in enumerate(gradients):
        if number == 3:
            early = resumed(run)
        if number == 7:
            middle = resumed(run)
        run.step(grads)
        if number >= 3:
            early.step(grads)
        if number >= 7:
            middle.step(grads)
    assert_equal_runs(run, early)
    assert_equal_runs(run, middle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_memory_formats_resume_to_the_bit(dtype):
    """torch's own load_state_dict would cast the state to the parameter's dtype, and drop strides."""
    params = random_params([(6, 4, 3, 3), (5, 7), (4,)], dtype=dtype)
    params[0] = params[0].to(memory_format=torch.channels_last)
    params[1] = params[1].T.contiguous().T
    options = {"precondition_frequency": 2, "refresh": "staggered"}
    run = SoapRun(params, **options)
    gradients = random_gradients([tuple(p.shape) for p in params], 8, dtype=dtype)
    for grads in gradients[:4]:
        run.step(grads)
    other = resumed(run)
    for i, param in enumerate(other.params):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert other.state_of(i)["exp_avg"].dtype == other.state_of(i)["exp_avg_sq"].dtype == wide
        assert other.state_of(i)["step"].dtype == torch.float32 and other.state_of(i)["step"] == 3
        assert other.state_of(i)["exp_avg"].stride() == param.stride()
    for grads in gradients[4:]:
        run.step(grads)
        other.step(grads)
    assert_equal_runs(run, other)


@every_implementation
@pytest.mark.parametrize("then", implementations("single", "multi", "fused"))
def test_a_checkpoint_of_one_implementation_continues_in_another(flags, then):
    options = {"refresh": "staggered", "precondition_frequency": 3}
    run = SoapRun(random_params(SHAPES), **flags, **options)
    gradients = random_gradients(SHAPES, 9)
    for grads in gradients[:5]:
        run.step(grads)
    other = resumed(run)
    assert_equal_runs(run, other)
    other.optimizer.param_groups[0].update({"foreach": None, "fused": None, **IMPLEMENTATIONS[then]})
    assert run_lockstep(run, other, gradients[5:], options) > 0


@pytest.mark.parametrize("refresh", POLICIES)
def test_precondition_frequency_may_change_when_resuming(refresh):
    """The offsets in the state stay; both runs are due at the same steps of the new period."""
    run = SoapRun(random_params(SHAPES), refresh=refresh, precondition_frequency=7)
    gradients = random_gradients(SHAPES, 14)
    for grads in gradients[:6]:
        run.step(grads)
    other = resumed(run)
    for one in (run, other):
        one.optimizer.param_groups[0]["precondition_frequency"] = 3
    for grads in gradients[6:]:
        run.step(grads)
        other.step(grads)
    assert_equal_runs(run, other)


def test_hyper_parameters_come_from_the_checkpoint():
    run = SoapRun(random_params([(4, 3)]), lr=0.5, betas=(0.8, 0.7), refresh="adaptive", max_precond_dim=3)
    gradients = random_gradients([(4, 3)], 3)
    run.step(gradients[0])
    other = resumed(run)
    # "differentiable" is what torch's own __setstate__ adds to every optimizer's groups
    own = {k: v for k, v in other.optimizer.param_groups[0].items() if k not in ("params", "differentiable")}
    assert own == {k: v for k, v in run.optimizer.param_groups[0].items() if k != "params"}
    for grads in gradients[1:]:
        run.step(grads)
        other.step(grads)
    assert_equal_runs(run, other)


def test_a_scheduler_resumes_with_it():
    shapes = [(4, 3)]
    gradients = random_gradients(shapes, 12)

    def start():
        run = SoapRun(random_params(shapes), lr=0.01)
        return run, torch.optim.lr_scheduler.OneCycleLR(run.optimizer, 0.1, total_steps=20)

    run, scheduler = start()
    for number, grads in enumerate(gradients):
        if number == 5:
            other, other_scheduler = start()
            other.params[0].data.copy_(run.params[0])
            other.optimizer.load_state_dict(saved(run.optimizer.state_dict()))
            other_scheduler.load_state_dict(scheduler.state_dict())
        run.step(grads)
        scheduler.step()
        if number >= 5:
            other.step(grads)
            other_scheduler.step()
    assert_equal_runs(run, other)


def test_the_saved_state_dict_is_plain():
    """Tensors, numbers, strings and None only: weights_only=True takes it, and it holds no reference to parameters."""
    run = SoapRun(random_params(SHAPES), lr=torch.tensor(0.1))
    run.step(random_gradients(SHAPES, 1)[0])
    state = saved(run.optimizer.state_dict())
    assert set(state) == {"state", "param_groups"}
    for entry in state["state"].values():
        assert all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in entry.items())
    assert torch.equal(state["param_groups"][0]["lr"], torch.tensor(0.1))


# ---- load_state_dict's rules ----------------------------------------------------------------------------------------------


def trained(shapes=SHAPES, steps=3, **options):
    run = SoapRun(random_params(shapes), **options)
    for grads in random_gradients(shapes, steps):
        run.step(grads)
    return run


def frozen(run):
    return copy.deepcopy(run.optimizer.state_dict()), [p.detach().clone() for p in run.params]


def assert_as_it_was(run, before):
    state, params = before
    now = run.optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    assert now["state"].keys() == state["state"].keys()
    for key, entry in state["state"].items():
        assert now["state"][key].keys() == entry.keys()
        assert all(torch.equal(now["state"][key][name], value) for name, value in entry.items())
    assert all(torch.equal(p, q) for p, q in zip(run.params, params))


def test_state_that_was_cast_by_somebody_is_float32_again():
    """A whole checkpoint turned to bfloat16 (model.to(dtype) on everything) loads; step and state are float32."""
    run = trained()
    state = run.optimizer.state_dict()
    for entry in state["state"].values():
        for key, value in entry.items():
            entry[key] = value.to(torch.bfloat16) if value.is_floating_point() else value
    run.optimizer.load_state_dict(state)
    for i in range(len(SHAPES)):
        for key, value in run.state_of(i).items():
            assert value.dtype in (torch.float32, torch.int64, torch.bool), key
    run.step(random_gradients(SHAPES, 1)[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("basis_1"), r"parameter 0 of shape \(6, 5\) lacks basis_1"),
        (lambda s: s.pop("step"), r"parameter 0 of shape \(6, 5\) lacks step"),
        (lambda s: s.update(exp_avg=torch.zeros(5, 6)), r"exp_avg has shape \(5, 6\), but \(6, 5\) is expected"),
        (lambda s: s.update(refresh_offset_0=torch.zeros(0)), r"refresh_offset_0 has shape \(0,\), but one number is expected"),
        (lambda s: s.update(step=torch.zeros(2)), r"step has shape \(2,\), but one number is expected"),
        (lambda s: s.update(gram_0=torch.zeros(5, 5)), r"gram_0 has shape \(5, 5\), but \(6, 6\) is expected"),
        (lambda s: s.update(basis_2=torch.zeros(5, 5)), "basis_2, for which its options have no preconditioned mode"),
        (lambda s: s.update(GG=[], Q=[]), "load_original_state_dict"),
    ],
)
def test_misfits_are_named_and_change_nothing(damage, message):
    run, other = trained(), trained(steps=5)
    state = copy.deepcopy(other.optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.9
    damage(state["state"][0])
    before = frozen(run)
    with pytest.raises(ValueError, match=message):
        run.optimizer.load_state_dict(state)
    assert_as_it_was(run, before)
    run.step(random_gradients(SHAPES, 1)[0])


def test_groups_that_do_not_match_are_torch_s_error():
    run = trained()
    before = frozen(run)
    with pytest.raises(ValueError, match="loaded state dict has a different number of parameter groups"):
        run.optimizer.load_state_dict({**run.optimizer.state_dict(), "param_groups": []})
    state = copy.deepcopy(run.optimizer.state_dict())
    state["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        run.optimizer.load_state_dict(state)
    assert_as_it_was(run, before)


def test_options_of_the_checkpoint_that_do_not_fit_its_state():
    """A group that says max_precond_dim=3 with state of larger modes."""
    run = trained()
    state = copy.deepcopy(run.optimizer.state_dict())
    state["param_groups"][0]["max_precond_dim"] = 3
    before = frozen(run)
    with pytest.raises(ValueError, match="gram_0"):
        run.optimizer.load_state_dict(state)
    assert_as_it_was(run, before)


def test_an_adam_checkpoint_is_refused_with_the_reason():
    run = trained([(4, 3)])
    twin = nn.Parameter(torch.ones(4, 3))
    adam = torch.optim.Adam([twin])
    twin.grad = torch.ones(4, 3)
    adam.step()
    with pytest.raises(ValueError, match="written by another optimizer.*load the model alone"):
        run.optimizer.load_state_dict(adam.state_dict())


def test_a_checkpoint_of_another_optimizer_over_vectors_alone_is_refused_too():
    bias = nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([bias], amsgrad=True)
    bias.grad = torch.ones(3)
    adam.step()
    optimizer = SOAP([bias])
    with pytest.raises(ValueError, match="written by another optimizer.*amsgrad.*load the model alone"):
        optimizer.load_state_dict(adam.state_dict())
    assert "amsgrad" not in optimizer.param_groups[0]


def test_a_checkpoint_from_before_initialized_and_offsets_were_kept():
    """Edited by hand or written elsewhere: what is missing is derived."""
    run = trained()
    state = copy.deepcopy(run.optimizer.state_dict())
    for entry in state["state"].values():
        for key in [k for k in entry if k == "initialized" or k.startswith("refresh_offset")]:
            del entry[key]
    other = SoapRun(run.params)
    other.optimizer.load_state_dict(state)
    for i in range(len(SHAPES)):
        assert other.state_of(i).keys() == run.state_of(i).keys()
        assert bool(other.state_of(i)["initialized"])
    grads = random_gradients(SHAPES, 1)[0]
    run.step(grads)
    other.step(grads)
    for p, q in zip(run.params, other.params):
        assert torch.equal(p, q)


def test_load_state_dict_does_not_alter_what_it_is_given():
    run, other = trained(), trained(steps=4)
    state = run.optimizer.state_dict()
    kept = copy.deepcopy(state)
    other.optimizer.load_state_dict(copy.deepcopy(state))
    other.step(random_gradients(SHAPES, 1)[0])
    for key, entry in kept["state"].items():
        assert all(torch.equal(value, state["state"][key][name]) for name, value in entry.items())
    assert kept["param_groups"] == state["param_groups"]


def test_loading_into_one_s_own_optimizer_changes_nothing():
    run, plain = trained(), trained()
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    for grads in random_gradients(SHAPES, 4, seed=5):
        run.step(grads)
        plain.step(grads)
    assert_equal_runs(run, plain)


def test_a_tensor_learning_rate_survives_loading():
    run = trained(lr=torch.tensor(0.25))
    other = resumed(run, lr=torch.tensor(0.5))
    lr = other.optimizer.param_groups[0]["lr"]
    assert isinstance(lr, torch.Tensor) and lr == 0.25


def test_parameters_moved_to_another_dtype_before_loading():
    """A float32 run continued with bfloat16 parameters keeps its float32 state."""
    run = trained()
    other = SoapRun([p.bfloat16() for p in run.params])
    other.optimizer.load_state_dict(saved(run.optimizer.state_dict()))
    for i in range(len(SHAPES)):
        for key, value in run.state_of(i).items():
            assert torch.equal(value, other.state_of(i)[key]) and value.dtype == other.state_of(i)[key].dtype


# ---- torch.distributed.checkpoint -----------------------------------------------------------------------------------------


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 4))


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, 4, 4, generator=generator)).square().mean().backward()
        optimizer.step()


OPTIONS = {"precondition_frequency": 2, "refresh": "staggered", "lr": 0.01}


@pytest.mark.parametrize("flat", BOTH, ids=["nested", "flat"])
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("target_steps", [0, 3])
def test_distributed_checkpoint_state_dict(flat, steps, target_steps):
    """get and set before and after the first step. set_ on a fresh optimizer makes torch step once with zero gradients and
    lr 0, to see what state there is: that must not spend the init on a zero Gram."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = model_of()
    optimizer = SOAP(model.parameters(), **OPTIONS)
    train(model, optimizer, steps)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    if flat:
        assert all(isinstance(key, str) for key in state)
        assert any(key.startswith("state.0.weight.") for key in state) and "param_groups.0.weight.lr" in state

    other = model_of(seed=1)
    target = SOAP(other.parameters(), **OPTIONS)
    train(other, target, target_steps, seed=7)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, target, saved(state), options=options)
    train(model, optimizer, 5, seed=3)
    train(other, target, 5, seed=3)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, target.state[q][key]), key
            assert value.dtype == target.state[q][key].dtype


def test_get_optimizer_state_dict_before_the_first_step_does_not_disturb():
    """torch's probing step leaves parameters as they are, and training goes on as if it had not been."""
    model, twin = model_of(), model_of()
    optimizer, plain = SOAP(model.parameters(), **OPTIONS), SOAP(twin.parameters(), **OPTIONS)
    kept = [p.detach().clone() for p in model.parameters()]
    state = get_optimizer_state_dict(model, optimizer)
    assert set(state["state"]) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), kept))
    assert all(not entry["initialized"] for entry in optimizer.state.values())
    assert all(p.grad is None for p in model.parameters())
    train(model, optimizer, 5)
    train(twin, plain, 5)
    for p, q in zip(model.parameters(), twin.parameters()):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, plain.state[q][key]), key


def test_distributed_checkpoint_on_disk(tmp_path):
    """dcp.save and dcp.load, which load in place into the target's state."""
    import torch.distributed.checkpoint as dcp

    model, other = model_of(), model_of(1)
    optimizer, target = SOAP(model.parameters(), **OPTIONS), SOAP(other.parameters(), **OPTIONS)
    train(model, optimizer, 4)
    state, optim = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state, "optim": optim}, checkpoint_id=tmp_path)
        state, optim = get_state_dict(other, target)
        dcp.load({"model": state, "optim": optim}, checkpoint_id=tmp_path)
    set_state_dict(other, target, model_state_dict=state, optim_state_dict=optim)
    train(model, optimizer, 4, seed=3)
    train(other, target, 4, seed=3)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_distributed_checkpoint_of_bfloat16_parameters():
    model = model_of().to(torch.bfloat16)
    other = model_of(1).to(torch.bfloat16)
    optimizer, target = SOAP(model.parameters(), **OPTIONS), SOAP(other.parameters(), **OPTIONS)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.step()
    set_optimizer_state_dict(other, target, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    for p, q in zip(model.parameters(), other.parameters()):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, target.state[q][key]) and value.dtype == target.state[q][key].dtype, key


def test_distributed_checkpoint_of_several_groups_and_missing_gradients():
    model, other = model_of(), model_of(1)

    def optimizer_of(m):
        return SOAP([{"params": m[0].parameters(), "lr": 0.1}, {"params": m[3].parameters(), "merge_dims": True}], **{})

    optimizer, target = optimizer_of(model), optimizer_of(other)
    model[0].weight.requires_grad_(False)
    other[0].weight.requires_grad_(False)
    train(model, optimizer, 3)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other.load_state_dict(get_model_state_dict(model))
    set_optimizer_state_dict(other, target, state)
    assert [g["lr"] for g in target.param_groups] == [0.1, 3e-3]
    train(model, optimizer, 3, seed=2)
    train(other, target, 3, seed=2)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


# ---- checkpoints of the original ------------------------------------------------------------------------------------------


# (shapes, options): every kind of entry of GG: [] of a 1-D parameter, none of a 0-D one, [] above max_precond_dim, 1 x 1.
def turning_tolerance(x):
    """For an entry of x that was turned out of its eigenbasis and back in: inner products with unit vectors, in any order.

    At most eight of them here (four modes), each of a few terms and with less than an eps of ||x|| lost.
    """
    return 8 * torch.finfo(x.dtype).eps * float(x.norm())


ORIGINALS = {
    "plain": ([(6, 5), (4, 3, 3, 3), (4,), ()], {}),
    "size one": ([(1, 7), (7, 1), (1, 3, 4)], {}),
    "limited": ([(5, 12), (6, 8, 3)], {"max_precond_dim": 6}),
    "1-D": ([(6,), (1,), (4, 3)], {"precondition_1d": True}),
    "merged": ([(2, 3, 4, 5), (5,), (7, 1)], {"merge_dims": True, "max_precond_dim": 6}),
    "merged, channels last": ([(3, 2, 2, 4)], {"merge_dims": True, "max_precond_dim": 6, "data_format": "channels_last"}),
    "beta": ([(6, 5)], {"shampoo_beta": 0.7, "betas": (0.9, 0.99)}),
    "normalised": ([(6, 5)], {"normalize_grads": True, "correct_bias": False}),
}


@every_implementation
@pytest.mark.parametrize("space", ["eigenbasis", "parameter"])
@pytest.mark.parametrize("case", ORIGINALS)
def test_a_run_of_the_original_continues(case, space, flags):
    """The oracle's run, written as the original would, and the loaded optimizer, side by side for a dozen steps."""
    shapes, options = ORIGINALS[case]
    options = {**options, "precondition_frequency": 3, "lr": 0.01}
    oracle = Oracle(random_params(shapes), **options)
    gradients = random_gradients(shapes, 24)
    for grads in gradients[:11]:
        oracle.step(grads)
    checkpoint = original_state_dict(oracle, exp_avg_space=space, flip_size_one=True)
    run = SoapRun(oracle.params, refresh="together", **flags, data_format=oracle.options["data_format"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing differs, nothing is to be said
        soap_opt.load_original_state_dict(run.optimizer, saved(checkpoint), exp_avg_space=space)
    group = run.optimizer.param_groups[0]
    for name in ("lr", "precondition_frequency", "max_precond_dim", "merge_dims", "precondition_1d", "normalize_grads"):
        assert group[name] == oracle.options[name], name
    for i, state in enumerate(oracle.state):
        for key, value in state.items():
            if key.startswith("refresh_offset"):
                continue
            turned = space == "parameter" and key == "exp_avg"  # out of the eigenbasis, and back in
            tolerance = turning_tolerance(value) if turned else 0
            torch.testing.assert_close(run.state_of(i)[key], value, rtol=0, atol=tolerance, check_stride=False)
    # the oracle goes on from each state that the loaded run comes to
    assert run_lockstep(run, OracleRun(oracle=oracle), gradients[11:], oracle.options) > 0


def test_a_basis_of_minus_one_turns_m():
    """The sign of a 1 x 1 basis is free; m was kept in it. In parameter space m has no such sign."""
    oracle = Oracle(random_params([(1, 7)]), precondition_frequency=3)
    for grads in random_gradients([(1, 7)], 5):
        oracle.step(grads)
    loaded = {}
    for flip in BOTH:
        for space in ("eigenbasis", "parameter"):
            run = SoapRun(oracle.params, refresh="together")
            checkpoint = original_state_dict(oracle, space, flip_size_one=flip)
            assert float(checkpoint["state"][0]["Q"][0]) == (-1 if flip else 1)
            soap_opt.load_original_state_dict(run.optimizer, checkpoint, space)
            loaded[flip, space] = run.state_of(0)["exp_avg"]
    want = oracle.state[0]["exp_avg"]
    torch.testing.assert_close(loaded[True, "eigenbasis"], want)
    for value in loaded.values():
        torch.testing.assert_close(value, want, rtol=0, atol=turning_tolerance(want))


def test_spaces_are_told_apart():
    """The wrong exp_avg_space gives another m: the argument does something."""
    oracle = Oracle(random_params([(6, 5)]))
    for grads in random_gradients([(6, 5)], 5):
        oracle.step(grads)
    checkpoint = original_state_dict(oracle, "parameter")
    run = SoapRun(oracle.params)
    soap_opt.load_original_state_dict(run.optimizer, checkpoint)
    assert (run.state_of(0)["exp_avg"] - oracle.state[0]["exp_avg"]).norm() > 0.1 * oracle.state[0]["exp_avg"].norm()


def test_the_loaded_run_may_go_on_staggered():
    oracle = Oracle(random_params([(6, 5), (4, 4)]), precondition_frequency=4)
    gradients = random_gradients([(6, 5), (4, 4)], 20)
    for grads in gradients[:6]:
        oracle.step(grads)
    run = SoapRun(oracle.params)
    soap_opt.load_original_state_dict(run.optimizer, original_state_dict(oracle))
    offsets = [int(run.state_of(i)[f"refresh_offset_{k}"]) for i in range(2) for k in range(2)]
    assert sorted(offsets) == [0, 1, 2, 3]  # four units of similar cost, one in each of four phases
    for grads in gradients[6:]:
        run.step(grads)
    again = resumed(run)
    for one in (run, again):
        one.step(gradients[0])
    assert_equal_runs(run, again)


def test_bfloat16_checkpoints_of_the_original_become_float32():
    """The original's state has the parameter's dtype."""
    oracle = Oracle(random_params([(6, 5), (4,)]))
    for grads in random_gradients([(6, 5), (4,)], 4):
        oracle.step(grads)
    checkpoint = original_state_dict(oracle)
    for entry in checkpoint["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            entry[key] = entry[key].bfloat16()
        for key in ("GG", "Q"):
            entry[key] = [m.bfloat16() if torch.is_tensor(m) else m for m in entry[key]]
    run = SoapRun([p.bfloat16() for p in oracle.params])
    soap_opt.load_original_state_dict(run.optimizer, checkpoint)
    for i in range(2):
        for key, value in run.state_of(i).items():
            assert value.dtype in (torch.float32, torch.int64, torch.bool), key
        torch.testing.assert_close(run.state_of(i)["exp_avg"], oracle.state[i]["exp_avg"], rtol=1e-2, atol=1e-3)


def test_differences_between_the_state_and_the_group_are_named():
    """The original obeys the frequency and the beta of its state; from here on the group's are used."""
    oracle = Oracle(random_params([(6, 5), (4,), (3, 3)]))
    for grads in random_gradients([(6, 5), (4,), (3, 3)], 3):
        oracle.step(grads)
    checkpoint = original_state_dict(oracle)
    checkpoint["param_groups"][0].update(precondition_frequency=5, shampoo_beta=0.5)
    run = SoapRun(oracle.params)
    with pytest.warns(UserWarning) as caught:
        soap_opt.load_original_state_dict(run.optimizer, checkpoint)
    texts = sorted(str(w.message) for w in caught)
    assert len(texts) == 2
    assert "precondition_frequency is 10, the group's is 5" in texts[0] and "parameter 0 of shape (6, 5)" in texts[0]
    assert "shampoo_beta is 0.95, the group's is 0.5" in texts[1] and "2 more" in texts[1]
    assert run.optimizer.param_groups[0]["precondition_frequency"] == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c["state"][0].pop("GG"), r"parameter 0 of shape \(6, 5\) lacks GG"),
        (lambda c: c["state"][0].update(GG=[[], []], Q=[[], []]), "Grams of sizes"),
        (lambda c: c["state"][0].update(GG=c["state"][0]["GG"][::-1]), "Grams of sizes"),
        (lambda c: c["state"][0].update(GG=c["state"][0]["GG"][:1]), "Grams of sizes"),
        (lambda c: c["state"][0].update(Q=[torch.eye(4), torch.eye(5)]), "Q for parameter 0 .* shapes of its GG"),
        (lambda c: c["state"][0].update(Q=[[], torch.eye(5)]), "Q for parameter 0 .* shapes of its GG"),
        (lambda c: c["state"][0].update(Q=None), "Q for parameter 0 .* shapes of its GG"),
        (lambda c: c["state"][0].update(exp_avg=torch.zeros(5, 6)), r"exp_avg for parameter 0 .* has shape \(5, 6\)"),
        (lambda c: c["param_groups"][0].update(max_precond_dim=4), "max_precond_dim"),
        (lambda c: c["param_groups"][0]["params"].pop(), "param groups of"),
        (lambda c: c["param_groups"].append({"params": []}), "param groups of"),
    ],
)
def test_misfits_of_original_checkpoints_change_nothing(damage, message):
    oracle = Oracle(random_params([(6, 5), (4,)]))
    for grads in random_gradients([(6, 5), (4,)], 3):
        oracle.step(grads)
    checkpoint = original_state_dict(oracle)
    damage(checkpoint)
    run = trained([(6, 5), (4,)])
    before = frozen(run)
    with pytest.raises(ValueError, match=message):
        soap_opt.load_original_state_dict(run.optimizer, checkpoint)
    assert_as_it_was(run, before)
    run.step(random_gradients([(6, 5), (4,)], 1)[0])


def test_an_unknown_space_is_refused():
    run = trained()
    with pytest.raises(ValueError, match="Invalid exp_avg_space: 'frequency'"):
        soap_opt.load_original_state_dict(run.optimizer, {"state": {}, "param_groups": []}, "frequency")


@pytest.mark.parametrize("case", ["plain", "limited", "merged"])
def test_a_checkpoint_of_pytorch_optimizer_continues(case):
    """Its state has the original's layout from before the "momentum change"; it counts steps in its groups instead."""
    shapes, options = ORIGINALS[case]
    if options.get("merge_dims"):
        shapes = shapes[:1]  # theirs raises on 1-D parameters and keeps a 1 in the merged view of (7, 1)
    options = {**options, "precondition_frequency": 3}
    theirs = Theirs(random_params(shapes), **options)
    gradients = random_gradients(shapes, 20)
    for grads in gradients[:9]:
        theirs.step(grads)
    state = copy.deepcopy(theirs.optimizer.state_dict())
    for entry in state["state"].values():
        assert {"exp_avg", "exp_avg_sq", "GG", "Q", "precondition_frequency", "shampoo_beta"} <= set(entry)
        entry["step"] = theirs.optimizer.param_groups[0]["step"] - 1
    run = SoapRun(theirs.twins, refresh="together", **options)
    soap_opt.load_original_state_dict(run.optimizer, state, "parameter")
    for grads in gradients[9:]:
        theirs.step(grads)
        run.step(grads)
        theirs.assert_close(run.params)
