"""One training run of a CompressAI model: its step, its learning-rate schedule, its checkpoint."""

import inspect
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyModel
from compressai.losses import RateDistortionLoss
from compressai.optimizers import net_aux_optimizer
from compressai.registry import OPTIMIZERS as REGISTRY
from lic_data import InputError, RandomCrops, batches
from lic_evaluation import evaluate, to_float
from lic_models import build_model
from torch import Tensor, nn
from tqdm import tqdm

import soap_opt.integrations.compressai  # noqa: F401  registers "SOAP" beside torch.optim's names

OPTIMIZERS = {"soap": "SOAP", "adam": "Adam", "sgd": "SGD"}  # ours -> CompressAI's registry
LOG_EVERY = 10  # steps per training row of the metrics
SAVE_EVERY = 60.0  # seconds of training between checkpoints, at most


IMPLEMENTATIONS = ("fused", "foreach")


def implementation(options: dict, optimizer: str) -> dict[str, bool]:
    """What the optimizer is given for --fused or --foreach; nothing, its own choice, for neither."""
    chosen = {name: True for name in IMPLEMENTATIONS if options[name]}
    for name in chosen:
        if name not in inspect.signature(REGISTRY[OPTIMIZERS[optimizer]]).parameters:
            raise InputError(f"--{name}: {OPTIMIZERS[optimizer]} has no such implementation")
    return chosen


def schedule_factor(kind: str, warmup: int, total: int) -> Callable[[int], float]:
    """Factor on the learning rate of step 0, 1, .. total - 1."""

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, warmup))
        if kind == "linear":  # constant, then to nothing over the last 30 %
            return min(rise, max(0.0, (total - step) / (0.3 * total)))
        if kind == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))
        return rise

    return factor


