"""class SOAP's state: what it consists of, when it begins, and what may change under it."""

import gc
import weakref

import pytest
import torch
from comparison import AVAILABLE, OracleRun, SoapRun, every_implementation, random_gradients, random_params, run_lockstep
from small_model import assert_same, assert_unchanged, snapshot
from torch import nn


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


@every_implementation
def test_gradients_missing_on_some_steps(flags):
    """A parameter without a gradient is as if the step had not been; its t counts its own steps."""
    shapes = [(6, 5), (4, 3)]
    params = random_params(shapes)
    options = {"refresh": "together", "precondition_frequency": 2}
    both, alone = SoapRun(params, **flags, **options), SoapRun(params[1:], **flags, **options)
    first, *gradients = random_gradients(shapes, 12)
    both.step(first)
    alone.step(first[1:])
    rows = iter(gradients)

    class Second:
        """What ``both`` makes of the second parameter."""

        params = both.params[1:]
        state_of = staticmethod(lambda i: both.state_of(i + 1))
        adopt = staticmethod(lambda i, *what: both.adopt(i + 1, *what))
        step = staticmethod(lambda grads: both.step([next(rows)[0], *grads]))

    # not to the bit: elementwise kernels round a vector and its tail differently (with and without FMA)
    seconds = [[None if number % 3 == 0 else grads[1]] for number, grads in enumerate(gradients)]
    assert run_lockstep(alone, Second, seconds, options) > 0
    assert float(both.state_of(0)["step"]) == 11 and float(both.state_of(1)["step"]) == 7


@every_implementation
def test_parameters_added_later(flags):
    """A late group starts with its own first gradient and leaves the others as they would have been."""
    shapes = [(6, 5), (4, 3)]
    params = random_params(shapes)
    run = SoapRun(params[:1], **flags, precondition_frequency=2, refresh="together")
    alone = SoapRun(params[:1], **flags, precondition_frequency=2, refresh="together")
    late = nn.Parameter(params[1].clone())
    late_alone = SoapRun(params[1:], **flags, precondition_frequency=2, refresh="together", lr=0.5)
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
    for flags in AVAILABLE:
        options = {"refresh": "together", "precondition_frequency": 2, "lr": 0.01, "weight_decay": 0.1}
        waiting, prompt = (SoapRun(random_params(shapes), **flags, **options) for _ in range(2))
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
        again = SoapRun(random_params(shapes), **flags, **options)
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
    for flags in AVAILABLE:
        run, twin = SoapRun(random_params([(6, 5)]), **flags, **options), OracleRun(random_params([(6, 5)]), **options)

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
