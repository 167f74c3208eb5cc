"""What to step on: parameters and gradients of the models that the benchmarks are about.

Gradients are those of a real backward pass where a model is at hand, drawn otherwise. Nothing is ever downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

PHOTOS = Path(__file__).parent.parent / "examples" / "photos" / "train"
LAMBDA = 0.013  # rate-distortion trade-off of the loss, lambda * 255^2 * MSE + bpp
LIC_MODELS = ("bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018-mean", "cheng2020-anchor", "elic2022-official")
MAX_PRECOND_DIM = 10000


@dataclass
class Problem:
    """A model's parameters and a few sets of its gradients.

    Attributes:
        name: the model.
        params: the parameters that the optimizer under test moves.
        grads: for each of a few batches the gradients of ``params``; steps take them in turn.
    """

    name: str
    params: list[Tensor]
    grads: list[list[Tensor]]

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)

    @property
    def units(self) -> list[tuple[int, int]]:
        """(numel, d) of every preconditioned mode, parameter after parameter."""
        matrices = [p for p in self.params if p.dim() > 1]
        return [(p.numel(), d) for p in matrices for d in p.shape if 1 < d <= MAX_PRECOND_DIM]

    @property
    def floor_flops(self) -> float:
        """2.5 U, the least that a step needs: U = 2 numel sum(d_i), modes counted as they are (5 x 5 is 5 + 5, not 25)."""
        return 2.5 * sum(2.0 * numel * d for numel, d in self.units)


def lic_network(model: str, quality: int = 3) -> nn.Module:
    """A CompressAI model with random weights; elic2022-official has one size, and no quality."""
    from compressai.models import Elic2022Official
    from compressai.zoo import image_models

    torch.manual_seed(0)
    return Elic2022Official() if model == "elic2022-official" else image_models[model](quality=quality, pretrained=False)


def lic_problem(model: str, batches: int = 4, batch_size: int = 2, patch: int = 128) -> Problem:
    """Gradients of the rate-distortion loss on crops of the photographs, clipped to norm 1 as CompressAI's training does.

    ``.quantiles`` belong to the auxiliary optimizer and are left out.
    """
    from compressai.losses import RateDistortionLoss

    net = lic_network(model)
    criterion = RateDistortionLoss(lmbda=LAMBDA)
    params = main_parameters(net)
    images = list(islice(crops(batch_size, patch), batches))
    name = model if model == "elic2022-official" else f"{model} q3"
    return backward_problem(name, params, [lambda x=x: criterion(net(x), x)["loss"] for x in images])


def main_parameters(net: nn.Module) -> list[nn.Parameter]:
    """All but the entropy bottlenecks' quantiles."""
    return [p for name, p in net.named_parameters() if not name.endswith(".quantiles")]


def crops(batch_size: int, patch: int) -> Iterator[Tensor]:
    """Batches [batch_size, 3, patch, patch] of random crops of the photographs, in 0..1, without end."""
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    files = sorted(PHOTOS.glob("*.jpg"))
    generator = torch.Generator().manual_seed(0)
    place = 0
    while True:
        images = []
        for _ in range(batch_size):
            image = to_tensor(Image.open(files[place % len(files)]).convert("RGB"))  # [3, H, W] in 0..1
            top = torch.randint(image.shape[1] - patch + 1, (), generator=generator)
            left = torch.randint(image.shape[2] - patch + 1, (), generator=generator)
            images.append(image[:, top : top + patch, left : left + patch])
            place += 1
        yield torch.stack(images)


def backward_problem(name: str, params: Iterable[nn.Parameter], losses: list[Callable[[], Tensor]]) -> Problem:
    """The gradients that each loss leaves in ``params``."""
    params, grads = list(params), []
    for loss in losses:
        for p in params:
            p.grad = None
        loss().backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params])
    return Problem(name, [p.detach() for p in params], grads)


def gpt2_block(batches: int = 2) -> Problem:
    """One block of GPT-2 small on random tokens: qkv 2304 x 768, projection 768 x 768, MLP of 3072, two layer norms."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    data = [(torch.randn(2, 256, 768), torch.randn(2, 256, 768)) for _ in range(batches)]
    losses = [lambda x=x, y=y: nn.functional.mse_loss(block(x), y) for x, y in data]
    return backward_problem("GPT-2 small block", block.parameters(), losses)


def resnet50(batches: int = 2) -> Problem:
    """ResNet-50 with random weights, on random images of random classes."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    net = resnet50(weights=None)
    data = [(torch.randn(4, 3, 128, 128), torch.randint(1000, (4,))) for _ in range(batches)]
    losses = [lambda x=x, y=y: nn.functional.cross_entropy(net(x), y) for x, y in data]
    return backward_problem("ResNet-50", net.parameters(), losses)


def drawn(name: str, shapes: Iterable[tuple[int, ...]], batches: int = 4) -> Problem:
    """Normal parameters of scale 0.1 and gradients of scale 0.01."""
    generator = torch.Generator().manual_seed(0)
    shapes = list(shapes)

    def draw(scale: float) -> list[Tensor]:
        return [scale * torch.randn(shape, generator=generator) for shape in shapes]

    return Problem(name, draw(0.1), [draw(0.01) for _ in range(batches)])


MODELS: dict[str, Callable[[], Problem]] = {
    **{model: partial(lic_problem, model) for model in LIC_MODELS},
    "gpt2-block": gpt2_block,
    "512-table": partial(drawn, "512^2 table", [(512, 512)] * 4 + [(512, 2048), (2048, 512)]),
    "resnet50": resnet50,
    "2000-tensors-4x4": partial(drawn, "2,000 tensors of 4 x 4", [(4, 4)] * 2000),
}
