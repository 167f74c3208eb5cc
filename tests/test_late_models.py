"""Models that are built or changed after their optimizer was made, or after its first step."""

import copy

import pytest
import torch
from comparison import SoapRun, every_implementation, needs_engine, random_gradients
from small_model import model_of, snapshot, train
from torch import nn

from soap_opt import SOAP


@every_implementation
def test_a_lazy_module_that_is_dry_run_after_the_optimizer_was_made(flags):
    torch.manual_seed(0)
    lazy, plain = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)), nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    optimizer, other = SOAP(lazy.parameters(), **flags), SOAP(plain.parameters(), **flags)
    lazy(torch.ones(1, 6))
    lazy.load_state_dict(plain.state_dict())
    for first, second in zip(train(lazy, optimizer, 6), train(plain, other, 6)):
        assert torch.equal(first, second)


@every_implementation
def test_another_shape_before_the_first_step_and_after_the_state_is_cleared(flags):
    """Pruning: p.data is replaced by fewer rows."""
    p = nn.Parameter(torch.ones(6, 4))
    optimizer = SOAP([("weight", p)], **flags)
    p.data = torch.ones(5, 3)
    for shape in ((5, 3), (2, 3)):
        if shape != tuple(p.shape):
            p.data = p.data[: shape[0]]
            optimizer.state.clear()
        fresh = SoapRun([p.detach().clone()], **flags)
        for grads in random_gradients([shape], 4):
            p.grad = grads[0].clone()
            optimizer.step()
            fresh.step(grads)
        assert torch.equal(p, fresh.params[0])
    p.data, p.grad = torch.ones(4, 4), torch.ones(4, 4)
    before = snapshot(optimizer)[0][1]
    message = r"parameter 0 \(weight\) of shape \(4, 4\) had the shape \(2, 3\) when its state was made.*del optimizer.state"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state[p].items())


@every_implementation
@pytest.mark.parametrize("after", [0, 1, 3])
def test_channels_last_after_construction(flags, after):
    """model.to(memory_format=..) before the first step, between steps: resumed to the bit, and no step copies."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))

    def steps(net, optimizer, count, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            optimizer.zero_grad()
            net(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
            optimizer.step()

    net = model()
    optimizer = SOAP(net.parameters(), **flags, precondition_frequency=2)
    steps(net, optimizer, after, 1)
    net.to(memory_format=torch.channels_last)
    steps(net, optimizer, 3, 2)
    weight = net[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert optimizer._layout(weight, optimizer.param_groups[0]).memory_order == (0, 2, 3, 1)
    resumed = model().to(memory_format=torch.channels_last)
    resumed.load_state_dict(net.state_dict())
    other = SOAP(resumed.parameters(), **flags, precondition_frequency=2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(net, optimizer, 5, 3)
    steps(resumed, other, 5, 3)
    for p, q in zip(net.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


@every_implementation
def test_a_parameter_that_is_a_negative_view(flags):
    def negative():
        return nn.Parameter(torch.conj(torch.complex(torch.ones(5, 4), torch.arange(20.0).view(5, 4))).imag)

    p, plain = negative(), nn.Parameter(negative().detach().clone().resolve_neg())
    assert p.is_neg() and not plain.is_neg()
    optimizers = [SOAP([q], **flags, precondition_frequency=2) for q in (p, plain)]
    for grads in random_gradients([(5, 4)], 6):
        p.grad, plain.grad = grads[0].clone(), grads[0].clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(p.detach().resolve_neg(), plain.detach(), rtol=1e-6, atol=1e-6)
    p.grad, plain.grad = negative().detach(), negative().detach().resolve_neg()  # and a gradient that is one
    assert p.grad.is_neg()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(p.detach().resolve_neg(), plain.detach(), rtol=1e-6, atol=1e-6)


@needs_engine
@pytest.mark.parametrize("groups", [1, 2])
def test_a_model_converted_after_its_first_step(groups):
    """The engine needs the state's dtype; the message says how it follows."""
    model = model_of()
    params = list(model.parameters())
    optimizer = SOAP(params if groups == 1 else [{"params": params[:2]}, {"params": params[2:], "lr": 1e-4}])
    train(model, optimizer, 2)
    model.double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"cannot step parameter 0 of shape \(5, 6\).*float64.*load_state_dict"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.state[model[0].weight]["gram_0"].dtype == torch.float64


@every_implementation
def test_state_that_does_not_fit_is_named(flags):
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = SOAP([("layer.weight", p)], **flags)
    for _ in range(2):
        p.grad = torch.ones(4, 3)
        optimizer.step()
    kept = optimizer.state[p]["gram_1"]
    optimizer.state[p]["gram_1"] = torch.eye(5)
    message = r"cannot step parameter 0 \(layer.weight\).*its state gram_1 is \(5, 5\).*\(3, 3\), torch.float32 is needed"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    del optimizer.state[p]["gram_1"]
    with pytest.raises(RuntimeError, match=r"\(layer.weight\).*its state lacks gram_1"):
        optimizer.step()
    optimizer.state[p]["gram_1"] = kept
    optimizer.step()


@every_implementation
def test_a_first_gradient_from_before_the_parameter_got_its_shape(flags):
    p = nn.Parameter(torch.randn(7, 6))
    optimizer = SOAP([("w", p)], **flags)
    p.grad = torch.randn(7, 6)
    p.data = torch.randn(5, 6)
    with pytest.raises(ValueError, match=r"gradient of parameter 0 \(w\) of shape \(5, 6\) is of shape \(7, 6\)"):
        optimizer.step()


@needs_engine
def test_mixed_dtypes_are_looked_at_before_any_is_stepped():
    a, b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    optimizer = SOAP([a, b])
    for _ in range(2):
        a.grad, b.grad = torch.randn(3, 2), torch.randn(3, 2, dtype=torch.float64)
        optimizer.step()
    b.data, b.grad = b.data.float(), None
    b.grad = torch.randn(3, 2)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="cannot step parameter 1"):
        optimizer.step()
    for (p, state), (q, old) in zip(snapshot(optimizer), before):
        assert torch.equal(p, q) and all(torch.equal(state[key], old[key]) for key in old)
