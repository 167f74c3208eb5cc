"""From Adam to SOAP is one line. Any model will do: here a small network learns one photograph, pixel by pixel."""

from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from soap_opt import SOAP

photo = to_tensor(Image.open(Path(__file__).parent / "photos/eval/erase-kitten.webp").resize((72, 48)))  # [3, 48, 72]
position = torch.cartesian_prod(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 72))  # [48 * 72, 2]
waves = torch.cat([f(2**k * position) for k in range(6) for f in (torch.sin, torch.cos)], 1)  # [48 * 72, 24]
model = torch.nn.Sequential(torch.nn.Linear(24, 128), torch.nn.GELU(), torch.nn.Linear(128, 128), torch.nn.GELU(),
                            torch.nn.Linear(128, 3))  # fmt: skip
# optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)  # before
optimizer = SOAP(model.parameters(), lr=3e-3)
for step in range(301):
    loss = torch.nn.functional.mse_loss(model(waves), photo.flatten(1).T)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3d}: PSNR {-10 * loss.log10():.2f} dB")
