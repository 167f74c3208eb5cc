"""Against SOAPs that others wrote: trajectories of the original, and pytorch_optimizer's."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from comparison import OracleRun, SoapRun, every_implementation, random_gradients, random_params, run_lockstep
from oracle import Oracle, from_eigenbasis
from step_comparison import UPDATE_TOLERANCE, assert_as_exact_as, gram_tolerance
from torch import nn

import soap_opt

FILE = numpy.load(Path(__file__).parent / "original_soap.npz")
CASES = json.loads(str(FILE["meta"]))

# Of the largest parameter. Gradients of full rank whose Grams have spread spectra, so that rounding stays rounding: the
# original's own trajectories are off by 1.1e-6 at most (test_the_file_s_own_rounding), another float32 run by about as much,
# whatever its order of summation; four times both stay below it. An update that is one step late or a basis that is not the
# original's does not.
TOLERANCE = 1e-5


def trajectory(case):
    """(gradients, parameters after them) of every step; step 0 has no gradients."""
    meta = CASES[case]
    count = len(meta["shapes"])
    for k in range(meta["steps"] + 1):
        grads = [torch.from_numpy(FILE[f"{case}/grad{i}/{k}"]) for i in range(count)] if k else None
        yield grads, [torch.from_numpy(FILE[f"{case}/param{i}/{k}"]) for i in range(count)]


def follow(run, case, params_of=lambda run: run.params):
    """Give ``run`` the file's gradients; the largest deviation, relative to the largest parameter."""
    worst = 0.0
    for k, (grads, params) in enumerate(trajectory(case)):
        if k:
            run.step(grads)
        for got, want in zip(params_of(run), params):
            worst = max(worst, float((got.detach().cpu() - want).abs().max() / want.abs().max()))
    return worst


def run_of(case, device="cpu", **options):
    meta = CASES[case]
    start = next(trajectory(case))[1]
    original = {**meta["options"], "refresh": "together"}
    if "betas" in original:
        original["betas"] = tuple(original["betas"])
    return SoapRun([p.to(device) for p in start], **{**original, **options})


@pytest.mark.parametrize("case", CASES)
@every_implementation
def test_original(device, flags, case):
    run = run_of(case, device, **flags)
    if device != "cpu":
        step = run.step
        run.step = lambda grads: step([g.to(device) for g in grads])
    assert follow(run, case) <= TOLERANCE


def test_the_file_has_what_it_should():
    """Twelve cases that between them reach every option of the original; the parameters do move."""
    assert len(CASES) == 12
    named = {name for meta in CASES.values() for name in meta["options"]}
    assert named == {
        "weight_decay", "precondition_frequency", "lr", "shampoo_beta", "betas", "correct_bias", "normalize_grads",
        "max_precond_dim", "merge_dims", "data_format",
    }  # fmt: skip
    for case in CASES:
        steps = list(trajectory(case))
        assert torch.equal(steps[0][1][0], steps[1][1][0])  # the first gradient moves nothing
        moved = (steps[-1][1][0] - steps[0][1][0]).abs().max() / steps[0][1][0].abs().max()
        assert moved > 300 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_original_against_the_oracle(case):
    """The oracle itself, so that what is tested against it in lockstep is tested against the original."""
    meta = CASES[case]
    oracle = Oracle(next(trajectory(case))[1], **meta["options"])
    assert follow(oracle, case) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_file_s_own_rounding(case):
    """What TOLERANCE is derived from: the original's float32 against the oracle in float64, which no processor changes."""
    start = [p.double() for p in next(trajectory(case))[1]]
    oracle = Oracle(start, **CASES[case]["options"])
    step = oracle.step
    oracle.step = lambda grads: step([grad.double() for grad in grads])
    assert follow(oracle, case) <= TOLERANCE / 8


@pytest.mark.parametrize("case", ["conv", "merge_channels_last", "frequency_1", "shampoo_beta"])
def test_staggered_is_not_the_original_schedule(case):
    """What makes the cases above a test of the schedule: any other policy leaves the trajectory."""
    if case != "frequency_1":
        assert follow(run_of(case, refresh="staggered"), case) > 10 * TOLERANCE
    else:  # with a frequency of 1 there is only one phase
        assert follow(run_of(case, refresh="staggered"), case) <= TOLERANCE


# pytorch_optimizer's names and semantics: step counts per group, m in parameter space, normalised with eps instead of 1e-30.
THEIR_NAMES = {"max_precond_dim": "max_precondition_dim", "normalize_grads": "normalize_gradient"}


def theirs_of(params, **options):
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    params = [nn.Parameter(p.clone()) for p in params]
    return params, pytorch_optimizer.SOAP(params, **{THEIR_NAMES.get(k, k): v for k, v in options.items()})


