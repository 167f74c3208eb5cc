"""SOAP under Hugging Face's Trainer: bfloat16, clipped gradients, a learning rate schedule, a checkpoint, a resumed run.

python examples/trainers/transformers_soap.py --steps 50 --folder runs/transformers
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

from soap_opt import SOAP

STEPS_AN_EPOCH = 10
WORDS = 32


def sentences():
    """Words that count up, each sentence from a start and in a stride of its own."""
    generator = torch.Generator().manual_seed(0)
    start, stride = torch.randint(WORDS, (2, 8 * STEPS_AN_EPOCH, 1), generator=generator)
    words = (start + (1 + stride % 4) * torch.arange(12)) % WORDS
    return [{"input_ids": sentence, "labels": sentence} for sentence in words]


def train(steps, folder, save_every=None, clip=1.0, resume=None, seed=0):
    """Train for steps in all, with checkpoints in folder. Returns the model, the optimizer and the losses.

    Args:
        resume: continue from this checkpoint.
    """
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_positions=12, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        max_grad_norm=clip,
        lr_scheduler_type="cosine",
        warmup_steps=10,  # from 0 on, which costs nothing: SOAP's first step moves nothing anyway
        weight_decay=0.01,  # without it the Trainer's own 0 would take the place of SOAP's
        bf16=True,
        use_cpu=True,  # where a resumed run ends with the same bits; leave it out for a GPU
        save_strategy="steps",
        save_steps=save_every or steps,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        data_seed=0,
    )
    # The learning rate is SOAP's: the Trainer passes its own on to the optimizers that it makes itself.
    optimizer = SOAP, {"lr": 1e-2}
    trainer = Trainer(model, arguments, train_dataset=sentences(), optimizer_cls_and_kwargs=optimizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model, trainer.optimizer.optimizer, losses


def tensors(model, optimizer):
    return [*model.state_dict().values(), *(x for state in optimizer.state_dict()["state"].values() for x in state.values())]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=Path("runs/transformers"))
    args = parser.parse_args(argv)
    half = args.steps // 2
    straight = train(args.steps, args.folder, save_every=half)
    # Other random weights, all of which the checkpoint replaces
    resumed = train(args.steps, args.folder, save_every=half, resume=str(args.folder / f"checkpoint-{half}"), seed=1)
    print(f"loss {straight[2][0]:.2f} -> {straight[2][-1]:.2f}; resumed at step {half} -> {resumed[2][-1]:.2f}")
    same = all(torch.equal(a, b) for a, b in zip(tensors(*straight[:2]), tensors(*resumed[:2]), strict=True))
    print("the same bits" if same else "NOT the same bits")
    return straight, resumed


if __name__ == "__main__":
    main()
