"""Parameters and real gradients to step on: CompressAI models on the photographs of examples/photos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PHOTOS = Path(__file__).parent.parent / "examples" / "photos" / "train"
LAMBDA = 0.013  # rate-distortion trade-off of the loss, lambda * 255^2 * MSE + bpp


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


def compressai_problem(model: str, quality: int = 3, batches: int = 4, batch_size: int = 2, patch: int = 128) -> Problem:
    """A zoo model with random weights; its ``.quantiles`` belong to the auxiliary optimizer and are left out."""
    from compressai.losses import RateDistortionLoss
    from compressai.zoo import image_models

    torch.manual_seed(0)
    net = image_models[model](quality=quality, pretrained=False)
    criterion = RateDistortionLoss(lmbda=LAMBDA)
    params = [p for name, p in net.named_parameters() if not name.endswith(".quantiles")]
    grads = []
    for images in _crops(batches, batch_size, patch):
        net.zero_grad()
        criterion(net(images), images)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        grads.append([p.grad.clone() for p in params])
    return Problem(f"{model} q{quality}", [p.detach() for p in params], grads)


def _crops(batches: int, batch_size: int, patch: int):
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    files = sorted(PHOTOS.glob("*.jpg"))
    generator = torch.Generator().manual_seed(0)
    for k in range(batches):
        images = []
        for file in files[k * batch_size : (k + 1) * batch_size]:
            image = to_tensor(Image.open(file).convert("RGB"))  # [3, H, W] in 0..1
            top = torch.randint(image.shape[1] - patch + 1, (), generator=generator)
            left = torch.randint(image.shape[2] - patch + 1, (), generator=generator)
            images.append(image[:, top : top + patch, left : left + patch])
        yield torch.stack(images)  # [batch_size, 3, patch, patch]
