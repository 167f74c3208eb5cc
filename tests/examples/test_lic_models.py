"""examples/lic_models.py: CompressAI's registry, and classes in files that keep to its forward contract."""

import copy
import csv
import json
import math
import os
import sys
import textwrap
from pathlib import Path

import lic_data
import lic_evaluation
import lic_models
import lic_training
import pytest
import torch
import train_lic
from compressai.registry import MODELS
from lic_checkpoint import load_trained
from test_lic_parts import OPTIONS

WINDOWED = f"{Path(__file__).with_name('windowed_model.py')}:WindowedHyperprior"
QUICK_MODELS = ["bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018-mean"]  # the others take seconds
WIDTHS = {"window": 4, "N": 8, "M": 12}


@pytest.fixture(scope="module")
def image(photos):
    return lic_data.read_image(lic_data.find_images(photos / "test")[0])


# ---- the registry ----


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK_MODELS else pytest.mark.slow) for n in lic_models.image_models()],
)
def test_the_registrys_models_train_evaluate_and_code(name, image):
    """Every image model, narrow, takes two steps with both optimizers, is evaluated, and codes an image."""
    widths = lic_models.model_widths(name, None, 8, None if name.startswith("cheng") else 20)
    run = lic_training.Run(OPTIONS | {"model": name, "widths": widths}, "soap", 3e-3)
    crop = lic_data.centre_crop(image, (64, 64))
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    for _ in range(2):  # SOAP's first step only makes its bases
        terms = run.train_step(lic_evaluation.to_float(crop)[None])
        assert all(value.isfinite() for value in terms.values())
    after = run.model.state_dict()
    assert any(key.startswith("g_a.") and not after[key].equal(before[key]) for key in after)
    assert any(key.endswith("quantiles") and not after[key].equal(before[key]) for key in after)
    assert all(math.isfinite(v) for v in lic_evaluation.evaluate(run.model, run.criterion, [crop]).values())
    result, x_hat = lic_evaluation.code_image(run.entropy_coding_model(), lic_data.centre_crop(image, (60, 100)))
    assert x_hat.shape == (3, 60, 100)
    assert result["bpp"] > 0 and math.isfinite(result["psnr-rgb"])


def test_the_registry_is_all_there():
    """What is left out of CompressAI's registry is no image model: point clouds, and video."""
    left_out = MODELS.keys() - lic_models.image_models().keys()
    assert {"elic2022-official", "cheng2020-attn", "mbt2018-vbr"} <= lic_models.image_models().keys()
    assert all("pcc" in name or name == "ssf2020" for name in left_out)


def test_widths():
    assert lic_models.model_widths("bmshj2018-hyperprior", None, None, None) == {"N": 48, "M": 64}
    assert lic_models.model_widths("bmshj2018-hyperprior", 3, None, None) == {"N": 128, "M": 192}
    assert lic_models.model_widths("cheng2020-attn", 4, None, None) == {"N": 192}
    assert lic_models.model_widths("elic2022-official", None, 16, None) == {"N": 16, "M": 64}
    groups = lic_models.model_widths("elic2022-official", None, 16, 20, ["groups=[2, 2, 16]"])
    assert groups == {"N": 16, "M": 20, "groups": [2, 2, 16]}
    assert lic_models.build_model("elic2022-official", groups).groups[-3:] == [2, 2, 16]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_impossible_widths():
    with pytest.raises(lic_data.InputError, match="elic2022-official cannot be built with N=8, M=1"):
        lic_models.build_model("elic2022-official", {"N": 8, "M": 1})


# ---- models in files ----


def file_model(folder: Path, source: str, name: str = "Model", file: str = "model.py") -> str:
    """FILE.py:CLASS of a new file with this source."""
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(textwrap.dedent(source))
    return f"{folder / file}:{name}"


# CompressAI's forward and nothing else of its interface
BARE = """
    import torch
    from compressai.entropy_models import EntropyBottleneck

    class Model(torch.nn.Module):
        def __init__(self, channels=6, *, stride=8):
            super().__init__()
            self.encoder = torch.nn.Conv2d(3, channels, stride, stride)
            self.bottleneck = EntropyBottleneck(channels)
            self.decoder = torch.nn.ConvTranspose2d(channels, 3, stride, stride)

        def forward(self, x):
            y_hat, likelihoods = self.bottleneck(self.encoder(x))
            return {"x_hat": self.decoder(y_hat), "likelihoods": {"y": likelihoods}}
"""


