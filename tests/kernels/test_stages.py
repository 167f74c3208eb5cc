"""Each kernel alone, on hand-made rows of the tables, against the torch expression in its docstring (in float64)."""

import math

import numpy as np
import pytest
import torch
import triton.language as tl

from soap_opt.cuda import columns, launch
from soap_opt.cuda.columns import TILES, WIDTH
from soap_opt.cuda.problems import Problem, gram_splits, gram_tiles, kind_of
from soap_opt.kernels.gram_ema import gram_ema_kernel
from soap_opt.kernels.project import project_adam_kernel, project_apply_kernel, project_first_kernel, project_kernel

EPS = torch.finfo(torch.float32).eps
COLUMNS = vars(columns)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# (A, D, B): every class of tiles, with and without whole tiles
VIEWS = [(1, 64, 64), (3, 65, 5), (70, 130, 1), (65, 64, 1), (2, 25, 33), (130, 25, 1), (1, 9, 17), (200, 9, 1), (2, 68, 12)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def options_of(lr=0.0, weight_decay=0.0, beta1=0.9, beta2=0.99, sign=1.0, eps=1e-8, normalize=0.0, shampoo_beta=0.75):
    """[1, OPTIONS] of one param group."""
    row = torch.zeros(1, columns.OPTIONS)
    values = {
        "LR": lr, "WEIGHT_DECAY": weight_decay, "LOG_BETA1": math.log(beta1), "LOG_BETA2": math.log(beta2), "SIGN": sign,
        "CORRECT_BIAS": 1.0, "REST1": 1 - beta1, "BETA2": beta2, "REST2": 1 - beta2, "EPS": eps, "NORMALIZE": normalize,
        "SHAMPOO_REST": 1 - shampoo_beta,
    }  # fmt: skip
    for name, value in values.items():
        row[0, COLUMNS[name]] = value
    return row


class Table:
    """Rows and tiles of one launch."""

    def __init__(self):
        self.rows, self.tiles, self.kept = [], [], []

    def row(self, **columns):
        values = [0] * WIDTH
        for name, value in columns.items():
            if isinstance(value, torch.Tensor):
                assert value.is_contiguous()
                self.kept.append(value)
                value = value.data_ptr()
            values[COLUMNS[name]] = value
        self.rows.append(values)
        return len(self.rows) - 1

    def product(self, problem, aligned, **columns):
        kind = kind_of(problem, aligned)
        tile = TILES[kind // 4]
        across, down = math.ceil(problem.depth / tile.wide), math.ceil(problem.columns / tile.long)
        row = self.row(DEPTH=problem.depth, INNER=problem.inner, COLUMNS=problem.columns, **columns)
        self.tiles += [(row, kind, r, c) for c in range(down) for r in range(across)]
        return across, down

    def tensors(self):
        return torch.tensor(self.tiles, dtype=torch.int32), torch.from_numpy(np.asarray(self.rows, dtype=np.int64))


def close(got, want, scale, what):
    """Inner products of K terms: a few eps of the product of the norms."""
    error = (got.double() - want).abs()
    assert (error <= 4 * EPS * scale).all(), f"{what}: {float((error / scale).max() / EPS)} eps"


@pytest.mark.parametrize(("back", "aligned"), [(False, True), (True, False), pytest.param(True, True, marks=pytest.mark.slow)])
def test_project(back, aligned):
    table, wanted = Table(), []
    for before, depth, inner in VIEWS:
        x, q, y = random(before, depth, inner), random(depth, depth, seed=1), torch.full((before, depth, inner), torch.nan)
        table.product(Problem(0, before, depth, inner, (0,)), aligned, X=x, MATRIX=q, Y=y)
        q = q.double().T if back else q.double()
        scale = torch.einsum("aib,ij->ajb", x.double().square(), q.square()).sqrt() * depth**0.5
        wanted.append((y, torch.einsum("aib,ij->ajb", x.double(), q), scale))
    tiles, problems = table.tensors()
    assert len(set(tiles[:, 1].tolist())) >= 6  # the classes
    launch.launch(project_kernel, len(tiles), tiles, problems, BACK=back, PRECISION="ieee")
    for (y, want, scale), view in zip(wanted, VIEWS):
        close(y, want, scale, view)


@pytest.mark.parametrize("dtype", DTYPES)
def test_project_first_takes_the_norm_and_counts_the_step(dtype):
    table, checks = Table(), []
    for index, (before, depth, inner) in enumerate(VIEWS):
        x, q, y = random(before, depth, inner).to(dtype), random(depth, depth), torch.empty(before, depth, inner)
        if index == 2:
            x[3, 7] = torch.nan
        step, skipped = torch.tensor(4.0), torch.tensor([2], dtype=torch.int32)
        values = {"X": x, "MATRIX": q, "Y": y, "STEP": step, "SKIPPED": skipped, "INDEX": index, "NUMEL": x.numel()}
        _, down = table.product(Problem(0, before, depth, inner, (0,)), True, **values)
        table.rows[-1][columns.SLOT : columns.COUNTER + 1] = [1000 * index, down, index]
        checks.append((x, q, y, step, skipped))
    tiles, problems = table.tensors()
    scalars, counters = torch.zeros(len(VIEWS), columns.SCALARS), torch.zeros(len(VIEWS), dtype=torch.int32)
    options = options_of(lr=0.1, weight_decay=0.5, sign=-1.0)
    launch.launch(
        project_first_kernel, len(tiles), tiles, problems, scalars, torch.empty(1000 * len(VIEWS)), counters,
        torch.tensor([2.0]), torch.zeros(1), options, GRAD=DTYPES[dtype], PRECISION="ieee",
    )  # fmt: skip
    assert not counters.any()
    for index, (x, q, y, step, skipped) in enumerate(checks):
        usable = index != 2
        assert (float(step), int(skipped)) == ((5.0, 2) if usable else (4.0, 3))
        assert scalars[index, columns.USABLE] == usable
        assert scalars[index, columns.FACTOR] == -0.5
        if usable:
            want = torch.einsum("aib,ij->ajb", x.double(), q.double())
            scale = torch.einsum("aib,ij->ajb", x.double().square(), q.double().square()).sqrt() * q.shape[0] ** 0.5
            close(y, want, scale, VIEWS[index])
            size = 0.1 * (1 - 0.99**5) ** 0.5 / (1 - 0.9**5)
            assert float(scalars[index, columns.STEP_SIZE]) == pytest.approx(size, rel=4 * EPS)
            assert float(scalars[index, columns.DECAY]) == pytest.approx(0.95, rel=EPS)


@pytest.mark.parametrize("t", [1, 2, 1000, 100000])
@pytest.mark.parametrize("beta2", [0.95, 0.9999])
def test_bias_correction_keeps_its_digits(t, beta2):
    """1 - 0.9999^1 would be wrong by 3e-4 in float32."""
    table = Table()
    grad, step, skipped = torch.ones(3), torch.tensor(t - 1.0), torch.zeros(1, dtype=torch.int32)
    row = table.row(X=grad, NUMEL=3, COUNT=1, STEP=step, SKIPPED=skipped)
    table.tiles = [(row, columns.NORM, 0, 0)]
    scalars = torch.zeros(1, columns.SCALARS)
    launch.launch(
        project_first_kernel, 1,
        *table.tensors(), scalars, torch.empty(1), torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.zeros(1),
        options_of(lr=1.0, beta1=0.95, beta2=beta2), GRAD=tl.float32, PRECISION="ieee",
    )  # fmt: skip
    want = (1 - beta2**t) ** 0.5 / (1 - 0.95**t)
    assert float(scalars[0, columns.STEP_SIZE]) == pytest.approx(want, rel=8 * EPS)


def scalars_of(usable=1.0, factor=-0.5, step_size=0.1, decay=0.9, rescale=1.0):
    row = torch.zeros(1, columns.SCALARS)
    places = [columns.USABLE, columns.FACTOR, columns.STEP_SIZE, columns.DECAY, columns.RESCALE]
    row[0, places] = torch.tensor([usable, factor, step_size, decay, rescale])
    return row


@pytest.mark.parametrize("usable", [0.0, 1.0])
def test_adam_epilogue(usable):
    for before, depth, inner in VIEWS:
        x, q = random(before, depth, inner), torch.linalg.qr(random(depth, depth)).Q.contiguous()
        m, v, u = random(before, depth, inner, seed=2), random(before, depth, inner, seed=3).square(), torch.zeros_like(x)
        old = m.double(), v.double()
        table = Table()
        values = {"X": x, "MATRIX": q, "Y": u, "EXP_AVG": m, "EXP_AVG_SQ": v, "NUMEL": x.numel()}
        across, down = table.product(Problem(0, before, depth, inner, (0,)), True, **values)
        table.rows[-1][columns.COUNT] = across * down
        scalars = scalars_of(usable)
        tiles, problems = table.tensors()
        sums = torch.empty(across * down), torch.zeros(1, dtype=torch.int32)
        launch.launch(
            project_adam_kernel, len(tiles), tiles, problems, scalars, *sums, options_of(normalize=1.0), PRECISION="ieee"
        )
        if not usable:
            assert torch.equal(m.double(), old[0]) and torch.equal(v.double(), old[1])
            continue
        g = -0.5 * torch.einsum("aib,ij->ajb", x.double(), q.double())
        delta = 8 * EPS * float(x.norm())  # rounding of an entry of g
        want_m, want_v = 0.9 * old[0] + 0.1 * g, 0.99 * old[1] + 0.01 * g.square()
        assert ((m - want_m).abs() <= 0.1 * delta + 4 * EPS * want_m.abs().max()).all()
        assert ((v - want_v).abs() <= 8 * EPS * want_v + 0.02 * delta * g.abs() + 0.01 * delta**2).all()
        update = m.double() / (v.double().sqrt() + 1e-8)
        assert ((u - update).abs() <= 8 * EPS * update.abs()).all()
        rescale = 1 / (1e-30 + update.square().mean().sqrt())
        assert float(scalars[0, columns.RESCALE]) == pytest.approx(float(rescale), rel=16 * EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("usable", [0.0, 1.0])
def test_apply_epilogue(dtype, usable):
    for before, depth, inner in VIEWS:
        x, q = random(before, depth, inner), torch.linalg.qr(random(depth, depth)).Q.contiguous()
        p = random(before, depth, inner, seed=4).to(dtype)
        old, table = p.double(), Table()
        values = {"X": x, "MATRIX": q, "PARAM": p, "PARAM_DTYPE": list(DTYPES).index(dtype)}
        table.product(Problem(0, before, depth, inner, (0,)), True, **values)
        tiles, problems = table.tensors()
        launch.launch(project_apply_kernel, len(tiles), tiles, problems, scalars_of(usable, rescale=2.0), PRECISION="ieee")
        want = (old - 0.1 * 2.0 * torch.einsum("aib,ji->ajb", x.double(), q.double())) * 0.9 if usable else old
        # one rounding to dtype (the interpreter truncates where a GPU rounds), and the product's own
        error = (p.double() - want).abs()
        assert (error <= torch.finfo(dtype).eps * want.abs() + 8 * EPS * float(x.norm())).all()
        assert usable or torch.equal(p.double(), old)


@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(x, marks=pytest.mark.slow) for x in list(DTYPES)[1:])])
@pytest.mark.parametrize("aligned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gram_ema(dtype, aligned):
    """With 3,000 columns several programs share a tile."""
    for before, depth, inner in [*VIEWS, (1, 70, 3000), (5000, 9, 1)]:
        x = random(before, depth, inner).to(dtype)
        gram = random(depth, depth, seed=5)
        gram = gram + gram.T
        old, table = gram.double(), Table()
        problem = Problem(0, before, depth, inner, (0,))
        kind = kind_of(problem, aligned)
        tile = TILES[kind // 4]
        triangle, iterations = gram_tiles(problem, kind)
        (splits,) = gram_splits([(len(triangle), iterations)])
        row = table.row(X=x, FACTORS=gram, DEPTH=depth, INNER=inner, COLUMNS=problem.columns, COUNT=splits, FACTOR_COUNT=1)
        table.tiles = [(row, kind, r, c) for r in triangle for c in range(splits)]
        tiles, problems = table.tensors()
        sums = torch.empty(len(tiles) * tile.wide**2), torch.zeros(len(triangle), dtype=torch.int32)
        # the programs that arrive last are not always those of the last columns
        order = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))
        launch.launch(
            gram_ema_kernel, len(tiles),
            tiles[order].contiguous(), problems, scalars_of(), *sums, options_of(),
            GRAD=DTYPES[dtype], PRECISION="ieee",
        )  # fmt: skip
        outer = torch.einsum("aib,ajb->ij", x.double(), x.double())
        want = 0.75 * old + 0.25 * 0.25 * outer
        assert torch.equal(gram, gram.T)
        assert float((gram - want).norm()) <= 1e-6 * float(want.norm())
        assert not sums[1].any()


