"""Training the hyperprior from one seed with SOAP fused, SOAP multi-tensor and fused Adam: loss against steps and against time.

    python -m bench.first_hour.training [--device cpu --quick]

bmshj2018-hyperprior of quality 3 (N = 128, M = 192), random crops of 256 x 256 of the photographs, the same for everybody, as
many steps as the time allows. Where CompressAI is missing, a network of the same convolutions stands for it. Two shares of the
optimizer in a training step: by events around ``optimizer.step()`` on the GPU, in which a refresh that runs behind does not
count, and by the same training without an optimizer, in which everything counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..models import LAMBDA, PHOTOS, lic_network, main_parameters
from ..peers import SOAP_OPTIONS
from ..results import Row, significant
from ..worker import load
from .common import make_parser, passed_on, say_key, seconds_left, synchronize, triton_path, write
from .in_turn import Entry, in_turn, report, wait_for_turn

MODEL, BATCH_SIZE, PATCH = "bmshj2018-hyperprior", 16, 256
WARM_STEPS = 50  # of the learning rate; also what the shares leave out
WINDOW = 10  # steps between two looks at the clock and at the loss
NOBODY = "no optimizer"
# name -> target, options
OPTIMIZERS: dict[str, tuple[str, dict]] = {
    "SOAP fused": ("soap_opt:SOAP", {**SOAP_OPTIONS, "fused": True}),
    "SOAP multi tensor": ("soap_opt:SOAP", {**SOAP_OPTIONS, "foreach": True}),
    "Adam fused": ("torch.optim:Adam", {"lr": 1e-3, "fused": True}),
    NOBODY: ("", {}),
}


class StandIn(nn.Module):
    """The hyperprior's convolutions without its entropy models, and Gaussian noise for quantisation."""

    def __init__(self, N: int = 128, M: int = 192) -> None:
        super().__init__()

        def down(a: int, b: int) -> nn.Module:
            return nn.Conv2d(a, b, 5, 2, 2)

        def up(a: int, b: int) -> nn.Module:
            return nn.ConvTranspose2d(a, b, 5, 2, 2, 1)

        relu = nn.ReLU
        self.analysis = nn.Sequential(down(3, N), relu(), down(N, N), relu(), down(N, N), relu(), down(N, M))
        self.synthesis = nn.Sequential(up(M, N), relu(), up(N, N), relu(), up(N, N), relu(), up(N, 3))
        self.hyper_analysis = nn.Sequential(nn.Conv2d(M, N, 3, 1, 1), relu(), down(N, N), relu(), down(N, N))
        self.hyper_synthesis = nn.Sequential(up(N, N), relu(), up(N, N), relu(), nn.Conv2d(N, M, 3, 1, 1))

    def loss(self, x: Tensor) -> Tensor:
        y = self.analysis(x)
        scale = nn.functional.softplus(self.hyper_synthesis(self.hyper_analysis(y))) + 0.1
        rate = (y.square() / scale.square()).mean() + scale.log().mean()
        return LAMBDA * 255**2 * (self.synthesis(y + torch.rand_like(y) - 0.5) - x).square().mean() + 0.1 * rate


def network(quick: bool) -> tuple[nn.Module, list[nn.Parameter], Callable[[Tensor], Tensor]]:
    """A network, what the optimizer moves of it, and its loss on images [B, 3, h, w]."""
    torch.manual_seed(0)
    try:
        if quick:
            raise ImportError("a quick run takes a small one")
        from compressai.losses import RateDistortionLoss

        net = lic_network(MODEL).train()
    except Exception as error:  # whatever a package on an unknown machine may say
        print(f"{MODEL} is not to be had ({error}): a network of the same convolutions")
        net = StandIn(4, 6) if quick else StandIn()
        return net, list(net.parameters()), net.loss
    criterion = RateDistortionLoss(lmbda=LAMBDA)

    def loss(x: Tensor) -> Tensor:
        return criterion(net(x), x)["loss"]

    return net, main_parameters(net), loss


def photographs(device: str, count: int | None) -> list[Tensor]:
    """[3, H, W] uint8 each, on the device; noise where no JPEG can be read."""
    try:
        import numpy as np
        from PIL import Image

        images = [torch.from_numpy(np.array(Image.open(f).convert("RGB"))) for f in sorted(PHOTOS.glob("*.jpg"))[:count]]
        found = [image.permute(2, 0, 1).contiguous().to(device) for image in images if min(image.shape[:2]) >= PATCH]
    except ImportError as error:
        print(f"no photographs ({error}): noise")
        found = [torch.randint(256, (3, 2 * PATCH, 2 * PATCH), dtype=torch.uint8).to(device) for _ in range(4)]
    return found


