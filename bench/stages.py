"""Suite "stage": what each stage of a step takes, through the public Python functions and through the engine's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.benchmark import Timer

from soap_opt import SOAP
from soap_opt.eigenbasis import gram_times_basis, init_bases, outer_products, project, project_back, refresh_basis
from soap_opt.layout import layout_of, memory_order
from soap_opt.refresh_operator import refresh_bases_

from .contest import GemmRate
from .models import MAX_PRECOND_DIM, drawn
from .results import Row, significant

SHAPES = ((128, 128, 5, 5), (192, 192, 3, 3), (128, 3, 5, 5), (512, 512), (2048, 512), (4, 4))
SIZES = (8, 25, 64, 128, 192, 320, 512, 1024)

Case = tuple[str, str, str, float | None, float | None, Callable[[], object]]  # stage, path, shape, flops, bytes, call


def shape_cases(shape: tuple[int, ...]) -> Iterator[Case]:
    """The stages of one parameter. Flops are the floor's: U for a projection, U / 2 for the Grams, 2.5 U for a step."""
    problem = drawn("", [shape], batches=1)
    x, numel, one_pass = problem.grads[0][0], problem.numel, problem.floor_flops / 2.5
    layout = layout_of(
        shape,
        memory_order(x),
        max_precond_dim=MAX_PRECOND_DIM,
        merge_dims=False,
        precondition_1d=False,
        data_format="channels_first",
    )
    bases = [torch.linalg.qr(torch.randn(d, d)).Q.contiguous() for d in layout.sizes]
    name = "x".join(map(str, shape))
    yield "project", "python", name, one_pass, None, lambda: project(x, bases, layout)
    yield "project back", "python", name, one_pass, None, lambda: project_back(x, bases, layout)
    yield "gram", "python", name, one_pass / 2, None, lambda: outer_products(x, layout)

    m, v = [torch.zeros_like(x)], [torch.ones_like(x)]

    def adam() -> None:  # as in _multi_tensor_soap
        torch._foreach_lerp_(m, [x], 0.05)
        torch._foreach_mul_(v, 0.95)
        torch._foreach_addcmul_(v, [x], [x], 0.05)
        denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, 1e-8)
        torch._foreach_div(m, denominators)

    # The least that has to move: g, m, v read, m, v, u written, 4 bytes each
    yield "adam", "python", name, None, 24.0 * numel, adam

    for path, options in (("python", {"foreach": True}), ("engine", {"fused": True})):
        param = torch.nn.Parameter(problem.params[0].clone())
        optimizer = SOAP([param], refresh="together", precondition_frequency=10**9, **options)
        param.grad = x.clone()
        optimizer.step()
        yield "step without refresh", path, name, 2.5 * one_pass, None, optimizer.step


def size_cases(size: int, count: int = 4) -> Iterator[Case]:
    """Refresh and init of ``count`` Grams [d, d]: in a step several are due.

    Flops: a refresh 2 d^3 for P, 8/3 d^3 for the QR with its Q, 2 d^3 for Q^T Q'; eigh 9 d^3, the usual nominal count.
    """
    samples = [torch.randn(size, 2 * size) for _ in range(count)]
    grams = [sample @ sample.T / (2 * size) for sample in samples]
    bases = init_bases(grams)
    name = f"{count} of {size}x{size}"

    def python_refresh() -> None:
        for gram, basis in zip(grams, bases):
            refresh_basis(basis, *gram_times_basis(gram, basis))

    flops = count * (2 + 8 / 3 + 2) * size**3
    yield "refresh", "python", name, flops, None, python_refresh
    yield "refresh", "engine", name, flops, None, lambda: refresh_bases_(grams, bases)
    yield "init", "python", name, 9.0 * count * size**3, None, lambda: init_bases(grams)
    yield "init", "engine", name, 9.0 * count * size**3, None, lambda: torch.ops.soap_opt.init_basis(grams)


def cases(shapes=SHAPES, sizes=SIZES) -> Iterator[Case]:
    for shape in shapes:
        yield from shape_cases(shape)
    for size in sizes:
        yield from size_cases(size)


def measure(quick: bool = False) -> list[Row]:
    """One row for each stage, path and shape; the gemm rate is measured just before each."""
    gemm, rows = GemmRate(), []
    for stage, path, shape, flops, moved, call in cases(*((SHAPES[:1], SIZES[:4]) if quick else ())):
        rate = gemm.measure()["128x128x3200"]
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=0.05 if quick else 0.3).median
        rows.append(
            {
                "stage": stage,
                "path": path,
                "shape": shape,
                "median_us": significant(1e6 * seconds),
                "gflops": significant(flops / seconds / 1e9, 3) if flops else None,
                "gbytes_per_s": significant(moved / seconds / 1e9, 3) if moved else None,
                "gemm_gflops_128x128x3200": significant(rate),
            }
        )
    return sorted(rows, key=lambda row: str(row["stage"]))
