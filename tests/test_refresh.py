"""WHEN a basis is refreshed: due steps, offsets and their balance, the adaptive criterion, in functions and in whole runs."""

import itertools
import time

import numpy as np
import pytest
import torch
from comparison import SoapRun, every_implementation, random_gradients, random_params
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle
from step_comparison import share_tolerance
from torch import nn

from soap_opt import SOAP
from soap_opt.schedule import POLICIES, balanced_offsets, due_units, is_due, unit_flops


def due_steps(offset, frequency, policy, until=13):
    return [t for t in range(until) if is_due(t, offset, frequency, policy)]


def test_is_due():
    """together: t mod f == 0; the others: (t + offset) mod f == 0; never at t = 0."""
    assert POLICIES == ("together", "staggered", "adaptive")
    for offset in range(4):
        assert due_steps(offset, 4, "together") == [4, 8, 12]
    for policy in ("staggered", "adaptive"):
        assert due_steps(0, 4, policy) == [4, 8, 12]
        assert due_steps(1, 4, policy) == [3, 7, 11]
        assert due_steps(3, 4, policy) == [1, 5, 9]
        assert due_steps(9, 4, policy) == [3, 7, 11]  # the frequency became smaller than an offset
        assert due_steps(0, 1, policy) == due_steps(5, 1, policy) == list(range(1, 13))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("frequency", [1, 3, 10**9])
def test_due_units_are_those_that_are_due(policy, frequency):
    steps, offsets = np.asarray(list(itertools.product(range(8), [0, 1, 2, 5, 10**9 - 3]))).T
    expected = [is_due(int(t), int(offset), frequency, policy) for t, offset in zip(steps, offsets)]
    assert due_units(steps, offsets, frequency, policy).tolist() == expected


def refresh_steps(run, gradients, start=0):
    """For each step (from 1, the step's t) the set of (parameter, mode) whose basis changed."""
    changes = {}
    for number, grads in enumerate(gradients, start):
        before = [{k: v.clone() for k, v in run.state_of(i).items() if k.startswith("basis_")} for i in range(len(run.params))]
        run.step(grads)
        changes[number] = {
            (i, int(key[6:]))
            for i, bases in enumerate(before)
            for key, value in bases.items()
            if not torch.equal(value, run.state_of(i)[key])
        }
    changes.pop(0, None)
    return changes


SHAPES = [(6, 5), (4, 3, 3, 3), (4,), (6, 5), (1, 7)]
UNITS = {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (3, 0), (3, 1), (4, 1)}


@every_implementation
def test_together_refreshes_everything_at_multiples(flags):
    run = SoapRun(random_params(SHAPES), refresh="together", precondition_frequency=4, **flags)
    for t, changed in refresh_steps(run, random_gradients(SHAPES, 14)).items():
        assert changed == (UNITS if t % 4 == 0 else set())


@every_implementation
def test_staggered_refreshes_each_unit_once_a_period(flags):
    run = SoapRun(random_params(SHAPES), refresh="staggered", precondition_frequency=4, **flags)
    changes = refresh_steps(run, random_gradients(SHAPES, 14))
    offsets = {(i, mode): int(run.state_of(i)[f"refresh_offset_{mode}"]) for i, mode in UNITS}
    assert set(offsets.values()) == {0, 1, 2, 3}
    for t, changed in changes.items():
        assert changed == {unit for unit, offset in offsets.items() if (t + offset) % 4 == 0}


@every_implementation
def test_a_skipped_step_is_not_due(flags):
    """Due means that the step was applied: a missing or bad gradient at t = 4 moves the refresh to the next applied one."""
    run = SoapRun(random_params([(6, 5)]), refresh="together", precondition_frequency=4, **flags)
    gradients = random_gradients([(6, 5)], 6)
    for grads in gradients[:4]:
        run.step(grads)  # t = 3
    before = {k: v.clone() for k, v in run.state_of(0).items()}
    run.step([None])
    with pytest.warns(UserWarning, match="not finite"):
        run.step([torch.full((6, 5), float("nan"))])
    assert all(torch.equal(v, before[k]) for k, v in run.state_of(0).items())
    run.step(gradients[4])
    assert run.state_of(0)["step"] == 4 and not torch.equal(run.state_of(0)["basis_0"], before["basis_0"])


@pytest.mark.parametrize("refresh", ["together", "staggered"])
def test_precondition_frequency_may_change_at_any_time(refresh):
    """From the next step on the new period holds, with the offsets that are in the state."""
    run = SoapRun(random_params(SHAPES), refresh=refresh, precondition_frequency=7)
    gradients = random_gradients(SHAPES, 24)
    refresh_steps(run, gradients[:5])
    offsets = {(i, mode): int(run.state_of(i)[f"refresh_offset_{mode}"]) for i, mode in UNITS}
    for frequency, start, stop in ((3, 5, 14), (1, 14, 16), (10**9, 16, 20), (5, 20, 24)):
        run.optimizer.param_groups[0]["precondition_frequency"] = frequency
        for t, changed in refresh_steps(run, gradients[start:stop], start).items():
            due = {u for u in UNITS if (t + (0 if refresh == "together" else offsets[u])) % frequency == 0}
            assert changed == due, (t, frequency)
    assert offsets == {(i, mode): int(run.state_of(i)[f"refresh_offset_{mode}"]) for i, mode in UNITS}