def test_a_file_models_arguments(tmp_path):
    """Its own defaults unless given; N and M only where it has them; values as Python writes them."""
    assert lic_models.model_widths(WINDOWED, None, None, None) == {}
    assert lic_models.model_widths(WINDOWED, None, 8, 12, ["window=8"]) == {"N": 8, "M": 12, "window": 8}
    bare = file_model(tmp_path, BARE)
    given = lic_models.model_widths(bare, None, None, None, ["channels=4", "stride=16"])
    assert lic_models.build_model(bare, given).encoder.weight.shape == (4, 3, 16, 16)
    pairs = ["a=[1, 2]", "b='x=y'", "c=None", "d=relu", "e=1e-3", "f={'k': (1,)}"]
    expected = {"a": [1, 2], "b": "x=y", "c": None, "d": "relu", "e": 1e-3, "f": {"k": (1,)}}
    assert lic_models.literal_arguments(pairs) == expected
    for arguments, message in (
        (dict(N=8), "--N: Model has no argument N"),
        (dict(model_args=["depth=3"]), "--model-args depth: Model has channels, stride"),
        (dict(model_args=["stride"]), "--model-args stride: write KEY=VALUE"),
        (dict(model_args=["stride=8", "stride=9"]), "--model-args stride=9: stride is given twice"),
        (dict(quality=3), "--quality: Model has no qualities in CompressAI's zoo"),
    ):
        with pytest.raises(lic_data.InputError, match=message):
            lic_models.model_widths(bare, **(dict(quality=None, N=None, M=None) | arguments))
    with pytest.raises(lic_data.InputError, match="--N and --model-args N=: give one of them"):
        lic_models.model_widths(WINDOWED, None, 8, None, ["N=9"])
    with pytest.raises(lic_data.InputError, match="Model cannot be built with channels=-1: RuntimeError: .*negative"):
        lic_models.build_model(bare, {"channels": -1})


@pytest.mark.parametrize(("window", "multiple"), [(4, 64), (8, 128), (16, 256)])
def test_the_multiple_is_found_out(window, multiple):
    """Windows of w x w at a sixteenth of the size: sides have to be multiples of 16 w."""
    model = lic_models.build_model(WINDOWED, {"window": window, "N": 4, "M": 4}).train()
    before, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert lic_models.downsampling_factor(model) == multiple
    assert model.training and torch.get_rng_state().equal(noise)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    output = lic_evaluation.forward_padded(model, torch.rand(1, 3, 70, 130))
    assert output["x_hat"].shape == (1, 3, 70, 130)


def test_a_multiple_of_its_own(tmp_path):
    in_init = BARE.replace("super().__init__()", "super().__init__(); self.downsampling_factor = 32", 1)
    in_class = BARE.replace("def __init__", "downsampling_factor = 16\n\n        def __init__", 1)
    for file, source, multiple in (("a.py", in_init, 32), ("b.py", in_class, 16)):
        model = lic_models.build_model(file_model(tmp_path, source, file=file), {})
        assert lic_models.downsampling_factor(model) == multiple


def test_what_a_bare_module_lacks_is_made_up_for(tmp_path):
    model = lic_models.build_model(file_model(tmp_path, BARE), {})
    assert lic_models.no_coder(model) == "Model has no compress() and no decompress()"
    loss = model.aux_loss()
    assert loss.shape == () and loss.requires_grad and loss.equal(model.bottleneck.loss())
    assert model.bottleneck._quantized_cdf.numel() == 0
    assert model.update(force=True) and model.bottleneck._quantized_cdf.numel() > 0
    other = lic_models.build_model(file_model(tmp_path, BARE), {})
    assert not other.encoder.weight.equal(model.encoder.weight)
    assert lic_models.no_coder(lic_models.build_model(WINDOWED, WIDTHS)) == ""


def test_signatures_of_their_own(tmp_path):
    """An aux_loss that is a list, update() and load_state_dict() with fewer arguments than CompressAI's."""
    source = (
        BARE
        + """
        def aux_loss(self):
            return [self.bottleneck.loss(), self.bottleneck.loss()]

        def update(self, force=False):
            self.forced = force
            return self.bottleneck.update(force=force)

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            self.loaded = True
    """
    )
    model = lic_models.build_model(file_model(tmp_path, source), {})
    assert model.aux_loss().equal(2 * model.bottleneck.loss())
    quantiles = model.bottleneck.quantiles.clone()
    assert model.update(force=True, update_quantiles=True) and model.forced
    assert not model.bottleneck.quantiles.equal(quantiles)  # though update() knows nothing of it
    fresh = lic_models.build_model(file_model(tmp_path, source), {})
    fresh.load_state_dict(lic_models.build_model(file_model(tmp_path, source), {}).state_dict(), strict=True)
    assert fresh.loaded


