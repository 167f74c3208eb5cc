"""The optimizers that train_lic.py knows: their names, learning rates and arguments, which parameters each group holds, the
schedule of the learning rate, and how the gradients of rate and distortion become one."""

import bisect
import fnmatch
import inspect
import math
from collections.abc import Callable, Iterable

import torch
from compressai.registry import OPTIMIZERS as REGISTRY
from lic_files import InputError
from lic_models import literal
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import soap_opt.integrations.compressai  # noqa: F401  registers "SOAP" beside torch.optim's names

OPTIMIZERS = {"soap": "SOAP", "adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "muon": "Muon"}  # ours -> the class
LEARNING_RATES = {"soap": 3e-3, "adam": 1e-3, "adamw": 1e-3, "sgd": 1e-2, "muon": 2e-2}
DEFAULTS = {"sgd": {"momentum": 0.9}}  # where the class's own make no sense here
IMPLEMENTATIONS = ("fused", "foreach")
SCHEDULES = ("linear", "cosine", "constant", "plateau", "multistep")
OF_THE_OPTIMIZER = ("weight_decay", "betas", "precondition_frequency", "refresh")  # options that become its arguments
COMBINATIONS = ("sum", "pcgrad", "upgrad", "famo")


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    if name == "muon":  # torch.optim's takes matrices only; this one flattens filters, and steps the rest by AdamW
        try:
            from pytorch_optimizer import Muon
        except ImportError as error:
            raise InputError("--optimizer muon needs the package pytorch_optimizer: pip install pytorch_optimizer") from error
        return Muon
    return REGISTRY[OPTIMIZERS[name]]


def parse_argument(text: str) -> tuple[str, object]:
    """NAME=VALUE with a Python literal, or a bare word, as the value."""
    name, equals, value = text.partition("=")
    if not equals or not name.replace("-", "_").isidentifier():
        raise ValueError(f"{text} is not NAME=VALUE")
    return name, literal(value)


def optimizer_arguments(options: dict, name: str) -> dict[str, object]:
    """Keyword arguments of the optimizer from the command line. All but --fused and --foreach are for the one of --optimizer:
    that of --compare keeps its defaults."""
    given = {flag: ("--" + flag, True) for flag in IMPLEMENTATIONS if options[flag]}
    own = name == options["optimizer"]
    if own:
        for argument in OF_THE_OPTIMIZER:
            if options[argument] is not None:
                value = tuple(options[argument]) if argument == "betas" else options[argument]
                given[argument] = ("--" + argument.replace("_", "-"), value)
        for argument, value in options["optimizer_args"].items():
            given[argument] = ("--optimizer-args " + argument, value)
    known = inspect.signature(optimizer_class(name)).parameters
    for argument, (flag, _) in given.items():
        if argument not in known:
            what = "no such implementation" if argument in IMPLEMENTATIONS else "no such argument"
            raise InputError(f"{flag}: {OPTIMIZERS[name]} has {what}")
    if own and options["no_precondition"] and name not in ("soap", "muon"):
        raise InputError(f"--no-precondition: {OPTIMIZERS[name]} has no preconditioner but a diagonal one")
    if name == "muon" and "weight_decay" in given:  # of all parameters, not only of the matrices
        given = {"adamw_wd": given["weight_decay"]} | given
    return DEFAULTS.get(name, {}) | {argument: value for argument, (_, value) in given.items()}


def parameter_groups(model: nn.Module, options: dict, name: str) -> tuple[list[dict], list[tuple[str, nn.Parameter]]]:
    """The param groups of the network's optimizer, and the quantiles of the entropy bottlenecks, which are not its.

    Named and sorted by name, as CompressAI's net_aux_optimizer does. --no-weight-decay and --no-precondition patterns make
    groups of their own, Muon's matrices too. The patterns are for the optimizer of --optimizer, as its arguments are.
    """
    patterns = {flag: name == options["optimizer"] and options[flag] or () for flag in ("no_weight_decay", "no_precondition")}
    trained = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    quantiles = [(n, p) for n, p in trained if n.endswith(".quantiles")]
    groups: dict[tuple[bool, bool], dict] = {}
    matched: set[str] = set()

    def matches(parameter: str, flag: str) -> bool:
        found = [pattern for pattern in patterns[flag] if fnmatch.fnmatchcase(parameter, pattern)]
        matched.update(found)
        return bool(found)

    for n, p in trained:
        if n.endswith(".quantiles"):
            continue
        key = (matches(n, "no_weight_decay"), matches(n, "no_precondition"))
        if name == "muon":
            key = (key[0], key[1] or p.dim() < 2)
        group = groups.setdefault(key, {"params": []})
        group["params"].append((n, p))
        if key[0]:
            group["weight_decay"] = 0.0
        if name == "soap" and key[1]:
            group["max_precond_dim"] = 0
        if name == "muon":
            group["use_muon"] = not key[1]
    for flag in patterns:
        for pattern in patterns[flag]:
            if pattern not in matched:
                raise InputError(f"--{flag.replace('_', '-')} {pattern} matches no parameter of {options['model']}")
    return list(groups.values()), quantiles


def make_optimizers(
    model: nn.Module, options: dict, name: str, learning_rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer | None]:
    """The optimizer of the network's weights, and Adam for the quantiles (None: there are none, or --quantiles bisection)."""
    arguments = optimizer_arguments(options, name)
    groups, quantiles = parameter_groups(model, options, name)
    if name == "muon":  # takes no names
        groups = [group | {"params": [p for _, p in group["params"]]} for group in groups]
    try:
        net = optimizer_class(name)(groups, lr=learning_rate, **arguments)
    except (RuntimeError, ValueError, TypeError) as error:  # SOAP's and torch's own say what cannot be had, and why
        if not arguments:
            raise
        flags = " ".join("--" + a for a in IMPLEMENTATIONS if a in arguments) or "the optimizer's arguments"
        raise InputError(f"{flags}: {error}") from error
    if options["quantiles"] == "bisection" or not quantiles:
        return net, None
    return net, torch.optim.Adam(quantiles, lr=options["aux_learning_rate"])


class Schedule:
    """The factor on the learning rate: warm-up, times what --schedule says. LambdaLR applies it; `plateau` counts with
    torch's ReduceLROnPlateau, on an optimizer of its own whose learning rate is the factor."""

    def __init__(self, options: dict, total: int):
        self.kind, self.warmup, self.total = options["schedule"], options["warmup_steps"], total
        self.decay = options["lr_decay"]
        self.milestones = sorted(options["milestones"] or [int(0.7 * total), int(0.85 * total), int(0.95 * total)])
        self._factor = torch.optim.SGD([torch.zeros(())], lr=1.0)
        self._plateau = ReduceLROnPlateau(self._factor, factor=self.decay, patience=options["plateau_patience"])

    def __call__(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        if self.kind == "linear":  # constant, then to nothing over the last 30 %
            return min(rise, max(0.0, (self.total - step) / (0.3 * self.total)))
        if self.kind == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.total)))
        if self.kind == "multistep":
            return rise * self.decay ** bisect.bisect_right(self.milestones, step)
        return rise * self._factor.param_groups[0]["lr"]  # 1 where nobody tells it of evaluations

    def evaluated(self, loss: float) -> None:
        """An evaluation's loss, for "plateau"."""
        if self.kind == "plateau":
            self._plateau.step(loss)

    def state_dict(self) -> dict:
        return {"plateau": self._plateau.state_dict(), "factor": self._factor.param_groups[0]["lr"]}

    def load_state_dict(self, state: dict) -> None:
        self._plateau.load_state_dict(state["plateau"])
        self._factor.param_groups[0]["lr"] = state["factor"]


