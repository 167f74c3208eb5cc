"""Models by name: CompressAI's registry, or any class in a file, FILE.py:CLASS, that keeps to CompressAI's forward contract.

Nothing is ever downloaded: every model starts from random weights.
"""

import ast
import hashlib
import importlib
import inspect
import re
import sys
import types
from functools import cache
from pathlib import Path

import torch
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.models import CompressionModel
from compressai.models.base import get_scale_table
from compressai.registry import MODELS
from compressai.zoo.image import cfgs as zoo_widths  # model -> quality -> (N, M) or (N,)
from lic_files import InputError
from torch import Tensor, nn

# Small enough to train in minutes on two cores; the papers' widths are --quality's.
DEFAULT_N, DEFAULT_M = 48, 64
IN_A_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)")
MULTIPLES = (64, 128, 256)  # of the image's sides, the first of which that a model from a file can work with is its own


def image_models() -> dict[str, type[CompressionModel]]:
    """CompressAI's registry without its point cloud and video models."""
    others = ("compressai.models.pointcloud", "compressai.models.video")
    return {
        name: cls
        for name, cls in MODELS.items()
        # A class from a file may have registered itself: it goes by its file, or a resumed run would not find it.
        if isinstance(cls, type)
        and issubclass(cls, CompressionModel)
        and cls.__module__.startswith("compressai.")
        and not cls.__module__.startswith(others)
    }


def resolve_model(name: str) -> str:
    """`name` as a checkpoint keeps it: a name of the registry, or FILE.py:CLASS with the file's absolute path.

    Raises:
        InputError: it is neither.
    """
    if match := IN_A_FILE.fullmatch(name):
        return f"{Path(match['file']).resolve()}:{match['name']}"
    if name not in image_models():
        raise InputError(f"--model {name}: choose from {', '.join(image_models())}, or give FILE.py:CLASS")
    return name


def model_label(name: str) -> str:
    """A model's name where a path has no place: in a folder's name, in a title."""
    match = IN_A_FILE.fullmatch(name)
    return match["name"] if match else name


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


# ---- models in files ----


class Conformed:
    """In front of a class from a file: what the scripts beside this one expect of CompressAI's models, for those that leave
    part of it out or do it otherwise. forward, compress and decompress are the class's own."""

    def aux_loss(self) -> Tensor:
        """The sum of the entropy bottlenecks' losses: the class's own, which may also be a list of them."""
        own = getattr(super(), "aux_loss", None)
        if own is None:
            return sum(module.loss() for module in self.modules() if isinstance(module, EntropyBottleneck))
        loss = own()
        return loss if isinstance(loss, Tensor) else sum(loss)

    def update(self, scale_table: Tensor | None = None, force: bool = False, update_quantiles: bool = False) -> bool:
        """The entropy coder's tables, made with those of the arguments that the class's own update() has."""
        if own := getattr(super(), "update", None):
            asked = {"scale_table": scale_table, "force": force, "update_quantiles": update_quantiles}
            taken = inspect.signature(own).parameters
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
                taken = asked
            if update_quantiles and "update_quantiles" not in taken:
                for module in self.modules():
                    if isinstance(module, EntropyBottleneck):
                        module.update(force=True, update_quantiles=True)
            return bool(own(**{key: value for key, value in asked.items() if key in taken and value is not None}))
        updated = False
        for module in self.modules():
            if isinstance(module, EntropyBottleneck):
                updated |= module.update(force=force, update_quantiles=update_quantiles)
            elif isinstance(module, GaussianConditional):
                updated |= module.update_scale_table(get_scale_table() if scale_table is None else scale_table, force=force)
        return updated

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """With the options that the class's own load_state_dict() has."""
        own = super().load_state_dict
        asked = {"strict": strict, "assign": assign}
        return own(state_dict, **{key: asked[key] for key in inspect.signature(own).parameters if key in asked})

    @property
    def downsampling_factor(self) -> int:
        """What an image's sides have to be a multiple of: the class's own word, or else found out by trying."""
        own = self.__dict__.get("_own_downsampling_factor") or getattr(super(), "downsampling_factor", None)
        return own if isinstance(own, int) else found_multiple(self)

    @downsampling_factor.setter
    def downsampling_factor(self, value: int) -> None:  # a class may set it in its __init__
        self.__dict__["_own_downsampling_factor"] = value


