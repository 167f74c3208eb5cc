"""A small model to train, and snapshots of everything that a step may change."""

import torch
from torch import nn


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