class Gradients:
    """Backpropagates the two terms of the loss, rate and distortion (lambda D), as --gradients says.

    ``sum``: the gradient of their sum, as everywhere. ``pcgrad`` (arXiv 2001.06782) and ``upgrad`` (arXiv 2406.16232), both
    torchjd's, remove what of either gradient works against the other, at the price of a second backward pass. ``famo`` (arXiv
    2306.03792) weighs the logarithms of the terms so that both fall at one rate, which is the first method of balanced
    rate-distortion optimization (arXiv 2502.20161), at the price of a second forward pass.
    """

    FAMO_LEARNING_RATE, FAMO_DECAY = 0.025, 1e-3  # the paper's

    def __init__(
        self, combination: str, params: Iterable[Tensor], seed: int, mean: Callable[[Tensor], Tensor] = lambda values: values
    ):
        """mean: over all processes, of values that each has of its own part of the batch."""
        self.combination, self.params, self.seed, self._mean = combination, list(params), seed, mean
        if combination == "famo":
            device = self.params[0].device
            self._logits = torch.zeros(2, device=device)
            self._logits_optimizer = torch.optim.Adam([self._logits], self.FAMO_LEARNING_RATE, weight_decay=self.FAMO_DECAY)
        elif combination != "sum":
            try:
                from torchjd import aggregation, autojac
            except ImportError as error:
                how = 'pip install "torchjd[quadprog-projector]"'
                raise InputError(f"--gradients {combination} needs torchjd: {how}") from error
            self._autojac = autojac
            # UPGrad's own preference is their mean; with a weight of 1 each what does not conflict is the sum, as in PCGrad.
            ones = torch.ones(2, device=self.params[0].device)
            self._aggregator = aggregation.PCGrad() if combination == "pcgrad" else aggregation.UPGrad(ones)

    def backward(self, loss: Tensor, rate: Tensor, distortion: Tensor, step: int) -> None:
        """Fill in the gradients for loss = rate + distortion. Draws nothing from torch's generator, which the quantisation
        noise comes from."""
        if self.combination == "sum":
            loss.backward()
        elif self.combination == "famo":
            losses = torch.stack([rate, distortion])
            values = self._mean(losses.detach().clone())  # one weighting for all
            self._before = values.log()
            weights = self._logits.softmax(0) / values  # the gradient of log L is that of L by L
            (weights / weights.sum() * losses).sum().backward()
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed * 1_000_003 + step)  # PCGrad projects in a random order
                # One loss at a time: CompressAI's autograd functions cannot be batched.
                self._autojac.backward([rate, distortion], inputs=self.params, parallel_chunk_size=1)
                self._autojac.jac_to_grad(self.params, self._aggregator)

    def after_step(self, losses: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """With famo, what the step made of the two terms of the same batch: moves their weights."""
        if self.combination != "famo":
            return
        with torch.random.fork_rng(devices=[self._logits.device] if self._logits.is_cuda else []), torch.no_grad():
            fell = self._before - self._mean(torch.stack(losses())).log()
        if fell.isfinite().all():  # (one rule for all: what is not finite is passed over)
            weights = self._logits.softmax(0)
            self._logits.grad = weights * (fell - (weights * fell).sum())  # the gradient of <softmax(w), fell> by w
            self._logits_optimizer.step()

    def state_dict(self) -> dict:
        if self.combination != "famo":
            return {}
        return {"logits": self._logits, "optimizer": self._logits_optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if state:
            self._logits.copy_(state["logits"])
            self._logits_optimizer.load_state_dict(state["optimizer"])
