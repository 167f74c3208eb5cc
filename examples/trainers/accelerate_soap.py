"""SOAP under Accelerate: bfloat16, clipped gradients, a learning rate schedule, a checkpoint, and a run that continues from it.

python examples/trainers/accelerate_soap.py --steps 50 --folder runs/accelerate
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from soap_opt import SOAP

STEPS_AN_EPOCH = 10


def batches():
    """What another network answers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16 * STEPS_AN_EPOCH, 16, generator=generator)
    y = 3 * torch.tanh(x @ torch.randn(16, 8, generator=generator) / 4)
    # A generator of its own: a loader without one draws a number at each start from what dropout draws from.
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, generator=torch.Generator())


def train(steps, folder, save_at=None, clip=1.0, resume=None, seed=0):
    """Train for steps in all. Returns the model, the optimizer and the losses.

    Args:
        save_at: write a checkpoint to folder after so many steps.
        resume: continue from the checkpoint in folder, which was written after so many steps.
    """
    torch.manual_seed(seed)
    accelerator = Accelerator(
        mixed_precision="bf16",
        cpu=True,  # where a resumed run ends with the same bits; leave it out for a GPU
        # The order of an epoch depends on its number alone: a resumed run sees the same.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
    )
    model = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Dropout(0.05), nn.Linear(48, 8))
    optimizer = SOAP(model.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / 10, 1 - t / steps))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, batches(), schedule)
    step, losses = 0, []
    if resume:
        accelerator.load_state(folder)
        step = resume
    while step < steps:
        loader.set_epoch(step // STEPS_AN_EPOCH)
        for x, y in accelerator.skip_first_batches(loader, step % STEPS_AN_EPOCH):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
            if step == save_at:
                accelerator.save_state(folder)
            if step == steps:
                break
    return accelerator.unwrap_model(model), optimizer.optimizer, losses


def tensors(model, optimizer):
    return [*model.state_dict().values(), *(x for state in optimizer.state_dict()["state"].values() for x in state.values())]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"))
    args = parser.parse_args(argv)
    half = args.steps // 2
    straight = train(args.steps, args.folder, save_at=half)
    # Other random weights, all of which the checkpoint replaces
    resumed = train(args.steps, args.folder, resume=half, seed=1)
    print(f"loss {straight[2][0]:.2f} -> {straight[2][-1]:.2f}; resumed at step {half} -> {resumed[2][-1]:.2f}")
    same = all(torch.equal(a, b) for a, b in zip(tensors(*straight[:2]), tensors(*resumed[:2]), strict=True))
    print("the same bits" if same else "NOT the same bits")
    return straight, resumed


if __name__ == "__main__":
    main()