@pytest.fixture(params=["truncates", "rounds"])
def tensor_core(request, monkeypatch):
    """tl.dot with input_precision="tf32" reads 10 bits of mantissa, as a tensor core does. The interpreter ignores the option;
    whether the hardware cuts the rest off or rounds, nothing here may depend on."""
    from triton.runtime import interpreter

    exact = interpreter.InterpreterBuilder.create_dot

    def read(data):
        bits = np.ascontiguousarray(data).view(np.int32)
        return ((bits + (0x1000 if request.param == "rounds" else 0)) & ~0x1FFF).view(np.float32)

    def dot(self, a, b, d, input_precision, *rest):
        if str(input_precision).rpartition(".")[2] == "TF32":
            a, b = (interpreter.TensorHandle(read(each.data), each.dtype) for each in (a, b))
        return exact(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def gram_error(x, precision):
    """Of gram_ema_kernel on x [1, D, B] in float32, relative to the contraction in float64."""
    gram, table = torch.zeros(x.shape[1], x.shape[1]), Table()
    problem = Problem(0, 1, x.shape[1], x.shape[2], (0,))
    kind = kind_of(problem, True)
    row = table.row(
        X=x, FACTORS=gram, DEPTH=problem.depth, INNER=problem.inner, COLUMNS=problem.columns, COUNT=1, FACTOR_COUNT=1
    )
    table.tiles = [(row, kind, r, 0) for r in gram_tiles(problem, kind)[0]]
    tiles, problems = table.tensors()
    launch.launch(
        gram_ema_kernel, len(tiles), tiles, problems, scalars_of(), torch.zeros(1), torch.zeros(1, dtype=torch.int32),
        options_of(shampoo_beta=0.0), GRAD=DTYPES[x.dtype], PRECISION=precision,
    )  # fmt: skip
    want = 0.25 * torch.einsum("aib,ajb->ij", x.double(), x.double())
    return float((gram - want).norm() / want.norm())


def test_three_tf32_products_are_full_float32_and_one_is_not(tensor_core):
    """A Gram's gate is 1e-6."""
    x = random(1, 96, 400)
    assert gram_error(x, "tf32x3") < 2e-7
    assert gram_error(x, "tf32") > 5e-5
    # of bfloat16 and float16 one product is enough
    for dtype in (torch.bfloat16, torch.float16):
        assert gram_error(x.to(dtype), "tf32x3") < 2e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_of_three_tf32_products(dtype, tensor_core):
    x, q, y = random(3, 96, 20).to(dtype), random(96, 96), torch.empty(3, 96, 20)
    want = torch.einsum("aib,ij->ajb", x.double(), q.double())
    for precision, least, most in (("tf32x3", 0, 3e-7), ("tf32", 5e-5, 2e-3)):
        table = Table()
        values = {"X": x, "MATRIX": q, "Y": y, "STEP": torch.zeros(()), "SKIPPED": torch.zeros(1, dtype=torch.int32)}
        _, down = table.product(Problem(0, 3, 96, 20, (0,)), True, **values, NUMEL=x.numel())
        table.rows[-1][columns.COUNT] = down
        tiles, problems = table.tensors()
        launch.launch(
            project_first_kernel, len(tiles), tiles, problems, scalars_of(), torch.empty(down),
            torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.zeros(1), options_of(), GRAD=DTYPES[dtype],
            PRECISION=precision,
        )  # fmt: skip
        assert least <= float((y - want).norm() / want.norm()) < most, precision


def split_tf32(x):
    """High part that TF32 keeps (10 bits of mantissa) and the rest."""
    high = (x.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return high, x - high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_fit_into_one_tf32_product(dtype):
    x = random(1000).to(dtype).float()
    high, low = split_tf32(x)
    assert torch.equal(high, x) and not low.any()
