"""step_ in lockstep with the specification: threads, edges of tiles and chunks, strides, replaced state, large parameters."""

import math

import pytest
import torch
from comparison import IMPLEMENTATIONS, NO_ENGINE, RAGGED, SoapRun, random_basis, random_gradients, random_params, run_lockstep

import soap_opt

pytestmark = pytest.mark.skipif(NO_ENGINE is not None, reason=str(NO_ENGINE))

POLICIES = ["together", "staggered", "adaptive"]


class ThreadedRun(SoapRun):
    """Only what is tested gets the threads: the specification's many small calls would spend their time in barriers."""

    threads = 1

    def step(self, grads):
        torch.set_num_threads(self.threads)
        super().step(grads)
        torch.set_num_threads(1)


def lockstep(shapes, steps=5, *, threads=1, change=lambda x: x, before_step=None, dtype=torch.float32, **options):
    options = {"lr": 0.01, "weight_decay": 0.1, "precondition_frequency": 2, **options}
    params = [change(p) for p in random_params(shapes, dtype=dtype)]
    gradients = [[change(g) for g in row] for row in random_gradients(shapes, steps, dtype=dtype, rank_one=0.1)]
    reference = SoapRun(params, **IMPLEMENTATIONS["single"], **options)
    tested = ThreadedRun(params, **IMPLEMENTATIONS["fused"], **options)
    tested.threads = threads
    refreshed = run_lockstep(reference, tested, gradients, options, before_step and (lambda n: before_step(n, tested)))
    assert refreshed > 0


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_lockstep_with_threads(threads):
    lockstep([*RAGGED, (100, 130), (40, 40, 5, 5)], threads=threads, normalize_grads=threads % 2 == 0)


# Registers and panels are 16 elements wide (8 for float64), columns are packed by 128, modes above 512 have loops of their own
EDGES = [15, 16, 17, 31, 32, 33, 127, 128, 129, 511, 512, 513]


@pytest.mark.parametrize("d", EDGES)
def test_lockstep_at_the_edges_of_tiles(d):
    shapes = [(d, 3), (3, d), (d, 40), (40, d), (d, 2, 3), (2, d, 3), (3, 2, d), (7, d, 33)]
    if d < 500:
        shapes += [(d, 20, 2), (20, d, 17), (d, 3, 3, 3), (3, d, 5, 5), (2, 3, d, 2), (3, 2, 2, d), (d, d)]
    lockstep(shapes, steps=3 if d < 500 else 2, precondition_frequency=1)


@pytest.mark.parametrize("d", [15, 16, 17, 33, 128, 129])
def test_lockstep_at_the_edges_of_tiles_in_float64(d):
    lockstep([(d, 20), (20, d), (3, d, 17), (d, 3, 5, 5), (5, d, 3, 3)], steps=3, precondition_frequency=1, dtype=torch.float64)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_lockstep_with_large_bases(threads):
    """m is turned by Q^T and by Q' where a mode is wider than the other modes' product, otherwise by the rotation."""
    shapes = [(700, 40), (40, 641), (3, 520, 5), (530, 24, 24), (100, 33), (33, 100), (40, 3, 5)]
    lockstep(shapes, steps=3, threads=threads, precondition_frequency=1 + threads % 2)


def test_lockstep_at_the_edges_of_chunks():
    """A chunk is 2^14 elements: slabs that fill it to the element, one less and one more; several of them, and a rest."""
    shapes = [(3, 128, 128), (3, 129, 127), (2, 113, 145), (9, 16, 1024), (5, 32, 511), (33, 60, 5, 5), (130, 127), (1024, 17)]
    lockstep(shapes, steps=3, max_precond_dim=512, precondition_frequency=3)
    lockstep(shapes, steps=3, max_precond_dim=130, normalize_grads=True)