def test_the_policy_may_change_too():
    run = SoapRun(random_params(SHAPES), refresh="together", precondition_frequency=4)
    gradients = random_gradients(SHAPES, 12)
    refresh_steps(run, gradients[:3])
    run.optimizer.param_groups[0]["refresh"] = "staggered"
    changes = refresh_steps(run, gradients[3:], 3)
    assert all(0 < len(changed) < len(UNITS) for changed in changes.values())


@every_implementation
def test_adaptive_follows_its_criterion(flags):
    """A due unit is refreshed when off(B) > tolerance ||B||_F, B = Q^T G Q written out, and not otherwise."""
    shapes = [(6, 5), (7, 4), (5, 5), (8, 8)]
    gradients = random_gradients(shapes, 30)
    refreshed = passed_over = 0
    run = SoapRun(random_params(shapes), refresh="adaptive", precondition_frequency=2, refresh_tolerance=0.25, **flags)
    for t, grads in enumerate(gradients):
        before = [{k: v.clone() for k, v in run.state_of(i).items()} for i in range(len(shapes))]
        run.step(grads)
        for i in range(len(shapes)):
            for mode in (0, 1):
                if not before[i]:
                    continue
                old, state = before[i][f"basis_{mode}"].double(), run.state_of(i)
                rotated = old.T @ state[f"gram_{mode}"].double() @ old
                share = (rotated - torch.diag(rotated.diagonal())).norm() / rotated.norm()
                due = (t + int(state[f"refresh_offset_{mode}"])) % 2 == 0
                if abs(share - 0.25) <= share_tolerance(len(old), 0.0, torch.finfo(torch.float32).eps):
                    continue  # rounding decides
                changed = not torch.equal(state[f"basis_{mode}"].double(), old)
                assert changed == bool(due and share > 0.25)
                refreshed += changed
                passed_over += due and not changed
    assert refreshed > 20 and passed_over > 20


def test_adaptive_with_a_tolerance_of_zero_is_staggered_and_of_one_is_never():
    runs = {
        key: SoapRun(random_params(SHAPES), precondition_frequency=3, refresh=refresh, refresh_tolerance=tolerance)
        for key, refresh, tolerance in (("all", "adaptive", 0.0), ("none", "adaptive", 1.0), ("plain", "staggered", 0.0))
    }
    gradients = random_gradients(SHAPES, 10)
    for grads in gradients:
        for run in runs.values():
            run.step(grads)
    for i in range(len(SHAPES)):
        for key, value in runs["plain"].state_of(i).items():
            assert torch.equal(value, runs["all"].state_of(i)[key]), key
    assert not any(refresh_steps(runs["none"], gradients, 10).values())


@every_implementation
def test_adaptive_passes_over_a_gram_that_has_become_zero(flags):
    """||P||_F = 0 skips: 0 / 0 is not larger than the tolerance."""
    run = SoapRun(random_params([(4, 3), (4, 3)]), refresh="adaptive", precondition_frequency=1, **flags)
    gradients = random_gradients([(4, 3), (4, 3)], 3)
    run.step(gradients[0])
    run.state_of(0)["gram_0"].zero_()
    basis = run.state_of(0)["basis_0"].clone()
    run.optimizer.param_groups[0]["shampoo_beta"] = 1 - 1e-9
    run.step([torch.zeros(4, 3), gradients[1][1]])
    assert torch.equal(run.state_of(0)["basis_0"], basis)
    assert run.state_of(0)["step"] == 1


# ---- balance --------------------------------------------------------------------------------------------------------------


def loads(flops, offsets, frequency):
    result = {}
    for cost, offset in zip(flops, offsets):
        assert 0 <= offset < frequency
        result[offset] = result.get(offset, 0) + cost
    return result


@given(
    flops=st.lists(st.floats(1, 1e6), max_size=30),
    frequency=st.integers(1, 12),
    load=st.dictionaries(st.integers(0, 11), st.floats(0, 1e6), max_size=4),
)
def test_balance(flops, frequency, load):
    """Greedy into the lightest phase: no phase that got a unit exceeds the mean by more than the unit that it got last, so
    by no more than the largest. (The slowest step is then at most 1 + (largest unit) / (steady step).)"""
    load = {phase: cost for phase, cost in load.items() if phase < frequency}
    offsets = balanced_offsets(flops, frequency, load)
    assert offsets == balanced_offsets(flops, frequency, load)
    total = loads(flops, offsets, frequency)
    mean = (sum(flops) + sum(load.values())) / frequency
    for phase, cost in total.items():
        assert cost + load.get(phase, 0) <= mean + max(flops) * (1 + 1e-9)


