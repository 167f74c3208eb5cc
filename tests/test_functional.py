"""The specification against the oracle and Adam, the multi-tensor and the fused path against the specification."""

import pytest
import torch
from comparison import (
    IMPLEMENTATIONS,
    OracleRun,
    SoapRun,
    every_implementation,
    implementations,
    random_gradients,
    random_params,
    run_lockstep,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import soap_opt

# Every kind of layout: tiny modes (Kronecker products), equal shapes (batches), odd sizes, ones, 0-D and 1-D.
SHAPES = [
    (8, 8),
    (6, 4, 3, 3),
    (5,),
    (),
    (5, 3, 4),
    (4, 6, 5, 5),
    (8, 8),
    (8, 8),
    (1, 7),
    (7, 1),
    (2, 3, 1, 4, 2),
    (1, 1),
    (1,),
]

POLICIES = ["together", "staggered", "adaptive"]

# 24 steps: with a frequency of 3 every basis is refreshed eight times, and the bias correction is far from both its ends.
STEPS = 24


def lockstep(params, gradients, options, tested="multi", before_step=None):
    reference = SoapRun(params, foreach=False, **options)
    other = OracleRun(params, **options) if tested == "oracle" else SoapRun(params, **IMPLEMENTATIONS[tested], **options)
    return run_lockstep(reference, other, gradients, options, before_step)


@pytest.mark.parametrize("refresh", POLICIES)
@pytest.mark.parametrize("tested", implementations("oracle", "multi", "fused"))
def test_lockstep_of_every_layout(device, tested, refresh):
    options = {"lr": 0.01, "weight_decay": 0.1, "precondition_frequency": 3, "refresh": refresh}
    gradients = random_gradients(SHAPES, STEPS, missing=0.1, rank_one=0.2, device=device)
    refreshed = lockstep(random_params(SHAPES, device=device), gradients, options, tested)
    assert refreshed > 100  # 21 modes, several refreshes of each: the comparison did see refreshed bases


@pytest.mark.parametrize("tested", implementations("oracle", "multi", "fused"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_lockstep_of_dtypes(device, tested, dtype):
    options = {"lr": 0.05, "precondition_frequency": 4, "refresh": "staggered"}
    gradients = random_gradients(SHAPES, 12, dtype=dtype, device=device)
    assert lockstep(random_params(SHAPES, dtype=dtype, device=device), gradients, options, tested) > 30


@pytest.mark.parametrize("tested", implementations("oracle", "multi", "fused"))
@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.9, 0.999), "shampoo_beta": 0.7},
        {"shampoo_beta": -1.0},
        {"max_precond_dim": 4},
        {"max_precond_dim": 0},
        {"merge_dims": True, "max_precond_dim": 12},
        {"merge_dims": True, "max_precond_dim": 20, "data_format": "channels_last"},
        {"merge_dims": True, "max_precond_dim": 150},
        {"precondition_1d": True},
        {"precondition_1d": True, "merge_dims": True, "max_precond_dim": 6},
        {"normalize_grads": True},
        {"correct_bias": False, "weight_decay": 0.0},
        {"maximize": True},
        {"lr": 0.0},
        {"eps": 1e-3, "betas": (0.0, 0.5)},
        {"precondition_frequency": 1},
        {"refresh": "adaptive", "refresh_tolerance": 0.2},
        {"data_format": "channels_last"},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_lockstep_of_options(tested, options):
    options = {"lr": 0.01, "precondition_frequency": 3, "refresh": "together", **options}
    lockstep(random_params(SHAPES), random_gradients(SHAPES, STEPS // 2, rank_one=0.1), options, tested)


@st.composite
def problems(draw):
    shape = st.lists(st.integers(0, 7), max_size=5).map(tuple)
    shapes = draw(st.lists(shape, min_size=1, max_size=4))
    shapes += draw(st.lists(st.sampled_from(shapes), max_size=3))  # equal shapes, which are batched
    options = {
        "lr": draw(st.sampled_from([1e-3, 0.1])),
        "betas": draw(st.sampled_from([(0.95, 0.95), (0.9, 0.999), (0.0, 0.9)])),
        "eps": draw(st.sampled_from([1e-8, 1e-5])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.3])),
        "shampoo_beta": draw(st.sampled_from([None, -1, 0.5, 0.99])),
        "precondition_frequency": draw(st.integers(1, 6)),
        "max_precond_dim": 10000,
        "merge_dims": draw(st.booleans()),
        "precondition_1d": draw(st.booleans()),
        "normalize_grads": draw(st.booleans()),
        "data_format": draw(st.sampled_from(["channels_first", "channels_last"])),
        "correct_bias": draw(st.booleans()),
        "refresh": draw(st.sampled_from(POLICIES)),
        "refresh_tolerance": draw(st.sampled_from([0.0, 0.01, 0.3])),
        "maximize": draw(st.booleans()),
    }
    # merged without a limit, five sizes up to 7 would be one Gram of 16807 x 16807
    options["max_precond_dim"] = draw(st.sampled_from([0, 1, 3, 6, 30] + ([60] if options["merge_dims"] else [10000])))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    kind = {"missing": draw(st.sampled_from([0.0, 0.2])), "rank_one": draw(st.sampled_from([0.0, 0.5]))}
    return shapes, options, dtype, kind, draw(st.integers(0, 2**20))


@pytest.mark.parametrize("tested", implementations("oracle", "multi", "fused"))
@settings(max_examples=25)
@given(problem=problems())
def test_lockstep_of_anything(tested, problem):
    shapes, options, dtype, kind, seed = problem
    gradients = random_gradients(shapes, STEPS, seed, dtype=dtype, **kind)
    lockstep(random_params(shapes, seed, dtype=dtype), gradients, options, tested)


@pytest.mark.slow
@pytest.mark.parametrize("tested", implementations("oracle", "multi", "fused"))
@settings(max_examples=250)
@given(problem=problems())
def test_lockstep_of_anything_at_length(tested, problem):
    shapes, options, dtype, kind, seed = problem
    gradients = random_gradients(shapes, 40, seed, dtype=dtype, **kind)
    lockstep(random_params(shapes, seed, dtype=dtype), gradients, options, tested)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tested", implementations("multi", "fused"))
def test_lockstep_of_sizes_that_are_looped(device, tested, threads):
    """Beyond the measured sizes: bases above 64 are decomposed one by one, tensors above 4,096 elements are not stacked."""
    torch.set_num_threads(threads)
    shapes = [(96, 80), (96, 80), (70, 5), (70, 5), (20, 24, 5, 5), (20, 24, 5, 5), (64, 64), (64, 64)]
    options = {"lr": 0.01, "precondition_frequency": 3, "refresh": "staggered"}
    params = random_params(shapes, device=device)
    assert lockstep(params, random_gradients(shapes, 8, device=device), options, tested) > 20


@pytest.mark.parametrize("tested", implementations("multi", "fused"))
def test_lockstep_over_several_buckets(tested):
    """More than the 2^19 elements that one bucket of the CPU path holds."""
    shapes = [(512, 1100), (8, 8), (300, 500), (700, 600), (8, 8)]
    options = {"lr": 0.01, "max_precond_dim": 16, "refresh": "together", "precondition_frequency": 2}
    lockstep(random_params(shapes), random_gradients(shapes, 4), options, tested)


@pytest.mark.parametrize("tested", implementations("multi", "fused"))
def test_lockstep_of_a_mixture_in_one_group(device, tested):
    """Dtypes and devices mixed in one group, which torch's own optimizers allow."""
    params, gradients = [], [[] for _ in range(10)]
    for place in {"cpu", device}:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
            shapes = [(6, 5), (3, 3, 3), (4,)]
            params += random_params(shapes, len(params), dtype=dtype, device=place)
            for row, new in zip(gradients, random_gradients(shapes, 10, len(params), dtype=dtype, device=place)):
                row += new
    lockstep(params, gradients, {"precondition_frequency": 2, "refresh": "staggered", "lr": 0.1}, tested)


def strided(x, order):
    """x with its dimensions in memory in the given order."""
    inverse = [order.index(i) for i in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("tested", implementations("oracle", "multi", "fused"))
def test_lockstep_of_memory_formats(device, tested):
    params, gradients = [], [[] for _ in range(12)]
    cases = [
        ((6, 4, 3, 3), (0, 2, 3, 1), (0, 2, 3, 1)),  # channels_last
        ((6, 4, 3, 3), (0, 2, 3, 1), (0, 1, 2, 3)),  # channels_last, its gradient is not
        ((6, 4, 3, 3), (0, 1, 2, 3), (0, 2, 3, 1)),  # the other way round
        ((5, 7), (1, 0), (1, 0)),  # a transposed matrix
        ((5, 7), (0, 1), (1, 0)),
        ((2, 3, 4), (2, 0, 1), (1, 2, 0)),
    ]
    for i, (shape, order, grad_order) in enumerate(cases):
        params.append(strided(random_params([shape], i, device=device)[0], order))
        for row, (grad,) in zip(gradients, random_gradients([shape], 12, i, device=device)):
            row.append(strided(grad, grad_order))
    options = {"precondition_frequency": 3, "refresh": "together", "lr": 0.01}
    for merging in ({}, {"merge_dims": True, "max_precond_dim": 12, "data_format": "channels_last"}):
        lockstep(params, gradients, {**options, **merging}, tested)
    run = SoapRun(params, **options)
    run.step(gradients[0])
    for i, (_, order, _) in enumerate(cases):  # m and v share the parameter's memory format
        for key in ("exp_avg", "exp_avg_sq"):
            assert run.state_of(i)[key].stride() == run.params[i].stride(), (order, key)


def test_an_expanded_gradient_is_like_its_copy():
    """sum().backward() gives gradients of stride 0."""
    param = random_params([(4, 3)])[0]
    grads = [torch.randn(4, 1, generator=torch.Generator().manual_seed(i)).expand(4, 3) for i in range(5)]
    expanded, copied = SoapRun([param], refresh="together"), SoapRun([param], refresh="together")
    for grad in grads:
        expanded.params[0].grad = grad
        expanded.optimizer.step()
        assert expanded.params[0].grad.stride() == grad.stride()
        copied.step([grad.contiguous()])
        assert torch.equal(expanded.params[0], copied.params[0])


def test_parameters_that_overlap_no_memory_but_are_not_dense():
    """A slice as parameter: neither contiguous nor a permutation of something contiguous."""
    base = random_params([(6, 10)])[0]
    sliced = nn.Parameter(base[:, ::2])
    assert not sliced.is_contiguous()
    options = {"precondition_frequency": 2, "refresh": "together", "lr": 0.1}
    plain, run = (SoapRun([base[:, ::2].contiguous()], **options) for _ in range(2))
    run.params, run.optimizer = [sliced], soap_opt.SOAP([sliced], **options)
    assert run_lockstep(plain, run, random_gradients([(6, 5)], 8), options) > 0


@every_implementation
def test_hyper_parameters_changed_on_the_way_take_effect(flags):
    shapes = [(6, 5), (4, 3, 3, 3), (4,)]
    options = {"refresh": "together", "precondition_frequency": 3}
    reference, tested = SoapRun(random_params(shapes), **flags, **options), OracleRun(random_params(shapes), **options)
    changes = {
        2: {"lr": 0.1},
        4: {"betas": (0.5, 0.8)},
        6: {"eps": 1e-2},
        8: {"weight_decay": 0.7},
        10: {"shampoo_beta": 0.3},
        12: {"normalize_grads": True},
        14: {"correct_bias": False},
        16: {"maximize": True},
        18: {"precondition_frequency": 1},
        20: {"refresh": "adaptive", "refresh_tolerance": 0.3},
        22: {"lr": torch.tensor(0.02)},
    }

    def change(number):
        new = changes.get(number, {})
        reference.optimizer.param_groups[0].update(new)
        tested.oracle.options.update(new)
        options.update(new)

    run_lockstep(reference, tested, random_gradients(shapes, 26), options, change)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_never_modified(flags, dtype):
    shapes = [(6, 5), (4, 3, 3, 3), (4,), (), (6, 5)]
    run = SoapRun(random_params(shapes, dtype=dtype), **flags, maximize=True, normalize_grads=True)
    run.optimizer.grad_scale = torch.tensor(4.0)
    for grads in random_gradients(shapes, 4, dtype=dtype):
        run.step(grads)
        for param, grad in zip(run.params, grads):
            assert torch.equal(param.grad, grad)
    assert all(float(run.state_of(i)["step"]) == 3 for i in range(len(shapes)))


@every_implementation
def test_grad_scale_is_divided_out_before_the_gram(flags):
    """A power of two scales without rounding: the result is the same to the bit."""
    shapes = [(6, 5), (4, 3, 3, 3), (4,)]
    plain, scaled = (SoapRun(random_params(shapes), **flags, precondition_frequency=2) for _ in range(2))
    scaled.optimizer.grad_scale = torch.tensor([1024.0])
    for grads in random_gradients(shapes, 6):
        plain.step(grads)
        scaled.step([grad * 1024 for grad in grads])
    for i in range(len(shapes)):
        assert torch.equal(plain.params[i], scaled.params[i])
        for key, value in plain.state_of(i).items():
            assert torch.equal(value, scaled.state_of(i)[key]), key


def assert_adams_step(run, adam, twins, grads):
    """One step of both from Adam's state, element by element: nothing but the rounding of a few operations.

    A product with an identity adds zeros and rounds nothing. Adam adds its eps to sqrt(v / (1 - b2^t)), SOAP to sqrt(v).
    """
    group, eps = adam.param_groups[0], torch.finfo(torch.float32).eps
    before = []
    for i, (param, twin) in enumerate(zip(run.params, twins)):
        m, v = (adam.state[twin].get(key, torch.zeros_like(twin)) for key in ("exp_avg", "exp_avg_sq"))
        before.append((twin.detach().clone(), m.abs()))
        param.data.copy_(twin.detach())
        run.state_of(i)["exp_avg"].copy_(m)
        run.state_of(i)["exp_avg_sq"].copy_(v)
    run.step(grads)
    for twin, grad in zip(twins, grads):
        twin.grad = grad
    adam.step()
    for i, (param, twin, grad, (old, old_m)) in enumerate(zip(run.params, twins, grads, before)):
        got, want = run.state_of(i), adam.state[twin]
        assert got["step"] == want["step"]
        # m: three operations whose results are at most |m| + |g|; v: four, relatively, all terms positive; of each result
        # half an eps is lost, on both sides
        m_allowed = 3 * eps * (old_m + grad.abs())
        assert ((got["exp_avg"] - want["exp_avg"]).abs() <= m_allowed).all()
        assert ((got["exp_avg_sq"] - want["exp_avg_sq"]).abs() <= 4 * eps * want["exp_avg_sq"]).all()
        # the update: v's error, and at most 14 operations more; m's error; the step size is at most 0.01
        root, step = want["exp_avg_sq"].sqrt(), (twin.detach() - old).abs()
        allowed = (16 * eps + group["eps"] / root) * step + 0.01 * m_allowed / root + eps * (old.abs() + twin.detach().abs())
        assert ((param - twin).detach().abs() <= allowed).all()


@every_implementation
@pytest.mark.parametrize("correct_bias", [True, False])
def test_identity_bases_reduce_to_adam_one_step_later(flags, correct_bias):
    """Without modes (max_precond_dim=0) SOAP is Adam that skips its first gradient."""
    shapes = [(6, 5), (4, 3, 3, 3), (4,), ()]
    run = SoapRun(random_params(shapes), lr=0.01, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.0, max_precond_dim=0,
                  correct_bias=correct_bias, **flags)  # fmt: skip
    twins = [nn.Parameter(p.clone()) for p in random_params(shapes)]
    adam = torch.optim.Adam(twins, lr=0.01, betas=(0.9, 0.99), eps=1e-10)
    for number, grads in enumerate(random_gradients(shapes, 40)):
        if number == 0:
            run.step(grads)
            assert all(torch.equal(p, q) for p, q in zip(run.params, twins))
            continue
        if not correct_bias:  # Adam has no such switch: its correction undone by its learning rate
            adam.param_groups[0]["lr"] = 0.01 * (1 - 0.9**number) / (1 - 0.99**number) ** 0.5
        assert_adams_step(run, adam, twins, grads)


@every_implementation
def test_identity_bases_in_the_state_reduce_to_adam_too(flags):
    """The mode products do nothing with Q = I; a frequency beyond the run keeps the bases as they are."""
    shapes = [(6, 5), (4, 3, 3, 3), (16, 16)]
    run = SoapRun(random_params(shapes), lr=0.01, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.0, **flags,
                  precondition_frequency=10**9, refresh="together")  # fmt: skip
    twins = [nn.Parameter(p.clone()) for p in random_params(shapes)]
    adam = torch.optim.Adam(twins, lr=0.01, betas=(0.9, 0.99), eps=1e-10)
    for number, grads in enumerate(random_gradients(shapes, 20)):
        if number == 0:
            run.step(grads)
            for i in range(len(shapes)):
                for key, value in run.state_of(i).items():
                    if key.startswith("basis_"):
                        value.copy_(torch.eye(value.shape[0]))
            continue
        assert_adams_step(run, adam, twins, grads)


@pytest.mark.slow
@every_implementation
@pytest.mark.parametrize("refresh", POLICIES)
def test_bases_stay_orthogonal_over_hundreds_of_steps(flags, refresh):
    """Each refresh makes its basis anew by QR, so errors must not add up: after 300 refreshes as good as after one."""
    shapes = [(12, 9), (6, 4, 3, 3), (20, 4)]
    run = SoapRun(random_params(shapes), **flags, precondition_frequency=1, refresh=refresh)
    for grads in random_gradients(shapes, 300, rank_one=0.5):
        run.step(grads)
    for i in range(len(shapes)):
        for key, basis in run.state_of(i).items():
            if key.startswith("basis_"):
                size = basis.shape[0]
                error = (basis.T.double() @ basis.double() - torch.eye(size).double()).norm()
                assert error < 10 * size * torch.finfo(torch.float32).eps
                assert run.state_of(i)["gram" + key[5:]].isfinite().all()


@every_implementation
@pytest.mark.parametrize("size", [1e-12, 1e-14])
def test_the_adaptive_criterion_does_not_depend_on_the_gradients_size(flags, size):
    """Squares of the entries of a Gram of 1e-24 vanish in float32."""
    torch.manual_seed(0)
    gradients = [torch.randn(12, 20) for _ in range(8)]
    bases = []
    for factor in (1.0, size):
        param = torch.nn.Parameter(torch.zeros(12, 20))
        optimizer = soap_opt.SOAP([param], refresh="adaptive", precondition_frequency=2, eps=0.0, **flags)
        for grad in gradients:
            param.grad = grad * factor
            optimizer.step()
        bases.append(optimizer.state[param]["basis_0"])
    assert torch.allclose(bases[0].abs(), bases[1].abs(), atol=0.05)