def crops(images: list[Tensor], batch_size: int, patch: int) -> Iterator[Tensor]:
    """Batches of random crops in 0..1, without end and the same every time."""
    generator = torch.Generator().manual_seed(0)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    while True:
        batch = []
        for _ in range(batch_size):
            image = images[draw(len(images))]
            top, left = (draw(size - patch + 1) for size in image.shape[1:])
            batch.append(image[:, top : top + patch, left : left + patch])
        yield torch.stack(batch).float() / 255


class Timer:
    """Milliseconds of each call, on the GPU where there is one; read when the device is done anyway."""

    def __init__(self, device: str) -> None:
        self.on_cuda, self.pending, self.times = device == "cuda", [], []

    def __call__(self, function: Callable[[], object]) -> None:
        if not self.on_cuda:
            start = time.perf_counter()
            function()
            self.times.append(1e3 * (time.perf_counter() - start))
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        self.pending.append((begin, end))

    def collect(self) -> None:
        self.times += [begin.elapsed_time(end) for begin, end in self.pending]
        self.pending.clear()


def train(name: str, arguments: argparse.Namespace) -> int:
    """Train until the turn is over; a row for every WINDOW steps, and one for the whole."""
    net, params, loss_of = network(arguments.quick)
    net.to(arguments.device)
    images = photographs(arguments.device, 3 if arguments.quick else None)
    batches = crops(images, 1, 64) if arguments.quick else crops(images, BATCH_SIZE, PATCH)
    target, options = OPTIMIZERS[name]
    optimizer = load(target)(params, **options) if target else None
    timer, window, history = Timer(arguments.device), [], []
    seconds = wait_for_turn()
    synchronize(arguments.device)
    start = time.perf_counter()
    steps = 0
    while time.perf_counter() - start < seconds and steps < (2 * WINDOW if arguments.quick else 10**6):
        for p in params:
            p.grad = None
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = options["lr"] * min(1.0, (steps + 1) / WARM_STEPS)
        loss = loss_of(next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        timer(optimizer.step if optimizer is not None else lambda: None)
        window.append(loss.detach())
        steps += 1
        if steps % WINDOW == 0:
            mean = float(torch.stack(window).mean())  # waits for the device
            window.clear()
            timer.collect()
            row = {
                "optimizer": name,
                "step": steps,
                "seconds": significant(time.perf_counter() - start),
                "loss": significant(mean),
            }
            history.append(row)
            report(row)
    report({"optimizer": name, **whole(history, timer.times)})
    return 0


def whole(history: list[Row], times: list[float]) -> Row:
    """Steps, the median training step of a window and the median of optimizer.step() (both ms), warm."""
    ends = [0.0, *(row["seconds"] for row in history)]
    windows = [(b - a) / WINDOW for a, b in zip(ends, ends[1:])]
    warm = windows[WARM_STEPS // WINDOW :] or windows
    step = 1e3 * statistics.median(warm) if warm else None
    inside = statistics.median(times[WARM_STEPS:] or times) if times else None
    return {
        "steps": len(times), "last_loss": history[-1]["loss"] if history else None,
        "training_step_ms": step and significant(step), "optimizer_ms": inside and significant(inside),
        "share_by_events": significant(inside / step, 3) if inside and step else None,
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    command = ["-m", "bench.first_hour.training", *passed_on(arguments)]
    names = ["SOAP fused", "Adam fused"] if arguments.quick else list(OPTIMIZERS)
    rows, failed = in_turn(
        [Entry(each, [*command, "--optimizer", each]) for each in names], seconds_left(arguments), get_ready=0.25
    )
    curves = [row for row in rows if "step" in row]
    wholes = [row for row in rows if "steps" in row]
    without = next((row["training_step_ms"] for row in wholes if row["optimizer"] == NOBODY), None)
    for row in wholes:
        row["share_of_all"] = (
            significant(1 - without / row["training_step_ms"], 3) if without and row["training_step_ms"] else None
        )
    write(arguments.results, "cuda_training_curves", curves, arguments.device)
    write(arguments.results, "cuda_training", wholes, arguments.device)
    said = [
        f"{row['optimizer']}: loss {row['last_loss']} after {row['steps']} steps of {row['training_step_ms']} ms, share "
        f"{row['share_by_events']}"
        for row in wholes
        if row["optimizer"] != NOBODY
    ]
    say_key("; ".join([*said, *([f"FAILED: {', '.join(failed)}"] if failed else [])]))
    return 1 if failed else 0


def main() -> int:
    parser = make_parser("training", __doc__)
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), help="this one alone, when it is told to begin (in_turn.py)")
    arguments = parser.parse_args()
    if not arguments.optimizer:
        return run(arguments)
    with triton_path(arguments.device):
        return train(arguments.optimizer, arguments)


if __name__ == "__main__":
    sys.exit(main())
