"""The operators of csrc/library.cpp: schemas and argument checks."""

import pytest
import torch
from comparison import NO_ENGINE, RAGGED, random_params
from operator_arguments import (
    OPS,
    POSITIONAL,
    assert_same_tensors,
    call_directly,
    call_step,
    gram_arguments,
    layouts_of,
    refresh_,
    snapshot,
    step_arguments,
)

from soap_opt import cpu
from soap_opt.options import Options, names_of

pytestmark = pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))


# ---- schemas ------------------------------------------------------------------------------------------------------------


def test_opcheck_step():
    arguments = list(step_arguments().items())
    torch.library.opcheck(OPS.step_.default, tuple(value for _, value in arguments[:POSITIONAL]), dict(arguments[POSITIONAL:]))


def test_opcheck_gram_ema():
    torch.library.opcheck(OPS.gram_ema_.default, tuple(gram_arguments(grad_scale=torch.tensor([2.0]))))


@pytest.mark.parametrize("tolerance", [-1.0, 0.5])
def test_opcheck_refresh_basis(tolerance):
    arguments = step_arguments()
    orders = [torch.empty(len(gram), dtype=torch.int64) for gram in arguments["grams"]]
    rotations = [torch.empty_like(gram) for gram in arguments["grams"]]
    outcomes = torch.full((len(orders),), -1, dtype=torch.int32)
    results = (orders, rotations, outcomes)
    torch.library.opcheck(OPS.refresh_basis_.default, (arguments["grams"], arguments["bases"], *results, tolerance))


def test_opcheck_init_basis():
    torch.library.opcheck(OPS.init_basis.default, (step_arguments()["grams"],))


def test_opcheck_scratch_numel():
    # an int from a tensor's values: there is nothing to trace it with
    tests = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(
        OPS.scratch_numel.default, (cpu.layout_table(layouts_of(random_params(RAGGED))), 2, torch.float32), test_utils=tests
    )


def test_empty_lists():
    arguments = step_arguments([])
    assert call_step(arguments).shape == (0,)
    assert OPS.gram_ema_(*gram_arguments([])).shape == (0,)


# ---- argument errors ----------------------------------------------------------------------------------------------------


def shorter(values):
    return values[:-1]


def replaced(make):
    return lambda values: [make(values[0]), *values[1:]]


def with_option(**changes):
    """A change of step_'s numbers, by their names."""
    places = {name: place for place, name in enumerate(["beta1", "beta2", *names_of("step")[1:]])}
    return lambda row: [changes.get(name, row[place]) for name, place in places.items()]


STEP_ERRORS = {
    "gradients missing": ("grads", shorter),
    "moments missing": ("exp_avgs", shorter),
    "second moments missing": ("exp_avg_sqs", shorter),
    "steps missing": ("state_steps", shorter),
    "Grams missing": ("grams", shorter),
    "bases missing": ("bases", shorter),
    "offsets missing": ("refresh_offsets", shorter),
    "parameters missing": ("params", shorter),
    "a gradient of another shape": ("grads", replaced(lambda x: x[:-1])),
    "a transposed gradient": ("grads", replaced(lambda x: x.flatten())),
    "a moment of another shape": ("exp_avgs", replaced(lambda x: x[:-1])),
    "a second moment of another dtype": ("exp_avg_sqs", replaced(torch.Tensor.double)),
    "a parameter of another dtype": ("params", replaced(torch.Tensor.double)),
    "a parameter of integers": ("params", replaced(torch.Tensor.long)),
    "a Gram of another size": ("grams", replaced(lambda x: x[:-1])),
    "a Gram of another dtype": ("grams", replaced(torch.Tensor.double)),
    "a basis of another size": ("bases", replaced(lambda x: x[:-1])),
    "a basis of another dtype": ("bases", replaced(torch.Tensor.double)),
    "a basis in one row": ("bases", replaced(lambda x: x.reshape(1, -1))),
    "a basis without rows": ("bases", replaced(torch.Tensor.flatten)),
    "a Gram in one row": ("grams", replaced(lambda x: x.reshape(1, -1))),
    "an offset without a number": ("refresh_offsets", replaced(lambda x: x.new_empty(0))),
    "another refresh policy": ("options", with_option(refresh=3.0)),
    "a policy between two": ("options", with_option(refresh=0.5)),
    "an option missing": ("options", shorter),
    "an offset of another dtype": ("refresh_offsets", replaced(torch.Tensor.float)),
    "a step of another dtype": ("state_steps", replaced(torch.Tensor.double)),
    "a step of two numbers": ("state_steps", replaced(lambda x: x.repeat(2))),
    "layouts of another dtype": ("layouts", lambda x: x.int()),
    "layouts with gaps": ("layouts", lambda x: x.repeat_interleave(2)[::2]),
    "layouts of other parameters": ("layouts", lambda x: cpu.layout_table(layouts_of(random_params(RAGGED[::-1])))),
    "scratch too small": ("scratch", lambda x: x[:-1]),
    "scratch of another dtype": ("scratch", torch.Tensor.double),
    "scratch with gaps": ("scratch", lambda x: x.repeat_interleave(2)[::2]),
    "a step that is a negative view": ("state_steps", replaced(torch._neg_view)),
    "an offset that is a negative view": ("refresh_offsets", replaced(torch._neg_view)),
    **{
        f"{key} whose elements share memory": (key, replaced(lambda x: x[:1].expand_as(x)))
        for key in ("params", "exp_avgs", "exp_avg_sqs", "grams", "bases")
    },
    "moments of bfloat16": ("exp_avgs", lambda values: [x.bfloat16() for x in values]),
}