def load_class(name: str) -> type[nn.Module]:
    """The class that FILE.py:CLASS names, with Conformed in front of it.

    The file's folder is on sys.path from then on, and so is the one above the package that the file is in, if it is in one:
    what its authors' own scripts import, it can import here. Relative imports work in a package and beside a single file.

    Raises:
        InputError: there is no such file or class, the file cannot be imported, or the class is no torch.nn.Module.
    """
    match = IN_A_FILE.fullmatch(name)
    return _load_class(Path(match["file"]).resolve(), match["name"])


@cache  # a second class of the same name would be another one
def _load_class(path: Path, class_name: str) -> type[nn.Module]:
    name = f"{path}:{class_name}"
    if not path.is_file():
        raise InputError(f"--model {name}: there is no file {path}")
    root = path.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    for folder in dict.fromkeys((str(root), str(path.parent))):
        if folder not in sys.path:
            sys.path.insert(0, folder)  # the last one first, as it is when python is given the file
    # Modules of its own name space: every other repository has a models/__init__.py.
    package = f"lic_model_{hashlib.sha256(str(root).encode()).hexdigest()[:12]}"
    if package not in sys.modules:
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(root)]
    try:
        module = importlib.import_module(".".join((package, *path.relative_to(root).with_suffix("").parts)))
    except (Exception, SystemExit) as error:  # anything can come out of a file that is somebody else's
        raise InputError(f"--model {name}: {path} cannot be imported: {one_line(error)}") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        what = "has no such class" if found is None else "has it, but it is no torch.nn.Module"
        others = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)]
        own = [key for key in others if vars(module)[key].__module__ == module.__name__]
        raise InputError(f"--model {name}: the file {what}; it defines {', '.join(own) or 'no torch.nn.Module'}")
    return type(class_name, (Conformed, found), {"__module__": found.__module__, "__doc__": found.__doc__})


_multiples: dict[tuple, int] = {}  # (class, its parameters' shapes) -> what was found out


def found_multiple(model: nn.Module) -> int:
    """The first of MULTIPLES that a model can work with, by a forward pass over three times as many pixels each way; so
    often, for an odd number of windows and of everything else that is halved.

    Raises:
        InputError: with none of them.
    """
    key = (type(model), tuple(parameter.shape for parameter in model.parameters()))
    for multiple in () if key in _multiples else MULTIPLES:
        try:
            forward_once(model, 3 * multiple, 3 * multiple)
        except InputError as error:
            failure = error
        else:
            _multiples[key] = multiple
            break
    if key not in _multiples:
        raise failure
    return _multiples[key]


@torch.no_grad()
def forward_once(model: nn.Module, height: int, width: int) -> None:
    """A forward pass over a grey image of this size, in evaluation mode, to see whether it can be done at all.

    Raises:
        InputError: it cannot, or what comes out is not what CompressAI's models return.
    """
    was_training = model.training
    model.eval()
    parameter = next(model.parameters())
    label = type(model).__name__
    try:
        x = torch.full((1, 3, height, width), 0.5, dtype=parameter.dtype, device=parameter.device)
        output = model(x)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{label} cannot work on an image of {width} x {height} pixels: {one_line(error)}") from error
    finally:
        model.train(was_training)
    if not isinstance(output, dict) or not {"x_hat", "likelihoods"} <= output.keys():
        got = f"the keys {', '.join(map(str, output))}" if isinstance(output, dict) else f"a {type(output).__name__}"
        raise InputError(f'{label}.forward(x) has to return {{"x_hat": .., "likelihoods": {{..}}}}, not {got}')
    if not isinstance(output["likelihoods"], dict) or not all(isinstance(t, Tensor) for t in output["likelihoods"].values()):
        raise InputError(f'{label}.forward(x)["likelihoods"] has to be a dict of tensors')
    if output["x_hat"].shape != x.shape:
        shape = " x ".join(map(str, output["x_hat"].shape))
        raise InputError(f"{label} makes {shape} of an image of 1 x 3 x {height} x {width}")


# ---- building ----


