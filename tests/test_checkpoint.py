"""Checkpoints: torch.save and torch.load, and load_state_dict's rules."""

import copy

import pytest
import torch
from checkpoint_runs import SHAPES, assert_as_it_was, assert_equal_runs, frozen, resumed, saved, trained
from comparison import (
    IMPLEMENTATIONS,
    SoapRun,
    every_implementation,
    implementations,
    random_gradients,
    random_params,
    run_lockstep,
)
from torch import nn

from soap_opt import SOAP

POLICIES = ["together", "staggered", "adaptive"]


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