@pytest.mark.parametrize("call", [call_step, call_directly])
@pytest.mark.parametrize("name", STEP_ERRORS)
def test_step_refuses_what_does_not_fit_and_changes_nothing(name, call):
    key, change = STEP_ERRORS[name]
    arguments = step_arguments()
    arguments[key] = change(arguments[key])
    before = snapshot(arguments)
    with pytest.raises(RuntimeError):
        call(arguments)
    assert_same_tensors(arguments, before)


def test_step_names_the_parameter_that_does_not_fit():
    arguments = step_arguments()
    arguments["exp_avgs"][1] = arguments["exp_avgs"][1][:-1]
    with pytest.raises(RuntimeError, match=r"parameter 1 of shape \[6, 4, 3, 3\]"):
        call_step(arguments)
    arguments = step_arguments()
    arguments["bases"][-1] = arguments["bases"][-1][:1].expand_as(arguments["bases"][-1])
    with pytest.raises(RuntimeError, match=r"step_: elements of a basis of parameter \d+, .* share memory.*; clone\(\) it"):
        call_step(arguments)
    arguments = step_arguments()
    with pytest.raises(RuntimeError, match="scratch must be contiguous, Float, of at least"):
        call_step({**arguments, "scratch": arguments["scratch"][1:]})


def test_step_refuses_a_frequency_of_zero():
    arguments = step_arguments()
    with pytest.raises(RuntimeError, match="precondition_frequency"):
        call_step({**arguments, "options": with_option(precondition_frequency=0.0)(arguments["options"])})


# One (12, 9, 3, 3): 1 layout, 1 parameter, its layout 0; 4 dimensions in order, 972 elements, 3 groups: 12 and 9 wide with one
# mode each, 9 wide with two
TABLE = [1, 1, 0, 4, 0, 1, 2, 3, 972, 3, 12, 1, 0, 12, 9, 1, 1, 9, 9, 2, 2, 3, 3, 3]
BROKEN_TABLES = {
    "empty": [],
    "cut": TABLE[:-1],
    "too long": [*TABLE, 0],
    "a count beyond its end": [1, 10**6, *TABLE[2:]],
    "a negative count": [-1, *TABLE[1:]],
    "a layout that there is not": [*TABLE[:2], 1, *TABLE[3:]],
    "a dimension twice": [*TABLE[:4], 1, *TABLE[5:]],
    "a dimension beyond the last": [*TABLE[:4], 4, *TABLE[5:]],
    "other elements": [*TABLE[:8], 973, *TABLE[9:]],
    "a group wider than its modes": [*TABLE[:10], 24, *TABLE[11:]],
    "a position beyond the last": [*TABLE[:12], 4, *TABLE[13:]],
    "a position twice": [*TABLE[:12], 1, *TABLE[13:]],
    "a Kronecker product that is too wide": [1, 1, 0, 2, 0, 1, 100, 1, 100, 2, 0, 1, 10, 10],
}