def test_what_lies_beside_the_file_can_be_imported(tmp_path):
    """As in its authors' repository: relative imports in a package and without one, the file's folder, and the package."""
    layer = "import torch\n\nclass Layer(torch.nn.Conv2d):\n    pass\n"
    imports = {
        "one": "from .layers import Layer",
        "two": "from layers_two import Layer",
        "three": "from models_three.layers import Layer",
        "four": "from ..common.layers import Layer",
    }
    for root, line in imports.items():
        folder = tmp_path / root / f"models_{root}"
        source = BARE.replace("import torch\n", f"import torch\n    {line}\n", 1).replace("torch.nn.Conv2d", "Layer")
        name = file_model(folder, source)
        (folder / f"layers{'_two' * (root == 'two')}.py").write_text(layer)
        if root in ("three", "four"):
            (folder / "__init__.py").write_text("")
        if root == "four":
            (tmp_path / root / "common").mkdir()
            (tmp_path / root / "common" / "layers.py").write_text(layer)
        assert type(lic_models.build_model(name, {}).encoder).__name__ == "Layer"
    assert lic_models.load_class(name) is lic_models.load_class(name)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("import no_such_package", "Model", r"cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = = 1", "Model", r"cannot be imported: SyntaxError: invalid syntax \(model.py, line 1\)"),
        ("raise SystemExit('this needs a GPU')", "Model", "cannot be imported: SystemExit: this needs a GPU"),
        (BARE, "Modell", "the file has no such class; it defines Model"),
        ("Model = 3", "Model", "the file has it, but it is no torch.nn.Module; it defines no torch.nn.Module"),
        (BARE.replace("EntropyBottleneck(channels)", "lambda y: (y, y)"), "Model", "Model has no .*EntropyBottleneck, whose"),
        (BARE.replace('"x_hat": ', '"y_hat": '), "Model", "has to return .* not the keys y_hat, likelihoods"),
        (BARE.replace('{"y": likelihoods}', "likelihoods"), "Model", "has to be a dict of tensors"),
        (BARE.replace("self.decoder(y_hat)", "self.decoder(y_hat)[..., 1:]"), "Model", "makes 1 x 3 x 768 x 767 of an image"),
        (BARE.replace("super().__init__()", "super().__init__(); 1 / 0", 1), "Model", "own defaults: ZeroDivisionError: "),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, source, name, message):
    with pytest.raises(lic_data.InputError, match=message) as caught:
        lic_models.downsampling_factor(lic_models.build_model(file_model(tmp_path, source, name), {}))
    assert "\n" not in str(caught.value)


def test_names():
    assert lic_models.resolve_model("mbt2018") == lic_models.model_label("mbt2018") == "mbt2018"
    relative = os.path.relpath(WINDOWED)
    assert lic_models.resolve_model(relative) == WINDOWED and lic_models.model_label(relative) == "WindowedHyperprior"
    with pytest.raises(lic_data.InputError, match="--model jpeg: choose from bmshj2018-factorized, .*or give FILE.py:CLASS"):
        lic_models.resolve_model("jpeg")
    with pytest.raises(lic_data.InputError, match="there is no file /nowhere/x.py"):
        lic_models.load_class("/nowhere/x.py:Model")


# ---- as train_lic.py's user meets them ----


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_windowed_models_masks():
    """A shifted window that wraps around the image's edge looks at nothing beyond it: far pixels have no influence."""
    sys.path.insert(0, str(Path(__file__).parent))
    from windowed_model import SwinBlock

    torch.manual_seed(0)
    block = SwinBlock(4, 2, 4, shifted=True)
    x = torch.randn(1, 4, 8, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(x)[0, :, 0, 0].sum(), x)
    assert (gradient[0].abs().sum(0) > 1e-20).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.slow
