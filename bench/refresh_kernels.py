"""The CUDA refresh without a GPU: what the compiler, the fibers of tests/csrc and counting say of it.

python -m bench.refresh_kernels resources   # nvcc -Xptxas -v and occupancy on paper -> results/refresh_resources.csv
python -m bench.refresh_kernels accuracy    # every size and kind of matrix, on fibers -> results/refresh_accuracy.csv
python -m bench.refresh_kernels counts      # launches, bytes, what a matrix waits for -> results/refresh_counts.csv
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from soap_opt.refresh_operator import SMALL_TABLE_ROWS, WARP_LIMIT, block_shared_memory
from soap_opt.refresh_operator import largest_in_shared_memory as largest_block

from .results import Row, save, significant, table

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "csrc" / "cuda" / "refresh_basis.cu"

# Per SM, from the CUDA programming guide's table of compute capabilities: threads, blocks, KiB of shared memory, and the most
# of it that a block may have. 65,536 registers everywhere; a block's shared memory costs 1 KiB more than it asks for.
CHIPS = {"8.0": (2048, 32, 164, 163), "8.6": (1536, 16, 100, 99), "9.0": (2048, 32, 228, 227), "10.0": (2048, 32, 228, 227)}

LARGE_PANEL = 32
TABLE_ROWS = 740  # matrices of a launch; one of up to SMALL_TABLE_ROWS passes less
MATRIX_BYTES = 44  # of a row of its table (struct Table, csrc/cuda/reflector.cuh)


def ptxas(chip: str) -> dict[str, Row]:
    """What ptxas says of each kernel; ``name<rows>`` of one for each size of table (reflector.cuh)."""
    arch = chip.replace(".", "")
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        done = subprocess.run(
            [*command, "-c", str(SOURCE), "-o", f"{folder}/out.o"], capture_output=True, text=True, check=True, timeout=600
        )
    found: dict[str, Row] = {}
    for part in done.stderr.split("Compiling entry function")[1:]:
        name, rows = re.search(r"\d([a-z_]+_kernel)(?:ILi(\d+)E)?E", part).groups()
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .*?(\d+) bytes spill loads", part).groups())
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        figures = {"registers": registers, "stack": stack, "spill_stores": stores, "spill_loads": loads}
        found[f"{name}<{rows}>" if rows else name] = figures
    return found


def block_sizes(limit: int) -> list[int]:
    """Sizes of the block kernel that are of interest, up to the largest of a chip."""
    return sorted({*(d for d in (64, 128, 192, 224) if block_shared_memory(d) <= limit), largest_block(limit)})


def tile_shared_memory(d: int) -> int:
    """Bytes of shared memory of a tile of a product (tile_shared_floats, csrc/cuda/tile.cuh)."""
    return 4 * (2 * d * 33 + 32)


def resources() -> list[Row]:
    rows = []
    for chip, (max_threads, max_blocks, shared_kib, optin_kib) in CHIPS.items():
        # both sizes of table are the same code: one row, of the worse
        of_kernel: dict[str, Row] = {}
        for name, figures in ptxas(chip).items():
            worst = of_kernel.setdefault(name.partition("<")[0], dict(figures))
            worst.update({key: max(worst[key], value) for key, value in figures.items()})
        for kernel, figures in sorted(of_kernel.items()):
            limit = optin_kib * 1024
            if kernel == "refresh_in_warps_kernel":
                cases = [("d <= 32", 128, 4 * 4 * (32 * 32 + 3 * 32))]
            elif kernel in ("multiply_tiles_kernel", "rotate_tiles_kernel"):
                cases = [(f"d = {d}", 128, tile_shared_memory(d)) for d in block_sizes(limit)]
            elif kernel == "refresh_in_blocks_kernel":
                sizes = block_sizes(limit)
                cases = [(f"d = {d}", block_threads(d), block_shared_memory(d)) for d in sizes]
            else:
                state = 4 * (2 * LARGE_PANEL**2 + LARGE_PANEL)
                cases = [
                    (f"{d} rows", 512, state + 4 * d * LARGE_PANEL if state + 4 * d * LARGE_PANEL <= limit else state)
                    for d in (320, 1024, 2048)
                ]
            for case, threads, shared in cases:
                # registers are given out to warps in units of 256
                per_block = threads // 32 * (-(-figures["registers"] * 32 // 256) * 256)
                by = {
                    "threads": max_threads // threads,
                    "registers": 65536 // per_block,
                    "shared memory": shared_kib * 1024 // (shared + 1024),
                    "blocks": max_blocks,
                }
                limiting = min(by, key=by.get)
                rows.append(
                    {
                        "kernel": kernel.removesuffix("_kernel"),
                        "chip": "sm_" + chip.replace(".", ""),
                        "case": case,
                        "arguments_bytes": None
                        if kernel == "factor_panel_kernel"
                        else f"{MATRIX_BYTES * SMALL_TABLE_ROWS} or {MATRIX_BYTES * TABLE_ROWS}",
                        **figures,
                        "block_threads": threads,
                        "shared_bytes": shared,
                        "blocks_per_sm": by[limiting],
                        "warps_per_sm": by[limiting] * threads // 32,
                        "limited_by": limiting,
                    }
                )
    return rows


def accuracy() -> list[Row]:
    sys.path.insert(0, str(ROOT / "tests" / "csrc"))
    import numpy as np
    from harness import refresh, refresh_by_operator
    from matrices import KINDS, allowed, lapack, make, quality, recorded_grams

    sizes = (1, 2, 3, 5, 16, 31, 32, 33, 64, 100, 128, 192, 224, 225, 320, 512, 1024)
    groups = {kind: [make(kind, d, seed=2) for d in sizes] for kind in KINDS}
    groups["recorded"] = list(recorded_grams().values())
    groups["gram"].append(make("gram", 2049, seed=2))
    rows = []
    for kind, matrices in groups.items():
        fits = [len(a) <= largest_block(227 * 1024) for a in matrices]
        results = iter(refresh([(a, np.eye(len(a))) for a, small in zip(matrices, fits) if small], timeout=600))
        for a, small in zip(matrices, fits):
            result = next(results) if small else refresh_by_operator([(a, np.eye(len(a)))])[0]
            d, sorted_a = len(a), a[:, result.order]
            ours, reference = quality(sorted_a, result.basis), quality(sorted_a, lapack(sorted_a))
            rows.append(
                {
                    "kind": kind,
                    "d": d,
                    "kernel": "warp" if d <= WARP_LIMIT else "block" if d <= largest_block(227 * 1024) else "panels",
                    "orthogonality": significant(ours.orthogonality, 3),
                    "orthogonality_lapack": significant(reference.orthogonality, 3),
                    "residual": significant(ours.residual, 3),
                    "residual_lapack": significant(reference.residual, 3),
                    "below_diagonal": significant(ours.below, 3),
                    "below_diagonal_lapack": significant(reference.below, 3),
                    "share_of_allowed": significant(max(x / y for x, y in zip(ours, allowed(reference, d))), 3),
                }
            )
        print(kind, max(row["share_of_allowed"] for row in rows if row["kind"] == kind), flush=True)
    return rows


def summary(rows: list[Row]) -> list[Row]:
    """Per kernel: the worst of everything."""
    return [
        {
            "kernel": kernel,
            "matrices": len(of),
            "largest orthogonality / LAPACK's (d >= 16)": max(
                significant(row["orthogonality"] / row["orthogonality_lapack"], 3)
                for row in of
                if row["d"] >= 16 and row["orthogonality_lapack"] > 1e-6
            ),
            "largest share of what is allowed": max(row["share_of_allowed"] for row in of),
        }
        for kernel in ("warp", "block", "panels")
        if (of := [row for row in rows if row["kernel"] == kernel])
    ]


def block_threads(d: int) -> int:
    """Threads of a block that refreshes matrices [d, d] (refresh_in_blocks, csrc/cuda/refresh_basis.cu)."""
    return 128 if d <= 64 else 256 if d <= 128 else 512


def shared_accesses(d: int, one_block: bool) -> int:
    """Of the block's products, by whole warps: 8 reads for 16 x 32 sums' next 512 products, and a tile's own 16 + 16."""
    total = 2 * d * 8 * -(-d // 16) * -(-d // 32) if one_block else 0  # G Q, Q^T Q'
    for first in range(0, d, 16):
        width, rows = min(16, d - first), d - first
        after = rows - width
        columns = -(-after // 32)
        total += columns * (8 * rows + 8 * after)  # W = V^T A, then V^T Q'
        total += columns * (-(-after // 16) + -(-rows // 16)) * (8 * width + 32)  # A - V W, then Q' - V W
    return total


def latency(d: int, one_block: bool = False) -> Row:
    """What the refresh of one matrix [d, d] waits for, ``refresh="staggered"``: counted from the source, not measured.

    one_block: as it was while one block made the two products too (and moved P's columns when it sorted them, and read each
    column of a panel 4 times at every step: for v^T x, x - tau v (v^T x), the norm, and the scaling of the new reflector).

    Returns:
        launches: one after the other.
        mflops: 10^6 multiplications and additions of the warp or block that takes longest; tile_mflops: of a tile of a product.
        barriers: of that block (tests/csrc checks it on fibers).
        column_reads: passes through shared memory over a column of a panel, each of which waits for the one before.
        accesses: of shared memory by the block's products (or of L1, where they read G and Q), thousands, each a warp's: a
            multiprocessor has one in a clock at best.
        waits: how often a thread waits for global memory, in one kernel after the other: the loads of one turn of a loop,
            unrolled as the source says or by 4 as nvcc does, count as one.
        passes: matrices [d, d] that the block reads or writes in global memory.
    """
    cube, panels, warps = 1e-6 * d**3, -(-d // 16), block_threads(d) // 32
    row: Row = {"model": f"one matrix, d = {d}" + (", all in one block" if one_block else "")}
    if d <= WARP_LIMIT:
        return {**row, "launches": 1, "mflops": significant(20 / 3 * cube, 3), "tile_mflops": 0, "barriers": 0,
                "column_reads": 2 * d, "accesses": 0, "waits": 3 * (d // 8), "passes": 5}  # fmt: skip
    if one_block:
        product = -(-(-(-d // 16) * -(-d // 32)) // warps) * -(-d // 4)  # a warp's tiles of 16 x 32, 4 of the sum at a time
        waits = {
            "due": 1,
            "largest": -(-d * d // (4 * 32 * warps)),
            "products": 2 * product,
            "estimates": -(-d // 4),
            "T": panels,
        }
        return {
            **row,
            "launches": 1,
            "mflops": significant(20 / 3 * cube, 3),
            "tile_mflops": 0,
            # largest, P, two sums, places | sorting | a column each and two, three after | Q' | tried, rotation
            "barriers": 5 + 2 * -(-d // 14) + d + 2 * panels + 3 * (panels - 1) + 4 * panels + 3,
            "column_reads": 4 * d,
            "accesses": significant(1e-3 * shared_accesses(d, one_block), 3),
            "waits": sum(waits.values()),
            "passes": 7,  # G twice, Q three times, rotation, Q'
        }
    strips = -(-d // 32)
    tile = -(-d // (4 * 16)) + 4  # fetch_columns, fetch_rows
    waits = {
        "due": 3,
        "tiles": 2 * tile,
        "largest": -(-strips // 4) + 1,
        "estimates": -(-strips // 4),
        "P": -(-d // warps),
        "T": panels - 1,
    }
    return {
        **row,
        "launches": 3,
        "mflops": significant(8 / 3 * cube, 3),
        "tile_mflops": significant(2 * 1e-6 * 32 * 32 * d, 3),
        # e, places, P, a sum | a column each and two, two after | Q' | tried
        "barriers": 4 + d + 2 * panels + 2 * (panels - 1) + 4 * panels + 2,
        "column_reads": d,
        "accesses": significant(1e-3 * shared_accesses(d, one_block), 3),
        "waits": sum(waits.values()),
        "passes": 2,  # P, Q'
    }


def launches_in_shared_memory(sizes: Iterable[int]) -> int:
    """Of one call (refresh_in_warps and refresh_in_blocks, csrc/cuda/refresh_basis.cu)."""
    sizes = sorted(sizes, reverse=True)
    blocks = [d for d in sizes if d > WARP_LIMIT]
    tables = [blocks[first : first + TABLE_ROWS] for first in range(0, len(blocks), TABLE_ROWS)]
    return -(-(len(sizes) - len(blocks)) // TABLE_ROWS) + sum(2 + len({block_threads(d) for d in table}) for table in tables)


def counts() -> list[Row]:
    """Every matrix of a model refreshed at once, on sm_90; then what the refresh of one matrix waits for (:func:`latency`).

    The original, one matrix after the other: estimates (two products, diagonal), argsort, permutation, product, QR: 7 library
    calls, each of at least one launch (torch.linalg.qr of several), and about 15 d^2 numbers through memory, QR's own passes
    counted as one. Ours: counted from the kernels' source; up to 740 matrices are a launch for those up to 32, two for the
    products of larger ones and one for each class of their sizes; panels: the ATen calls and panel launches of one batch of
    each size. On neither side what comes before and after: here three small kernels that say what is due, and the 2 to 4
    launches that re-express m and v.
    """
    from compressai.zoo import image_models

    from soap_opt.layout import layout_of

    models = [("bmshj2018-factorized", 3), ("bmshj2018-hyperprior", 3), ("mbt2018-mean", 3), ("cheng2020-attn", 3)]
    shapes = {}
    for name, quality in models:
        net = image_models[name](quality=quality, pretrained=False)
        shapes[f"{name} q{quality}"] = [tuple(p.shape) for n, p in net.named_parameters() if not n.endswith(".quantiles")]
    shapes["2,000 tensors of 4 x 4"] = [(4, 4)] * 2000
    shapes["4 x 512^2, 512 x 2048, 2048 x 512"] = [(512, 512)] * 4 + [(512, 2048), (2048, 512)]
    rows = []
    for name, of in shapes.items():
        sizes = [
            size
            for shape in of
            for size in layout_of(
                shape,
                tuple(range(len(shape))),
                max_precond_dim=10000,
                merge_dims=False,
                precondition_1d=False,
                data_format="channels_first",
            ).sizes
        ]
        kept_in_shared = largest_block(227 * 1024)
        large = Counter(d for d in sizes if d > kept_in_shared)
        # per panel: factor; forward three products, except after the last; back three; about 25 calls around them; for each
        # matrix 5 after its batch and 5 in the end
        panel_calls = sum(7 * -(-d // LARGE_PANEL) - 3 + 25 + 10 * number for d, number in large.items())
        moved = sum((5 if d <= 32 else 9) * d * d for d in sizes if d <= kept_in_shared)
        rows.append(
            {
                "model": name,
                "matrices": len(sizes),
                "largest": max(sizes),
                "beyond_shared_memory": sum(large.values()),
                "launches_in_shared_memory": launches_in_shared_memory(d for d in sizes if d <= kept_in_shared),
                "calls_beyond": panel_calls,
                "calls_original": 7 * len(sizes),
                "mbytes_in_shared_memory": significant(4e-6 * moved, 3),
                "mbytes_original_same_matrices": significant(4e-6 * 15 * sum(d * d for d in sizes if d <= kept_in_shared), 3),
            }
        )
    return rows + [latency(d, one_block) for d in (32, 64, 128, 192, 224) for one_block in (True, False)[d <= 32 :]]


def main(what: str) -> None:
    rows = {"resources": resources, "accuracy": accuracy, "counts": counts}[what]()
    about = {}
    if what == "resources":
        version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
        about = {"device": "none: compiled only", "nvcc": re.search(r"V([\d.]+)", version).group(1)}
    print(save(f"refresh_{what}", rows, **about))
    if what == "counts":
        for one in (False, True):
            print(table([row for row in rows if row["model"].startswith("one matrix") == one]))
    else:
        print(table(summary(rows) if what == "accuracy" else rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
