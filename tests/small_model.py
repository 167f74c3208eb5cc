"""A small model to train, and snapshots of everything that a step may change."""

import copy

import torch
from comparison import SoapRun
from step_comparison import assert_as_exact_as, compare_step
from torch import nn

import soap_opt


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


def compiled_in_lockstep(training_step, steps=6, **options):
    """``training_step(model, optimizer, x)``, compiled, from the state of an eager run that is given its gradients.

    Compilers sum in other orders, and what SOAP makes of that in some steps is the processor's: each step is compared alone.
    The loss and the gradients are to be as exact as eager's, and the step that of its gradients.
    """
    model = model_of()
    plain, fast = (SoapRun(model.parameters(), **options) for _ in range(2))
    fast.params = list(model.parameters())
    fast.optimizer = soap_opt.SOAP(fast.params, **options)

    def forward_and_backward(model, x):
        loss = model(x).square().mean()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    for number in range(steps):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(number))
        before = [
            (p.detach().clone(), {key: value.clone() for key, value in plain.state_of(i).items()})
            for i, p in enumerate(plain.params)
        ]
        for i, (param, state) in enumerate(before):
            fast.adopt(i, param, state)
        eager, exact = forward_and_backward(model, x), forward_and_backward(copy.deepcopy(model).double(), x.double())
        loss = training_step(model, fast.optimizer, x)
        grads = [param.grad.clone() for param in fast.params]
        for got, want, right in zip([loss, *grads], eager, exact):
            assert_as_exact_as(got, want, right, f"step {number}")
        plain.step(grads)
        for i, (param, state) in enumerate(before):
            after, got = ((run.params[i].detach(), run.state_of(i)) for run in (plain, fast))
            assert torch.equal(after[0], param) == (number == 0)
            compare_step(param, state, grads[i], after, got, options, f"step {number}, parameter {i}")
