"""SOAP under Lightning: bfloat16, clipped gradients, a learning rate schedule, a checkpoint, and a run that continues from it.

python examples/trainers/lightning_soap.py --steps 60 --folder runs/lightning
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from soap_opt import SOAP

STEPS_AN_EPOCH = 10


class Student(pl.LightningModule):
    def __init__(self, steps):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Dropout(0.05), nn.Linear(48, 8))
        self.steps, self.losses = steps, []

    def training_step(self, batch):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = SOAP(self.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Lightning saves the model, the optimizer and the schedule. What dropout draws from is for the module to save.
    def on_save_checkpoint(self, checkpoint):
        checkpoint["rng"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint):
        torch.set_rng_state(checkpoint["rng"])


def batches():
    """What another network answers, in an order that depends on the epoch alone: a resumed run sees the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16 * STEPS_AN_EPOCH, 16, generator=generator)
    y = 3 * torch.tanh(x @ torch.randn(16, 8, generator=generator) / 4)
    data = TensorDataset(x, y)
    return DataLoader(data, batch_size=16, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=0))


def train(steps, folder, clip=1.0, resume=None, seed=0):
    """Train for steps in all, with a checkpoint after each epoch. Returns the module, the optimizer and the losses.

    Args:
        steps: a multiple of STEPS_AN_EPOCH.
        resume: continue from this checkpoint.
    """
    torch.manual_seed(seed)
    module = Student(steps)
    trainer = pl.Trainer(
        max_epochs=steps // STEPS_AN_EPOCH,  # with max_steps Lightning would add a step to the epoch that it resumes after
        precision="bf16-mixed",
        gradient_clip_val=clip,
        callbacks=ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_epochs=1, enable_version_counter=False),
        accelerator="cpu",  # where a resumed run ends with the same bits; "auto" takes a GPU
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches(), ckpt_path=resume)
    return module, trainer.optimizers[0], module.losses


def tensors(module, optimizer):
    return [*module.state_dict().values(), *(x for state in optimizer.state_dict()["state"].values() for x in state.values())]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help=f"rounded up to an even number of epochs of {STEPS_AN_EPOCH}")
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    args = parser.parse_args(argv)
    half = STEPS_AN_EPOCH * -(-args.steps // (2 * STEPS_AN_EPOCH))
    straight = train(2 * half, args.folder)
    # Other random weights, all of which the checkpoint replaces
    resumed = train(2 * half, args.folder, resume=args.folder / f"step={half}.ckpt", seed=1)
    print(f"loss {straight[2][0]:.2f} -> {straight[2][-1]:.2f}; resumed at step {half} -> {resumed[2][-1]:.2f}")
    same = all(torch.equal(a, b) for a, b in zip(tensors(*straight[:2]), tensors(*resumed[:2]), strict=True))
    print("the same bits" if same else "NOT the same bits")
    return straight, resumed


if __name__ == "__main__":
    main()