PYTORCH_OPTIMIZER_CASES = {
    "plain": ([(8, 8), (6, 4, 3, 3), (5, 3, 4), (6,)], {}),
    "frequency 1": ([(8, 8), (6, 4, 3, 3)], {"precondition_frequency": 1}),
    "betas": ([(7, 7), (8, 8)], {"betas": (0.9, 0.99), "shampoo_beta": 0.8, "precondition_frequency": 2}),
    "decay": ([(8, 8)], {"weight_decay": 0.3, "lr": 0.01}),
    "no bias correction": ([(8, 8)], {"correct_bias": False, "precondition_frequency": 3}),
    "normalised": ([(8, 8), (6, 6)], {"normalize_grads": True, "precondition_frequency": 5}),
    "max_precond_dim": ([(5, 12), (6, 8, 3, 3)], {"max_precond_dim": 6, "precondition_frequency": 4}),
    "merged": ([(2, 3, 4, 5)], {"merge_dims": True, "max_precond_dim": 6, "precondition_frequency": 4}),
    "merged, channels last": (
        [(3, 2, 2, 4)],
        {"merge_dims": True, "max_precond_dim": 6, "data_format": "channels_last", "precondition_frequency": 4},
    ),
    "maximised": ([(8, 8)], {"maximize": True, "weight_decay": 0.0}),
}


class Theirs:
    """pytorch_optimizer's SOAP in float32, in float64, and in float64 with gradients that are off by a float32's rounding.

    How far rounding grows is a property of the gradients, and partly luck: one entry of G' that is near zero makes a step of
    another sign. So four runs that differ from the exact one by nothing else say what ours may be off.
    """

    def __init__(self, params, **options):
        self.twins, self.optimizer = theirs_of(params, **options)
        self.exact, self.exact_optimizer = theirs_of([p.double() for p in params], **options)
        self.disturbed = [theirs_of([p.double() for p in params], **options) for _ in range(3)]
        self.generator = torch.Generator().manual_seed(0)
        self.steps, self.worst = 0, 0.0

    def step(self, grads):
        eps = torch.finfo(torch.float32).eps
        for params, optimizer in ((self.twins, self.optimizer), (self.exact, self.exact_optimizer), *self.disturbed):
            for param, grad in zip(params, grads):
                param.grad = grad.to(param.dtype, copy=True)
                if param.dtype == torch.float64 and params is not self.exact:
                    # what an entry of G' loses, an inner product of the gradient with unit vectors
                    noise = torch.randn(grad.shape, dtype=torch.float64, generator=self.generator)
                    param.grad += eps / 2 * grad.norm() * noise
            optimizer.step()
        self.steps += 1
        self.worst = max(self.worst, *map(self.deviation, [self.twins, *(params for params, _ in self.disturbed)]))

    def deviation(self, params):
        """From float64, of the largest parameter."""
        pairs = [(p.detach(), q.detach()) for p, q in zip(params, self.exact)]
        return max(float((p - q).abs().max() / q.abs().max()) for p, q in pairs)

    def assert_close(self, params):
        """Four times as far at most; and each step rounds the parameter twice, by half an eps."""
        allowed = 4 * self.worst + self.steps * torch.finfo(torch.float32).eps
        assert self.deviation(params) <= allowed < 3 * TOLERANCE


@every_implementation
@pytest.mark.parametrize("case", PYTORCH_OPTIMIZER_CASES)
def test_pytorch_optimizer(case, flags):
    """Free-running, parameters and state, with Grams of full rank. Theirs keeps m in parameter space: turned for comparison."""
    shapes, options = PYTORCH_OPTIMIZER_CASES[case]
    params = random_params(shapes, seed=3)
    ours, theirs = SoapRun(params, **options, refresh="together", **flags), Theirs(params, **options)
    for grads in random_gradients(shapes, 25, seed=3):
        ours.step(grads)
        theirs.step(grads)
        theirs.assert_close(ours.params)
    oracle = Oracle(params, **options)  # for the view
    for i, (twin, exact) in enumerate(zip(theirs.twins, theirs.exact)):
        state, other, right = ours.state_of(i), theirs.optimizer.state[twin], theirs.exact_optimizer.state[exact]
        assert int(state["step"]) == 24
        m = from_eigenbasis(state["exp_avg"], state, oracle.views[i])
        # averages, rounded twice at each step
        assert_as_exact_as(m, other["exp_avg"], right["exp_avg"], "m", 2 * 24)
        assert_as_exact_as(state["exp_avg_sq"], other["exp_avg_sq"], right["exp_avg_sq"], "v", 2 * 24)
        for mode in oracle.views[i].modes:
            assert_as_exact_as(state[f"gram_{mode}"], other["GG"][mode], right["GG"][mode], f"gram_{mode}", 2 * 24)
            # sensitive to the distance between eigenvalues, which the seed leaves at more than 1e-3 of the largest
            ours_up_to_sign, theirs_up_to_sign = (
                basis * (basis * right["Q"][mode]).sum(0).sign().float() for basis in (state[f"basis_{mode}"], other["Q"][mode])
            )
            assert_as_exact_as(ours_up_to_sign, theirs_up_to_sign, right["Q"][mode], f"basis_{mode}")


