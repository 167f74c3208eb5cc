"""What the pictures of a run are made from, and that they are made."""

import lic_evaluation
import lic_plots
import pytest
import torch
from lic_data import find_images
from lic_images import centre_crop, read_image
from lic_optimizers import OPTIMIZERS
from lic_plots import JpegLevel, most_detailed, plot_curves, plot_reconstructions
from PIL import Image


def rows(measured: bool) -> list[dict]:
    history = []
    for step in range(10, 60, 10):
        row = {"step": step, "seconds": step / 7, "loss": 100 / step, "bpp": 1.0, "psnr": 20.0 + step, "learning_rate": 1e-3}
        history += [row | {"split": "train", "aux_loss": 1000 / step}, row | {"split": "eval"}]
        if measured:
            history.append({"split": "conflict", "step": step, "raw_shared": float("nan"), "preconditioned_shared": 0.1,
                            "between_steps": 0.9})  # fmt: skip
    return history


@pytest.mark.slow
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


def test_the_level_is_jpegs_at_each_images_own_rate(examples, monkeypatch):
    images = [centre_crop(read_image(file), (128, 192)) for file in find_images(examples / "photos" / "eval")[:2]]
    rates = [1.0, 3.0]

    def told(model, criterion, alone):
        (image,) = alone
        return {"bpp": rates[next(i for i, other in enumerate(images) if other is image)]}

    monkeypatch.setattr(lic_evaluation, "evaluate", told)
    level = JpegLevel(*lic_evaluation.jpeg_level(None, None, images))
    coded = [lic_evaluation.jpeg_at(image, rate) for image, rate in zip(images, rates)]
    assert abs(coded[0][1] - 1) < 0.1 and abs(coded[1][1] - 3) < 0.3
    assert level.model_bpp == 2 and level.bpp == pytest.approx((coded[0][1] + coded[1][1]) / 2)
    values = [lic_evaluation.psnr(decoded, lic_evaluation.to_float(image)) for (decoded, _), image in zip(coded, images)]
    assert level.psnr == pytest.approx(sum(values) / 2)


def test_the_detail_is_where_the_image_changes_most(tmp_path):
    image = torch.full((3, 64, 96), 0.5)
    image[:, 20:36, 50:66] = (torch.arange(16) + torch.arange(16)[:, None]) % 2.0  # a chessboard
    assert most_detailed(image, 16) == (20, 50)
    plot_reconstructions(tmp_path / "one.png", [[("original", image), ("decoded", torch.rand(3, 64, 96))]])
    height = Image.open(tmp_path / "one.png").size[1]
    assert height == pytest.approx(64 + 4 * 16 + 36 + 3 * 8, abs=2)
