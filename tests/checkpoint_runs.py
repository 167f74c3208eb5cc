"""What the tests of checkpoints share: runs, saved and gone on with."""

import copy
import io

import torch
from comparison import SoapRun, random_gradients, random_params

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
