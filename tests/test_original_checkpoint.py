"""Checkpoints that the original SOAP and pytorch_optimizer's wrote."""

import copy
import warnings

import pytest
import torch
from checkpoint_runs import assert_as_it_was, assert_equal_runs, frozen, resumed, saved, trained
from comparison import OracleRun, SoapRun, every_implementation, random_gradients, random_params, run_lockstep
from oracle import Oracle, original_state_dict
from test_parity import Theirs

import soap_opt

BOTH = [False, True]


def turning_tolerance(x):
    """For an entry of x that was turned out of its eigenbasis and back in: inner products with unit vectors, in any order.

    At most eight of them here (four modes), each of a few terms and with less than an eps of ||x|| lost.
    """
    return 8 * torch.finfo(x.dtype).eps * float(x.norm())


# (shapes, options): every kind of entry of GG: [] of a 1-D parameter, none of a 0-D one, [] above max_precond_dim, 1 x 1.
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