def test_the_table_that_the_broken_ones_are_made_of():
    (layout,) = layouts_of([torch.empty(12, 9, 3, 3)])
    assert cpu.layout_table((layout,)).tolist() == TABLE


@pytest.mark.parametrize("table", BROKEN_TABLES.values(), ids=BROKEN_TABLES)
def test_a_table_that_does_not_hold_together_is_refused(table):
    with pytest.raises(RuntimeError, match="layouts: "):
        OPS.scratch_numel(torch.tensor(table, dtype=torch.int64), 1, torch.float32)


def test_an_empty_parameter_whose_modes_are_not_is_passed_over():
    """Not a layout that layout.py makes; but one that holds together."""
    arguments = step_arguments([(0, 600)])
    arguments["layouts"] = torch.tensor([1, 1, 0, 2, 0, 1, 0, 2, 0, 0, 600, 1, 0, 600])
    arguments |= {"grams": [torch.eye(600)], "bases": [torch.eye(600)], "refresh_offsets": [torch.tensor(0)]}
    arguments["scratch"] = torch.zeros(OPS.scratch_numel(arguments["layouts"], torch.get_num_threads(), torch.float32))
    assert call_step({**arguments, "options": Options(precondition_frequency=1).step_row()}).tolist() == [0]


@pytest.mark.parametrize("place", range(len(TABLE)))
def test_no_number_of_a_table_is_trusted(place):
    for value in (-(2**62), -1, 0, 1, 2, 7, 1 << 20, 2**62):
        table = torch.tensor([*TABLE[:place], value, *TABLE[place + 1 :]], dtype=torch.int64)
        try:
            assert OPS.scratch_numel(table, 2, torch.float32) >= 0
        except RuntimeError as error:
            assert "layouts: " in str(error)


GRAM_ERRORS = {
    "a gradient missing": (0, shorter),
    "Grams missing": (1, shorter),
    "a gradient of another shape": (0, replaced(lambda x: x[:-1])),
    "a Gram of another size": (1, replaced(lambda x: x[:-1])),
    "a Gram of another dtype": (1, replaced(torch.Tensor.double)),
    "layouts of another dtype": (2, lambda x: x.int()),
    "scratch too small": (3, lambda x: x[:-1]),
    "scratch of integers": (3, torch.Tensor.int),
}


@pytest.mark.parametrize("name", GRAM_ERRORS)
def test_gram_ema_refuses_what_does_not_fit_and_changes_nothing(name):
    place, change = GRAM_ERRORS[name]
    arguments = gram_arguments()
    arguments[place] = change(arguments[place])
    before = [x.clone() for x in arguments[1]]
    with pytest.raises(RuntimeError):
        OPS.gram_ema_(*arguments)
    assert all(torch.equal(x, old) for x, old in zip(arguments[1], before))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda g, b: (g[:-1], b), id="lists of different lengths"),
        pytest.param(lambda g, b: ([g[0][:-1], *g[1:]], b), id="a Gram that is not square"),
        pytest.param(lambda g, b: (g, [*b[:-1], b[-1][:-1, :-1]]), id="a basis of another size"),
        pytest.param(lambda g, b: (g, [*b[:-1], b[-1].double()]), id="a basis of another dtype"),
        pytest.param(lambda g, b: ([x.flatten() for x in g], [x.flatten() for x in b]), id="vectors"),
    ],
)
def test_refresh_basis_refuses_what_does_not_fit_and_changes_nothing(change):
    arguments = step_arguments()
    grams, bases = change(arguments["grams"], arguments["bases"])
    before = [x.clone() for x in bases]
    with pytest.raises(RuntimeError):
        refresh_(grams, bases)
    assert all(torch.equal(x, old) for x, old in zip(bases, before))
