"""One training run of a CompressAI model: its step, its evaluations, what it checks and what it keeps."""

import contextlib
import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from compressai.losses import RateDistortionLoss
from lic_checkpoint import Checkpoints
from lic_data import RandomCrops, batches
from lic_distributed import World
from lic_evaluation import evaluate, to_float
from lic_files import InputError
from lic_models import build_model
from lic_optimizers import OPTIMIZERS, Gradients, Schedule, make_optimizers
from lic_progress import Metrics, Progress, Stopwatch
from lic_stop import CannotSave, StopRequest, TrainingFailed
from lic_weights import entropy_models_in_float32, load_weights, not_finite, update_average, update_quantiles
from torch import Tensor, nn

from soap_opt.diagnostics import ConflictMeter, preconditioner_of

LOG_EVERY = 10  # steps per training row of the metrics
RUNAWAY = 1e6  # times the loss at the beginning: early spikes of a thousandfold may pass, this has not been seen to


def describe(row: dict) -> str:
    return f"{row['loss']:.3f}, {row['bpp']:.3f} bpp, {row['psnr']:.2f} dB"


class Run:
    """A model in training with one optimizer. `history` holds the rows of metrics.csv.

    Two runs with the same options and different `optimizer` start from the same weights, see the same crops and draw
    the same quantisation noise: everything random starts at options["seed"].

    Args:
        resumed: load() comes next, so that --init's file is not needed any more.
    """

    def __init__(self, options: dict, optimizer: str, learning_rate: float, world: World | None = None, resumed: bool = False):
        self.options, self.optimizer_name, self.world = options, optimizer, world or World()
        self.device = torch.device(self.world.device(options["device"]))
        torch.manual_seed(options["seed"])
        self.model = build_model(options["model"], options["widths"]).to(self.device)
        if options["init"] and not resumed:
            load_weights(self.model, Path(options["init"]), options["model"])
        # (Copied before forward methods are replaced: a copy's would be the original's.)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False) if options["ema"] else None
        if options["amp"]:
            entropy_models_in_float32(self.model, self.device.type)
        self.criterion = RateDistortionLoss(lmbda=options["lmbda"], metric=options["metric"])
        self.optimizer, self.aux_optimizer = make_optimizers(self.model, options, optimizer, learning_rate)
        if options["conflict_every"]:
            try:
                preconditioner_of(self.optimizer)
            except TypeError as error:  # Muon
                what = f"what {self.label} makes of a gradient cannot be measured, only what SOAP, Adam, AdamW and SGD do"
                raise InputError(f"--conflict-every: {what}") from error
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.gradients = Gradients(options["gradients"], self.params, options["seed"], self.world.mean)
        self.schedule = Schedule(options, options["steps"])
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.schedule)
        on_cuda = self.device.type == "cuda"
        self.amp_dtype = torch.float16 if on_cuda else torch.bfloat16
        # bfloat16 has float32's range and needs no scaling.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options["amp"] and on_cuda)
        if self.world.size > 1:
            self.world.same_on_all(list(self.model.state_dict().values()))
            torch.manual_seed(options["seed"] + 1_000_003 * self.world.rank)  # every part of a batch has noise of its own
        self.step = 0
        self.seconds = 0.0  # spent in training steps, evaluations and checkpoints not counted
        self.history: list[dict] = []
        self.window: list[dict[str, Tensor]] = []  # of the steps since the last row for them
        self.meter: ConflictMeter | None = None
        self.metrics = Metrics(None)
        self.complained = False
        self.saved = (0, 0.0)  # at which step, when

    @property
    def label(self) -> str:
        return OPTIMIZERS[self.optimizer_name]

    # ---- a step ----

    def train_step(self, x: Tensor) -> dict[str, Tensor]:
        """One step of both optimizers on x [B, 3, h, w] in [0, 1], in the order of CompressAI's training script."""
        self.optimizer.zero_grad()
        if self.aux_optimizer is not None:
            self.aux_optimizer.zero_grad()
        output, terms, distortion = self.forward(x)
        scale = self.scaler.scale
        if measuring := self.meter is not None and self.meter.due():
            self.meter.measure(scale(terms["bpp_loss"]), scale(distortion))
        self.gradients.backward(scale(terms["loss"]), scale(terms["bpp_loss"]), scale(distortion), self.step)
        self.world.average_gradients(self.params)
        if self.options["clip_max_norm"] > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.params, self.options["clip_max_norm"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        aux_loss = self.model.aux_loss()
        if self.aux_optimizer is not None:  # (the same on all processes: it sees no images)
            aux_loss.backward()
            self.aux_optimizer.step()
        if self.averaged is not None:
            update_average(self.averaged, self.model, self.options["ema"], self.step)
        self.gradients.after_step(lambda: self.both_terms(x))
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        self.step += 1
        if measuring and self.meter.records and self.meter.records[-1]["step"] == self.step:  # (GradScaler passes steps over)
            alignments = {k: v for k, v in self.meter.records[-1].items() if k not in ("step", "seconds")}
            self.record("conflict", lr, alignments)
            self.meter.records.clear()  # they are in the history; by parameter a long run would hold millions
            self.meter.by_parameter.clear()
        mse = F.mse_loss(output["x_hat"].detach(), x)
        return {
            "loss": terms["loss"].detach(),
            "bpp": terms["bpp_loss"].detach(),
            "mse": mse,
            "aux_loss": aux_loss.detach(),
        }

    def forward(self, x: Tensor) -> tuple[dict, dict, Tensor]:
        """The model's output, the loss and its terms, and the distortion's with its weight."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.options["amp"]):
            output = self.model(x)
        output["x_hat"] = output["x_hat"].float()
        terms = self.criterion(output, x)
        return output, terms, terms["loss"] - terms["bpp_loss"]

    def both_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, terms, distortion = self.forward(x)
        return terms["bpp_loss"], distortion

    # ---- the loop ----

    def train(
        self,
        crops: RandomCrops,
        eval_images: list[Tensor],
        until: int,
        stop: StopRequest,
        checkpoints: Checkpoints,
        metrics: Metrics | None = None,
    ) -> None:
        """Train to step `until`, or to the end of the step during which `stop` was asked, and keep checkpoints.

        Raises:
            TrainingFailed: losses or weights are not finite any more, or the last checkpoint cannot be written.
        """
        self.metrics = metrics or Metrics(None)
        if self.world.first:
            self.metrics.begin(self.history)
        if every := self.options["conflict_every"]:
            self.meter = ConflictMeter(self.optimizer, every, model=self.model, step=self.step)
        self.model.train()
        first, is_best, batch_size = self.step, False, self.options["batch_size"]
        on_cuda = self.device.type == "cuda"
        loader = batches(crops, first, until, batch_size, self.options["num_workers"], on_cuda, *self.world.place)
        self.saved = (first, time.monotonic())
        with (
            Progress(self.options["steps"], first, self.label, quiet=not self.world.first) as progress,
            contextlib.closing(loader),
        ):
            stopping = 0
            if self.evaluation_is_owed(until):
                lr = self.scheduler.base_lrs[0] * self.schedule(first - 1)  # of the step before it
                is_best = self.evaluate(lr, eval_images, stop, progress)
                (stopping,) = self.world.largest([stop.signal])
                if is_best and not stopping and first < until:
                    self.keep(checkpoints, is_best, False, progress)
            clock = Stopwatch(self.seconds)
            for batch in () if stopping else loader:
                lr = self.optimizer.param_groups[0]["lr"]
                x = to_float(batch, self.device)
                self.window.append(self.train_step(x))
                progress.update()
                last = self.step == until
                if self.step % LOG_EVERY == 0 or last:
                    values = self.means(self.window)
                    self.seconds = clock.read()  # after .item(): a GPU has finished its steps by now
                    self.check_loss(values, self.window, x)
                    self.window.clear()
                    row = self.record("train", lr, values | {"psnr": -10 * math.log10(values["mse"])})
                    progress.show(f"loss {describe(row)}")
                with clock.stopped():
                    self.seconds = clock.read()
                    stopping, due = self.world.largest([stop.signal, self.is_due()])
                    is_best = False
                    if (self.step % self.options["eval_every"] == 0 or last) and not stopping:
                        is_best = self.evaluate(lr, eval_images, stop, progress)
                        (stopping,) = self.world.largest([stop.signal])
                    if stopping:
                        break
                    if (due or is_best) and not last:
                        self.keep(checkpoints, is_best, due, progress)
                    self.complain(progress)
        self.save_at_the_end(checkpoints, is_best)

    def complain(self, progress: Progress) -> None:
        """Say once that metrics.csv cannot be written, until it can again."""
        if self.metrics.complaint and not self.complained:
            progress.write(f"warning: cannot write {self.metrics.complaint}; the rows are kept for later")
        self.complained = bool(self.metrics.complaint)

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint, by --save-every's steps or the first process's minutes."""
        (kind, amount), (step, moment) = self.options["save_every"], self.saved
        if kind == "steps":
            return self.step - step >= amount
        return self.world.first and time.monotonic() - moment >= 60 * amount

    def keep(self, checkpoints: Checkpoints, is_best: bool, due: bool, progress: Progress) -> None:
        """A checkpoint in the midst of training: where it cannot be written, training goes on."""
        try:
            self.save(checkpoints, best=is_best, only_best=not due)
        except OSError as error:
            reason = error.strerror or error
            progress.write(f"warning: no checkpoint at step {self.step}: {reason}; training goes on")
        if due:
            self.saved = (self.step, time.monotonic())

    def means(self, window: list[dict[str, Tensor]]) -> dict[str, float]:
        """Over the steps of the window and all processes; of the steps whose loss is finite, where any is: what an optimizer
        passes over is counted, and does not blot out the others."""
        stacked = {key: torch.stack([step[key] for step in window]) for key in window[0]}
        fine = torch.stack(list(stacked.values())).isfinite().all(0)
        if fine.any():
            stacked = {key: values[fine] for key, values in stacked.items()}
        means = self.world.mean(torch.stack([values.mean() for values in stacked.values()])).tolist()
        return dict(zip(stacked, means, strict=True))

    def evaluate(self, lr: float, images: list[Tensor], stop: StopRequest, progress: Progress) -> bool:
        """Evaluate the model (with --ema the averaged one), record it and say so; whether it is the best so far. Where `stop`
        is asked meanwhile there is no evaluation: the resumed run makes it.

        Raises:
            TrainingFailed: what comes out is not finite.
        """
        model = self.trained_model()
        if self.options["quantiles"] == "bisection":
            if found := not_finite(list(model.named_parameters())):  # bisection would never end
                raise TrainingFailed(f"{found} is not finite at step {self.step}")
            update_quantiles(model)
            if model is not self.model:
                update_quantiles(self.model)
        part = images[self.world.rank :: self.world.size]
        batch_size = self.options["test_batch_size"]
        means = self.world.gather(evaluate(model, self.criterion, part, batch_size, lambda: bool(stop.signal)) if part else {})
        if None in means:
            return False
        parts = [(values, len(images[rank :: self.world.size])) for rank, values in enumerate(means) if values]
        values = {key: sum(v[key] * n for v, n in parts) / len(images) for key in parts[0][0]}
        if not all(math.isfinite(value) for value in values.values()):
            found = self.what_is_not_finite()
            where = f"; {found} is not finite" if found else ""
            raise TrainingFailed(f"the evaluation's loss is {values['loss']} at step {self.step}{where}")
        self.schedule.evaluated(values["loss"])
        self.set_learning_rate()  # "plateau" counts from the coming step on, as it does in a run that is resumed here
        best = all(values["loss"] < row["loss"] for row in self.evaluations())
        progress.write(f"{self.label} step {self.step:>5}: evaluation loss {describe(self.record('eval', lr, values))}")
        return best

    def record(self, split: str, lr: float | None, values: dict[str, float]) -> dict:
        """A row of metrics.csv for where the run stands now."""
        head = {"optimizer": self.optimizer_name, "split": split, "step": self.step, "seconds": self.seconds}
        self.history.append(head | {"learning_rate": lr} | values | self.skipped())
        if self.world.first:
            self.metrics.flush()
        return self.history[-1]

    def skipped(self) -> dict[str, int]:
        """How many gradients and refreshes SOAP passed over so far, of single parameters; nothing for others."""
        if self.optimizer_name != "soap":
            return {}
        return {
            "skipped_steps": self.optimizer.skipped_steps(),
            "skipped_refreshes": self.optimizer.skipped_refreshes(),
        }

    def evaluated_at(self) -> int:
        """The step of the last evaluation, 0 before it."""
        return max((row["step"] for row in self.evaluations()), default=0)

    def evaluation_is_owed(self, until: int) -> bool:
        """Whether a signal came before the evaluation of the step that the run stands at."""
        at_its_step = self.step > 0 and (self.step % self.options["eval_every"] == 0 or self.step == until)
        return at_its_step and self.evaluated_at() != self.step

    def evaluations(self) -> list[dict]:
        return [row for row in self.history if row["split"] == "eval"]

    # ---- what must not be ----

    def blank_loss(self) -> float:
        """About the loss of a model that sends nothing and paints grey."""
        return self.options["lmbda"] * (255**2 / 12 if self.options["metric"] == "mse" else 1)

    def check_loss(self, values: dict[str, float], window: list[dict[str, Tensor]], x: Tensor) -> None:
        """Stop where no loss since the last row is finite, or some are not and the weights are not either, or where they have
        run away. values: their means.

        Raises:
            TrainingFailed
        """
        if not math.isfinite(values["loss"]):
            found = self.what_is_not_finite() or self.gradient_not_finite(x)
            where = f"; {found} is not finite" if found else ""
            raise TrainingFailed(f"{self.label}'s loss is {values['loss']} at step {self.step}{where}")
        losses = self.world.mean(torch.stack([step["loss"] for step in window]))  # (NaN where it is on any process)
        if not losses.isfinite().all() and (found := self.what_is_not_finite()):
            raise TrainingFailed(f"{found} is not finite at step {self.step}")
        begun = next((row["loss"] for row in self.history if row["split"] == "train"), losses[0].item())
        if values["loss"] > RUNAWAY * max(begun, self.blank_loss()):
            raise TrainingFailed(
                f"{self.label}'s loss has run away: {values['loss']:.3g} at step {self.step}, {begun:.3g} at the beginning"
            )

    def what_is_not_finite(self) -> str | None:
        """The first of the model's parameters and buffers, of the averaged model's and of the optimizers' state that holds a
        value that is not finite. The entropy coder's tables are not looked at: they are made anew."""
        names = {p: name for name, p in self.model.named_parameters()}
        tensors = list(self.model.state_dict().items())
        if self.averaged is not None:
            tensors += [("the average of " + n, t) for n, t in self.averaged.state_dict().items()]
        for optimizer in filter(None, (self.optimizer, self.aux_optimizer)):
            if hasattr(optimizer, "wait_for_refresh"):
                optimizer.wait_for_refresh()
            for p, state in optimizer.state.items():
                tensors += [(f"{key} of {names[p]}", value) for key, value in state.items() if isinstance(value, Tensor)]
        return not_finite(tensors)

    def gradient_not_finite(self, x: Tensor) -> str | None:
        """The parameter whose gradient, before clipping spreads it to all, is not finite for this batch. Only for a run that
        ends: it draws noise."""
        self.optimizer.zero_grad()
        _, terms, _ = self.forward(x)
        terms["loss"].backward()
        named = [("the gradient of " + name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        return not_finite(named)

    # ---- checkpoints ----

    def save(self, checkpoints: Checkpoints, best: bool = False, only_best: bool = False) -> None:
        """Write the checkpoint that `checkpoints` keeps as the last, or as the best alone, after looking at what goes into it.

        Raises:
            TrainingFailed: something in it is not finite.
            OSError: it cannot be written.
        """
        if found := self.what_is_not_finite():
            raise TrainingFailed(f"{found} is not finite at step {self.step}; no checkpoint was written of it")
        state = self.state()  # (every process: it gathers)
        if self.world.first:
            if only_best:
                checkpoints.save_best(state)
            else:
                checkpoints.save(state, best)

    def save_at_the_end(self, checkpoints: Checkpoints, best: bool) -> None:
        """As `save`, but what it takes is tried: the checkpoint before the last gives way where there is no room."""
        try:
            self.save(checkpoints, best)
        except OSError as first:
            error = first
            if checkpoints.make_room():
                try:
                    return self.save(checkpoints, best)
                except OSError as second:
                    error = second
            raise CannotSave(f"cannot save step {self.step}: {error.strerror or error}") from error

    def state(self) -> dict:
        """Everything that the next step depends on; "state_dict" is where CompressAI's tools look for the model to use, which
        is the averaged one where there is one."""
        return {
            "state_dict": self.trained_model().state_dict(),
            "unaveraged": self.model.state_dict() if self.averaged is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "aux_optimizer": self.aux_optimizer.state_dict() if self.aux_optimizer is not None else None,
            "lr_scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
            "schedule": self.schedule.state_dict(),
            "gradients": self.gradients.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),  # of the quantisation noise
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "rngs": self.world.gather(torch.get_rng_state()) if self.world.size > 1 else None,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "window": self.window,
            "windows": self.world.gather([{k: v.cpu() for k, v in step.items()} for step in self.window])
            if self.world.size > 1
            else None,
            "options": self.options,
            "optimizer_name": self.optimizer_name,
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["unaveraged"] if state.get("unaveraged") else state["state_dict"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.aux_optimizer is not None:
            self.aux_optimizer.load_state_dict(state["aux_optimizer"])
        self.scheduler.load_state_dict({"lr_lambdas": [None] * len(self.optimizer.param_groups)} | state["lr_scheduler"])
        if "schedule" in state:  # (not in a checkpoint from before there was one to keep)
            self.schedule.load_state_dict(state["schedule"])
            self.gradients.load_state_dict(state["gradients"])
        if state["scaler"]:  # empty from a device that needs no scaling
            self.scaler.load_state_dict(state["scaler"])
        rngs = state.get("rngs")
        torch.set_rng_state((rngs[self.world.rank] if rngs and len(rngs) == self.world.size else state["rng"]).cpu())
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        windows = state.get("windows")
        window = windows[self.world.rank] if windows and len(windows) == self.world.size else state.get("window", [])
        self.window = [{key: value.to(self.device) for key, value in step.items()} for step in window]
        self.set_learning_rate()  # --steps may have changed, and with it what the schedule says

    def set_learning_rate(self) -> None:
        """To what the schedule says for the coming step."""
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * self.schedule(self.step)

    # ---- what was trained ----

    def trained_model(self):
        """The module to evaluate and to keep: the averaged one where there is one."""
        return self.model if self.averaged is None else self.averaged

    def entropy_coding_model(self):
        """A copy with the range coder's tables. On the CPU: encoder and decoder have to agree on every rounding."""
        model = build_model(self.options["model"], self.options["widths"])
        model.load_state_dict({key: value.cpu() for key, value in self.trained_model().state_dict().items()})
        if self.options["quantiles"] == "bisection":
            update_quantiles(model)
        model.update(force=True)
        return model.eval()