def test_longest_first_into_the_lightest():
    assert balanced_offsets([1, 5, 3, 3], 2) == [0, 0, 1, 1]
    assert balanced_offsets([2, 2, 2], 3) == [0, 1, 2]
    assert balanced_offsets([4], 3, {0: 1.0, 2: 5.0}) == [1]
    assert balanced_offsets([4, 4, 4], 2, {0: 1.0}) == [1, 0, 1]
    assert balanced_offsets([], 3) == []


def test_a_very_large_frequency_costs_nothing():
    start = time.process_time()
    offsets = balanced_offsets([float(i) for i in range(100)], 10**15)
    assert len(set(offsets)) == 100 and time.process_time() - start < 1


def test_unit_flops():
    """From shapes alone, growing with both; the passes over m count, so that a wide parameter's small mode is not free."""
    assert unit_flops(1000, 20) > unit_flops(1000, 10) > unit_flops(100, 10) > 0
    assert unit_flops(10**6, 10) - unit_flops(0, 10) == 2.0 * 10 * 10**6


def offsets_of(optimizer):
    return [
        int(value)
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state[p].items()
        if key.startswith("refresh_offset")
    ]


def test_the_slowest_step_of_a_model_is_bounded():
    """The flops of each phase of a convolutional model, from the offsets that are in the state."""
    shapes = [(32, 3, 5, 5), (32, 32, 5, 5), (48, 32, 5, 5), (64, 64), (128, 64), (32,)]
    run = SoapRun(random_params(shapes), precondition_frequency=10)
    run.step(random_gradients(shapes, 1)[0])
    total = [0.0] * 10
    units = []
    for i, shape in enumerate(shapes):
        for key, value in run.state_of(i).items():
            if key.startswith("refresh_offset"):
                cost = unit_flops(torch.Size(shape).numel(), shape[int(key.rsplit("_")[-1])])
                units.append(cost)
                total[int(value)] += cost
    assert max(total) <= sum(units) / 10 + max(units)
    assert max(total) < 0.5 * sum(units)  # "together" has all of it in one step


def test_offsets_do_not_depend_on_the_order_in_which_gradients_come():
    shapes = [(6, 5), (8, 4), (7, 7), (5, 5)]
    gradients = random_gradients(shapes, 1)[0]
    at_once = SoapRun(random_params(shapes), precondition_frequency=4)
    at_once.step(gradients)
    one_by_one = SoapRun(random_params(shapes), precondition_frequency=4)
    for i in (2, 0, 3, 1):
        one_by_one.step([g if k == i else None for k, g in enumerate(gradients)])
    assert offsets_of(at_once.optimizer) == offsets_of(one_by_one.optimizer)


def test_late_parameters_take_the_lightest_phase():
    run = SoapRun(random_params([(9, 9), (9, 9)]), precondition_frequency=5)
    run.step(random_gradients([(9, 9), (9, 9)], 1)[0])
    assert sorted(offsets_of(run.optimizer)) == [0, 1, 2, 3]
    late = [nn.Parameter(p) for p in random_params([(8, 1), (3, 3)])]
    run.optimizer.add_param_group({"params": late})
    for param in late:
        param.grad = torch.ones_like(param)
    run.optimizer.step()
    assert int(run.optimizer.state[late[0]]["refresh_offset_0"]) == 4  # the empty phase


def test_groups_of_other_frequencies_are_balanced_apart():
    a, b = ([nn.Parameter(p) for p in random_params([(5, 5), (5, 5)], seed)] for seed in (0, 1))
    optimizer = SOAP([{"params": a, "precondition_frequency": 4}, {"params": b, "precondition_frequency": 2}])
    for param in a + b:
        param.grad = torch.randn_like(param)
    optimizer.step()
    offsets = offsets_of(optimizer)
    assert sorted(offsets[:4]) == [0, 1, 2, 3] and sorted(offsets[4:]) == [0, 0, 1, 1]


def test_staggered_trains_as_well_as_together():
    """The same least-squares problem: the policies differ in when, not in what."""
    x = random_params([(64, 10)])[0] @ torch.diag(torch.logspace(1, -1, 10))
    y = x @ torch.ones(10, 4)
    losses = {}
    for refresh in POLICIES:
        weight = nn.Parameter(torch.zeros(10, 4))
        optimizer = SOAP([weight], lr=0.02, weight_decay=0, refresh=refresh)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (x @ weight - y).square().mean()
            loss.backward()
            optimizer.step()
        losses[refresh] = loss.item()
    start = y.square().mean().item()
    assert max(losses.values()) < 0.05 * start
    assert losses["staggered"] < 1.1 * losses["together"] and losses["adaptive"] < 1.1 * losses["together"]


def test_the_oracle_agrees_on_which_units_are_due():
    """The oracle writes its own condition; here both are asked for every t of two periods."""
    for policy in ("together", "staggered"):
        oracle = Oracle([torch.zeros(2, 2)], refresh=policy, precondition_frequency=6)
        for offset in range(6):
            for t in range(13):
                assert oracle._due(t, offset, torch.eye(2), torch.eye(2)) == is_due(t, offset, 6, policy)