@pytest.mark.parametrize("order", ["column-major", "permuted", "with gaps"])
def test_lockstep_of_tensors_that_are_not_contiguous(order):
    def change(x):
        if x.dim() < 2:
            return x
        if order == "column-major":
            return x.mT.contiguous().mT
        if order == "permuted":
            return x.movedim(0, -1).contiguous().movedim(-1, 0)
        return torch.stack([x, x], -1)[..., 0]

    lockstep([*RAGGED, (130, 33), (20, 30, 5, 5)], change=change)
    if order != "with gaps":  # gradients in another order than the parameters
        lockstep([(12, 20), (130, 33), (20, 30, 3, 3)], change=lambda x: change(x) if x.abs().sum() > x.numel() ** 0.5 else x)


def test_parameters_with_gaps_are_written_between_them_only():
    whole = torch.zeros(40, 66)
    param = torch.nn.Parameter(whole[:, ::2])
    optimizer = soap_opt.SOAP([param], fused=True, precondition_frequency=1)
    torch.manual_seed(0)
    for _ in range(3):
        param.grad = torch.randn(40, 33)
        optimizer.step()
    assert whole[:, ::2].any() and not whole[:, 1::2].any()


def test_lockstep_with_matrices_that_the_user_replaced():
    """Column-major ones, as LAPACK returns them; views of a larger tensor; other values."""

    def replace(number, run):
        for i in range(len(run.params)):
            state = run.state_of(i)
            for key, value in list(state.items()):
                if not key.startswith(("gram_", "basis_")):
                    continue
                if number % 3 == 1:
                    state[key] = value.mT.contiguous().mT
                elif number % 3 == 2:
                    state[key] = torch.stack([value, torch.full_like(value, math.nan)], -1)[..., 0]
                else:
                    state[key] = value.clone(memory_format=torch.contiguous_format)

    lockstep([(12, 20), (6, 5, 3, 3), (40, 33), (130, 5), (64, 48, 5, 5)], steps=7, before_step=replace, refresh="together")


def test_other_values_that_the_user_put_in_take_effect():
    shapes = [(12, 20), (6, 5, 3, 3)]
    gradients = random_gradients(shapes, 4)
    runs = [SoapRun(random_params(shapes), **IMPLEMENTATIONS[name], lr=0.01) for name in ("single", "fused")]
    for row in gradients[:2]:
        for run in runs:
            run.step(row)
    for run in runs:
        torch.manual_seed(1)
        for i in range(len(shapes)):
            for key, value in list(run.state_of(i).items()):
                if key.startswith("basis_"):
                    run.state_of(i)[key] = random_basis(len(value)).mT  # column-major
    run_lockstep(*runs, gradients[2:], {"lr": 0.01})


# ---- at length ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])  # 2,100 rows are nine pieces: a number that two threads cannot share evenly
def test_lockstep_of_parameters_that_have_all_threads(threads):
    """Above 2^21 elements: stages over the whole tensor. Rotating ones, ones with a mode that is left
    out, Kronecker pairs in the middle and at the end, one of 2^21 elements to the element below them."""
    shapes = [(300, 280, 5, 5), (40, 5, 5, 2100), (1500, 1400), (128, 129, 128), (1024, 2048)]
    lockstep(shapes[:2], steps=3, threads=threads, max_precond_dim=300, refresh="together")
    lockstep(shapes[2:], steps=3, threads=threads, max_precond_dim=130, normalize_grads=True)
    lockstep([(2100, 1000)], steps=3, threads=threads, max_precond_dim=1000)


@pytest.mark.slow
def test_lockstep_of_large_parameters_in_other_dtypes_and_orders():
    shape = (300, 283, 5, 5)
    lockstep([shape], steps=3, max_precond_dim=290, dtype=torch.bfloat16)
    lockstep([shape], steps=3, max_precond_dim=290, change=lambda x: x.contiguous(memory_format=torch.channels_last))


@pytest.mark.slow
@pytest.mark.parametrize("refresh", POLICIES)
def test_lockstep_of_an_image_codec_for_100_steps(refresh):
    """The first, middle and last layers of bmshj2018-hyperprior, narrowed: ten refreshes of every basis."""
    shapes = [(48, 3, 5, 5), (48, 48, 5, 5), (64, 48, 5, 5), (64, 64, 3, 3), (3, 48, 5, 5), (64,)]
    lockstep(shapes, steps=100, threads=2, precondition_frequency=10, refresh=refresh)