@every_implementation
@pytest.mark.parametrize("reference", ["oracle", "pytorch_optimizer"])
def test_precondition_1d_in_lockstep(flags, reference):
    """1-D Grams: g g^T has rank one, so that trajectories may not be compared freely; one step from equal state may.

    pytorch_optimizer gets our state before each of its steps and is compared on the update."""
    shapes, options = [(6,), (9,)], {"precondition_1d": True, "precondition_frequency": 2, "weight_decay": 0.1}
    ours = SoapRun(random_params(shapes), **options, refresh="together", **flags)
    if reference == "oracle":
        options = {**options, "refresh": "together"}
        assert run_lockstep(ours, OracleRun(random_params(shapes), **options), random_gradients(shapes, 40), options) > 30
        return
    twins, theirs = theirs_of(random_params(shapes), **options)
    for number, grads in enumerate(random_gradients(shapes, 40)):
        before = [p.detach().clone() for p in ours.params]
        for i, (twin, grad) in enumerate(zip(twins, grads)):
            twin.data.copy_(before[i])
            twin.grad = grad.clone()
            if number:
                state = ours.state_of(i)
                other = theirs.state[twin]
                assert len(other["GG"]) == len(other["Q"]) == 1
                other["exp_avg"] = state["basis_0"] @ state["exp_avg"]
                other["exp_avg_sq"] = state["exp_avg_sq"].clone()
                other["GG"], other["Q"] = [state["gram_0"].clone()], [state["basis_0"].clone()]
        theirs.step()
        ours.step(grads)
        eps = torch.finfo(torch.float32).eps
        for i, (twin, grad) in enumerate(zip(twins, grads)):
            if number == 0:
                assert torch.equal(twin, ours.params[i])
                continue
            step, state, other = ours.params[i].detach() - before[i], ours.state_of(i), theirs.state[twin]
            # their m is turned into the eigenbasis once more than ours: each entry of it, and of G', is off by a few eps of the
            # norm, which m / sqrt(v) of a null space makes much of; the step size is lr / sqrt(1 - beta^t)
            noise = 8 * eps * (state["exp_avg"].norm() + grad.norm()) / (state["exp_avg_sq"].sqrt() + 1e-8)
            allowed = UPDATE_TOLERANCE * step.norm() + 3e-3 * (1 - 0.95**number) ** -0.5 * noise.norm()
            assert (twin.detach() - before[i] - step).norm() <= allowed + 2 * eps * twin.detach().norm(), number
            assert (state["gram_0"] - other["GG"][0]).norm() <= gram_tolerance(1, eps) * state["gram_0"].norm()
            if number > 12:  # 13 rank-one Grams of 6 or 9 dimensions are of full rank, so that v has an order
                v, delta = state["exp_avg_sq"], 4 * eps * grad.norm()
                allowed = 16 * eps * v + 4 * delta * (0.05 * v).sqrt() + 0.05 * delta**2
                assert ((v - other["exp_avg_sq"]).abs() <= allowed).all(), number


def test_a_1d_parameter_without_precondition_1d_is_adam_there_too():
    ours = SoapRun(random_params([(6,), ()]), weight_decay=0.1, refresh="together")
    twins, theirs = theirs_of(random_params([(6,), ()]), weight_decay=0.1)
    for grads in random_gradients([(6,), ()], 15):
        ours.step(grads)
        for twin, grad in zip(twins, grads):
            twin.grad = grad.clone()
        theirs.step()
        for param, twin in zip(ours.params, twins):
            # each step rounds p twice and makes an update of some ten operations, at most lr (by Cauchy and Schwarz: the two
            # betas are equal)
            rounding = torch.finfo(torch.float32).eps * (twin.detach().abs().max() + 10 * 3e-3)
            torch.testing.assert_close(param, twin, rtol=0, atol=15 * float(rounding))
    assert set(ours.state_of(0)) == {"step", "initialized", "exp_avg", "exp_avg_sq"}


def test_shampoo_beta_of_minus_one_is_none():
    """The original's default is -1: betas[1]."""
    runs = [SoapRun(random_params([(6, 5)]), shampoo_beta=beta, betas=(0.9, 0.8)) for beta in (None, -1, 0.8)]
    for grads in random_gradients([(6, 5)], 15):
        for run in runs:
            run.step(grads)
    for run in runs[1:]:
        assert torch.equal(run.params[0], runs[0].params[0])
        assert torch.equal(run.state_of(0)["gram_0"], runs[0].state_of(0)["gram_0"])


def test_defaults_are_the_original_s():
    defaults = soap_opt.SOAP([nn.Parameter(torch.ones(2, 2))]).defaults
    original = {
        "lr": 3e-3, "betas": (0.95, 0.95), "eps": 1e-8, "weight_decay": 0.01, "precondition_frequency": 10,
        "max_precond_dim": 10000, "merge_dims": False, "precondition_1d": False, "normalize_grads": False,
        "data_format": "channels_first", "correct_bias": True,
    }  # fmt: skip
    assert {name: defaults[name] for name in original} == original