def test_a_windowed_model_from_a_file(tmp_path, photos, monkeypatch):
    """Training, checkpoint, resume from another directory and bitstreams, from a relative path."""
    options = ["--model-args", "window=4", "--N", "8", "--M", "12", "--batch-size", "2", "--dataset", str(photos)]
    options += ["--schedule", "constant", "--eval-crop", "128", "192"]
    short, whole = tmp_path / "short", tmp_path / "whole"
    relative = os.path.relpath(WINDOWED, tmp_path)
    with monkeypatch.context() as at_first:
        at_first.chdir(tmp_path)
        assert train_lic.main(["--model", relative, *options, "--steps", "12", "--save", "short"]) == 0
    assert train_lic.main(["--resume", str(short / "checkpoint.pth.tar"), "--steps", "24", "--model", WINDOWED]) == 0
    assert train_lic.main(["--model", WINDOWED, *options, "--steps", "24", "--save", str(whole)]) == 0
    states = [torch.load(folder / "checkpoint.pth.tar", weights_only=True) for folder in (short, whole)]
    assert states[0]["options"]["model"] == WINDOWED and states[0]["options"]["widths"] == WIDTHS
    torch.testing.assert_close(states[0]["state_dict"], states[1]["state_dict"], rtol=0, atol=0)
    assert any("relative_position_bias_table" in key for key in states[0]["state_dict"])
    rows = metrics(short)
    assert rows[-1]["split"] == "bitstream" and 0.8 < float(rows[-1]["bpp"]) / float(rows[-1]["bpp_estimated"]) < 1.25
    assert json.loads((short / "eval-soap.json").read_text())["name"] == "WindowedHyperprior-mse-soap"

    trained = load_trained(short / "checkpoint.pth.tar")
    assert trained.architecture == WINDOWED and trained.step == 24 and not trained.model.training
    image = lic_data.read_image(lic_data.find_images(photos / "test")[0])
    result, _ = lic_evaluation.code_image(trained.model, image)
    assert result["psnr-rgb"] == pytest.approx(result["psnr-forward"], abs=1e-3)
    # Weights as their authors publish them: DataParallel's names, and tables already made
    published = {f"module.{key}": value for key, value in trained.model.state_dict().items()}
    torch.save({"state_dict": published, "epoch": 3}, tmp_path / "published.pth")
    again = load_trained(tmp_path / "published.pth", os.path.relpath(WINDOWED), WIDTHS)
    assert lic_evaluation.code_image(again.model, image)[0]["bpp"] == result["bpp"]
    with pytest.raises(lic_data.InputError, match="does not hold a .*size mismatch"):
        load_trained(tmp_path / "published.pth", WINDOWED)


@pytest.mark.slow
def test_a_model_without_a_coder(tmp_path, photos, capsys):
    """Bitstreams are left out with a sentence; the pictures and the likelihoods' rates are there."""
    folder = tmp_path / "run"
    options = ["--model", file_model(tmp_path, BARE), "--dataset", str(photos), "--steps", "3", "--save", str(folder)]
    assert train_lic.main(options) == 0
    out = capsys.readouterr().out
    assert "SOAP: no bitstreams: Model has no compress() and no decompress(); rates are estimated from the likelihoods" in out
    assert "2 whole images (estimated from the likelihoods: " in out
    row = metrics(folder)[-1]
    assert row["split"] == "bitstream" and row["bpp"] == "" and float(row["bpp_estimated"]) > 0
    layout = json.loads((folder / "eval-soap.json").read_text())
    assert layout["description"] == "Inference (entropy-estimation)" and "encoding_time" not in layout["results"]
    assert (folder / "reconstructions.png").exists()


@pytest.mark.slow
def test_a_coder_that_fails_costs_no_results(tmp_path, photos, capsys):
    source = (
        BARE
        + """
        def compress(self, x):
            raise RuntimeError("CUDA is needed here")

        def decompress(self, strings, shape):
            pass
    """
    )
    options = ["--model", file_model(tmp_path, source), "--dataset", str(photos), "--steps", "2"]
    assert train_lic.main([*options, "--save", str(tmp_path / "run")]) == 0
    assert "no bitstreams: Model cannot code on the CPU: RuntimeError: CUDA is needed here" in capsys.readouterr().out


def test_patch_sizes_that_a_file_model_cannot_take(photos, capsys):
    def line(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            train_lic.main(["--model", WINDOWED, "--dataset", str(photos), *arguments])
        return capsys.readouterr().err.splitlines()[-1]

    message = line("--model-args", "window=8", "--patch-size", "64")
    assert message.endswith("--patch-size 64 x 64: WindowedHyperprior needs multiples of 128")
    assert "--model-args windows: WindowedHyperprior has N, M, window, heads" in line("--model-args", "windows=8")
