"""Checkpoints by torch.distributed.checkpoint's state dicts."""

import copy
import warnings

import pytest
import torch
from checkpoint_runs import saved
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from soap_opt import SOAP

BOTH = [False, True]


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