def entropy_models_in_float32(model: nn.Module, device_type: str) -> None:
    """Keep a model's entropy models out of autocast: likelihoods go down to 1e-9, which float16 cannot hold, and are
    differences of near-equal numbers, of which bfloat16 leaves nothing."""

    def in_float32(forward):
        def wrapped(*args, **kwargs):
            args = [a.float() if isinstance(a, Tensor) else a for a in args]
            kwargs = {k: a.float() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
            with torch.autocast(device_type, enabled=False):
                return forward(*args, **kwargs)

        return wrapped

    for module in model.modules():
        if isinstance(module, EntropyModel):
            module.forward = in_float32(module.forward)


class StopRequest:
    """Within it, SIGINT and SIGTERM only set `signal`, which the loop reads between steps; a second one acts at once."""

    def __init__(self):
        self.signal: int = 0

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


def describe(row: dict) -> str:
    return f"{row['loss']:.3f}, {row['bpp']:.3f} bpp, {row['psnr']:.2f} dB"


class Run:
    """A model in training with one optimizer. `history` holds the rows of metrics.csv.

    Two runs with the same options and different `optimizer` start from the same weights, see the same crops and draw
    the same quantisation noise: everything random starts at options["seed"].
    """

    def __init__(self, options: dict, optimizer: str, learning_rate: float):
        self.options, self.optimizer_name = options, optimizer
        self.device = torch.device(options["device"])
        torch.manual_seed(options["seed"])
        self.model = build_model(options["model"], options["widths"]).to(self.device)
        if options["amp"]:
            entropy_models_in_float32(self.model, self.device.type)
        self.criterion = RateDistortionLoss(lmbda=options["lmbda"], metric=options["metric"])
        chosen = implementation(options, optimizer)
        try:
            optimizers = net_aux_optimizer(  # splits the entropy bottlenecks' quantiles off to "aux"
                self.model,
                {
                    "net": {"type": OPTIMIZERS[optimizer], "lr": learning_rate, **chosen},
                    "aux": {"type": "Adam", "lr": options["aux_learning_rate"]},
                },
            )
        except RuntimeError as error:  # both SOAP's and torch's say why fused=True cannot be had here
            if not chosen:
                raise
            raise InputError(f"--{next(iter(chosen))}: {error}") from error
        self.optimizer, self.aux_optimizer = optimizers["net"], optimizers["aux"]
        factor = schedule_factor(options["schedule"], options["warmup_steps"], options["steps"])
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        on_cuda = self.device.type == "cuda"
        self.amp_dtype = torch.float16 if on_cuda else torch.bfloat16
        # bfloat16 has float32's range and needs no scaling.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options["amp"] and on_cuda)
        self.step = 0
        self.seconds = 0.0  # spent in training steps, evaluations and checkpoints not counted
        self.history: list[dict] = []

    def train_step(self, x: Tensor) -> dict[str, Tensor]:
        """One step of both optimizers on x [B, 3, h, w] in [0, 1], in the order of CompressAI's training script."""
        self.optimizer.zero_grad()
        self.aux_optimizer.zero_grad()
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.options["amp"]):
            output = self.model(x)
        output["x_hat"] = output["x_hat"].float()
        terms = self.criterion(output, x)
        self.scaler.scale(terms["loss"]).backward()
        if self.options["clip_max_norm"] > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.options["clip_max_norm"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        aux_loss = self.model.aux_loss()
        aux_loss.backward()
        self.aux_optimizer.step()
        self.scheduler.step()
        self.step += 1
        mse = F.mse_loss(output["x_hat"].detach(), x)
        return {
            "loss": terms["loss"].detach(),
            "bpp": terms["bpp_loss"].detach(),
            "mse": mse,
            "aux_loss": aux_loss.detach(),
        }

    def train(self, crops: RandomCrops, eval_images: list[Tensor], until: int, stop: StopRequest, save: Path) -> None:
        """Train to step `until`, or to the end of the step during which `stop` was asked; the checkpoint goes to `save`."""
        self.model.train()
        first, batch_size = self.step, self.options["batch_size"]
        loader = batches(crops, first, until, batch_size, self.options["num_workers"], pin_memory=self.device.type == "cuda")
        label = OPTIMIZERS[self.optimizer_name]
        window: list[dict[str, Tensor]] = []
        saved_at = self.seconds
        started = time.perf_counter() - self.seconds
        with tqdm(total=self.options["steps"], initial=first, desc=label, unit="step", dynamic_ncols=True) as progress:
            for batch in loader:
                lr = self.optimizer.param_groups[0]["lr"]
                window.append(self.train_step(to_float(batch, self.device)))
                progress.update()
                last = self.step == until
                if self.step % LOG_EVERY == 0 or last or stop.signal:
                    means = {key: torch.stack([w[key] for w in window]).mean().item() for key in window[0]}
                    window.clear()
                    self.seconds = time.perf_counter() - started  # after .item(): a GPU has finished its steps by now
                    if not math.isfinite(means["loss"]):
                        raise InputError(f"{label}'s loss is {means['loss']} at step {self.step}; try a smaller learning rate")
                    row = self.record("train", lr, means | {"psnr": -10 * math.log10(means["mse"])})
                    progress.set_postfix_str(f"loss {describe(row)}")
                if self.step % self.options["eval_every"] == 0 or last:
                    self.seconds = time.perf_counter() - started
                    row = self.record("eval", lr, evaluate(self.model, self.criterion, eval_images))
                    progress.write(f"{label} step {self.step:>5}: evaluation loss {describe(row)}")
                    if self.seconds - saved_at > SAVE_EVERY and not last:
                        self.save(save)
                        saved_at = self.seconds
                    started = time.perf_counter() - self.seconds
                if stop.signal:
                    break
        self.save(save)

    def record(self, split: str, lr: float | None, values: dict[str, float]) -> dict:
        """A row of metrics.csv for where the run stands now."""
        head = {"optimizer": self.optimizer_name, "split": split, "step": self.step, "seconds": self.seconds}
        self.history.append(head | {"learning_rate": lr} | values)
        return self.history[-1]

    def evaluations(self) -> list[dict]:
        return [row for row in self.history if row["split"] == "eval"]

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on; "state_dict" is where CompressAI's tools look for the model."""
        state = {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "aux_optimizer": self.aux_optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),  # of the quantisation noise
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "options": self.options,
            "optimizer_name": self.optimizer_name,
        }
        unfinished = path.with_name(path.name + ".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, path)  # at no time is there half a checkpoint under this name

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.aux_optimizer.load_state_dict(state["aux_optimizer"])
        self.scheduler.load_state_dict(state["lr_scheduler"])
        if state["scaler"]:  # empty from a device that needs no scaling
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        # --steps may have changed, and with it what the schedule says for the coming step.
        for group, base, factor in zip(
            self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.step)

    def entropy_coding_model(self):
        """A copy with the range coder's tables. On the CPU: encoder and decoder have to agree on every rounding."""
        model = build_model(self.options["model"], self.options["widths"])
        model.load_state_dict({key: value.cpu() for key, value in self.model.state_dict().items()})
        model.update(force=True)
        return model.eval()
