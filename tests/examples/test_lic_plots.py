"""What the pictures of a run are made from, and that they are made."""

import lic_plots
import pytest
import torch
from compressai.losses import RateDistortionLoss
from lic_data import centre_crop, find_images, read_image
from lic_evaluation import encode_jpeg, evaluate, jpeg_level
from lic_models import build_model
from lic_optimizers import OPTIMIZERS
from lic_plots import JpegLevel, most_detailed, plot_curves, plot_reconstructions
from PIL import Image
from torchvision.transforms.functional import to_pil_image


def rows(measured: bool) -> list[dict]:
    history = []
    for step in range(10, 60, 10):
        row = {"step": step, "seconds": step / 7, "loss": 100 / step, "bpp": 1.0, "psnr": 20.0 + step, "learning_rate": 1e-3}
        history += [row | {"split": "train", "aux_loss": 1000 / step}, row | {"split": "eval"}]
        if measured:
            history.append({"split": "conflict", "step": step, "raw_shared": float("nan"), "preconditioned_shared": 0.1,
                            "between_steps": 0.9})  # fmt: skip
    return history


@pytest.mark.parametrize(("auxiliary", "measured", "panels"), [(True, True, 11), (False, False, 7)])
def test_a_panel_for_everything_that_there_is(tmp_path, monkeypatch, auxiliary, measured, panels):
    drawn = []
    monkeypatch.setattr(lic_plots.plt, "close", lambda figure: drawn.append(figure))
    histories = {name: rows(measured) for name in OPTIMIZERS}
    jpeg = {"soap": JpegLevel(95.0, 0.5, 0.5), "adam": JpegLevel(30.0, 0.5, 0.2)}
    plot_curves(tmp_path / "curve.png", histories, OPTIMIZERS, "title", jpeg, auxiliary, stepped=True)
    axes = drawn[0].axes
    assert len(axes) == panels
    psnr = next(axis for axis in axes if axis.get_ylabel() == "PSNR (dB)")
    texts = [text.get_text() for text in psnr.get_legend().get_texts()]
    assert texts == ["JPEG at SOAP's 0.50 bpp", "JPEG at 0.50 bpp, near its least"]
    assert psnr.get_ylim()[1] > 95  # the dashed line is to be seen
    lic_plots.plt.close("all")
    assert Image.open(tmp_path / "curve.png").size[0] > 1000


def test_the_level_is_jpegs_at_each_images_own_rate(examples):
    files = find_images(examples / "photos" / "eval")[:2]
    images = [centre_crop(read_image(file), (64, 128)) for file in files]
    torch.manual_seed(0)
    model, criterion = build_model("bmshj2018-factorized", {"N": 8, "M": 12}), RateDistortionLoss(0.01)
    model.g_a[0].weight.data.mul_(3)  # other than near nothing everywhere
    rates = [evaluate(model, criterion, [image])["bpp"] for image in images]
    level = JpegLevel(*jpeg_level(model, criterion, images))
    assert level.model_bpp == pytest.approx(sum(rates) / 2)
    sizes = [[8 * len(encode_jpeg(to_pil_image(image), q)) / (64 * 128) for q in range(1, 96)] for image in images]
    nearest = [min(own, key=lambda bpp: abs(bpp - rate)) for own, rate in zip(sizes, rates, strict=True)]
    assert level.bpp == pytest.approx(sum(nearest) / 2)


def test_the_detail_is_where_the_image_changes_most(tmp_path):
    image = torch.full((3, 64, 96), 0.5)
    image[:, 20:36, 50:66] = (torch.arange(16) + torch.arange(16)[:, None]) % 2.0  # a chessboard
    assert most_detailed(image, 16) == (20, 50)
    plot_reconstructions(tmp_path / "one.png", [[("original", image), ("decoded", torch.rand(3, 64, 96))]])
    height = Image.open(tmp_path / "one.png").size[1]
    assert height == pytest.approx(64 + 4 * 16 + 36 + 3 * 8, abs=2)