def literal(text: str) -> object:
    """A value as Python writes it; what is no literal is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def literal_arguments(pairs: list[str]) -> dict:
    """KEY=VALUE each.

    Raises:
        InputError: there is no KEY=, or one is given twice.
    """
    arguments = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--model-args {pair}: write KEY=VALUE")
        if key in arguments:
            raise InputError(f"--model-args {pair}: {key} is given twice")
        arguments[key] = literal(value)
    return arguments


def model_widths(
    name: str, quality: int | None, N: int | None, M: int | None, model_args: list[str] | None = None
) -> dict[str, object]:
    """The constructor's keyword arguments: --model-args, with the widths. For the registry's models these are the zoo's for
    --quality, or --N and --M with this script's small defaults; a model from a file keeps its own defaults.

    Raises:
        InputError: the constructor has no such argument, or --quality does not go with what else is given.
    """
    in_file = bool(IN_A_FILE.fullmatch(name))
    parameters = inspect.signature(load_class(name) if in_file else image_models()[name]).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and in_file
    label = model_label(name)
    given = literal_arguments(model_args or [])
    for key in given:
        if key not in parameters and not open_ended:
            known = ", ".join(k for k, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
            raise InputError(f"--model-args {key}: {label} has {known or 'no arguments'}")
    for flag, value in (("N", N), ("M", M)):
        if value is not None and flag in given:
            raise InputError(f"--{flag} and --model-args {flag}=: give one of them")
        if value is not None and flag not in parameters:
            only = f"has only one width, --{'NM'.replace(flag, '')}" if "N" in parameters else f"has no argument {flag}"
            raise InputError(f"--{flag}: {label} {only}")
    chosen = {flag: value for flag, value in (("N", N), ("M", M)) if value is not None}
    if quality is not None:
        if chosen or {"N", "M"} & given.keys():
            raise InputError("--quality sets the widths: give it, or --N/--M, not both")
        if name not in zoo_widths:
            raise InputError(f"--quality: {label} has no qualities in CompressAI's zoo; give --N/--M instead")
        if quality not in zoo_widths[name]:
            raise InputError(f"--quality {quality}: {name} has {min(zoo_widths[name])} to {max(zoo_widths[name])}")
        return dict(zip("NM", zoo_widths[name][quality], strict=False)) | given
    defaults = {} if in_file else {k: v for k, v in (("N", DEFAULT_N), ("M", DEFAULT_M)) if k in parameters}
    return defaults | chosen | given


def build_model(name: str, widths: dict[str, object]) -> CompressionModel:
    """The model with random weights (torch's global generator), built with the keyword arguments `widths`.

    Args:
        name: of the registry, or FILE.py:CLASS. What comes of the latter is a torch.nn.Module with CompressAI's aux_loss(),
            update(), load_state_dict() and downsampling_factor (see Conformed); compress() and decompress() only if they are
            its own: `no_coder` says.

    Raises:
        InputError: it cannot be built so.
    """
    in_file = bool(IN_A_FILE.fullmatch(name))
    model_class = load_class(name) if in_file else image_models()[name]
    extra = {}
    if not in_file and "groups" in inspect.signature(model_class).parameters and "groups" not in widths:
        if (M := widths["M"]) <= 128:
            # ELIC's first four channel groups are fixed at 128 in all; below that, the proportions of its M = 320.
            groups = [max(1, M // 20), max(1, M // 20), max(1, M // 10), max(1, M // 5)]
            extra["groups"] = [*groups, M - sum(groups)]
    try:
        model = model_class(**widths, **extra)
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{key}={value}" for key, value in widths.items()) or "its own defaults"
        cause = one_line(error) if in_file else str(error)
        raise InputError(f"{model_label(name)} cannot be built with {given}: {cause}") from error
    if in_file and not any(key.endswith(".quantiles") for key, _ in model.named_parameters()):
        raise InputError(
            f"{model_label(name)} has no compressai.entropy_models.EntropyBottleneck, whose quantiles are trained beside it"
        )
    return model


def downsampling_factor(model: CompressionModel) -> int:
    """What an image's sides have to be a multiple of. The models without the property all have a hyperprior: 64."""
    return getattr(model, "downsampling_factor", 64)


def no_coder(model: nn.Module) -> str:
    """Why a model has no bitstreams; empty where it has."""
    missing = [f"{name}()" for name in ("compress", "decompress") if not callable(getattr(model, name, None))]
    return f"{type(model).__name__} has no {' and no '.join(missing)}" if missing else ""
