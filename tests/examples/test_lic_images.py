"""What image files become: 16 bits, orientations, other kinds of pixels."""

import struct
import sys

import lic_data
import numpy as np
import pytest
from image_files import png_16, save
from PIL import Image

pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning", "ignore:Corrupt EXIF data"
)


def tiff_16(values: np.ndarray, orientation: int = 1) -> bytes:
    """An uncompressed TIFF of 16 bits per channel in colour, values [H, W, 3]."""
    height, width, _ = values.shape
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 256),
               (274, 3, 1, orientation), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, 6 * width * height)]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    head = b"II*\0" + struct.pack("<I", 16) + struct.pack("<HHHH", 16, 16, 16, 0) + directory
    return head.ljust(256, b"\0") + values.astype("<u2").tobytes()


# ---- reading ----


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "colour.png", "alpha.png", "grey-alpha.png", "colour.tif"])
def test_sixteen_bits_are_rounded(tmp_path, name, capsys):
    """round(v * 255 / 65535), where Pillow says nothing and takes v // 256, or saturates."""
    path = tmp_path / name
    channels = {"grey": 1, "colour": 3, "alpha": 4, "grey-alpha": 2}[path.stem]
    values = np.random.default_rng(0).integers(0, 65536, (70, 80, channels)).astype(np.uint16)
    if name == "colour.tif":
        pytest.importorskip("tifffile")
        path.write_bytes(tiff_16(values))
    elif name == "grey.tif":
        Image.fromarray(values[..., 0]).save(path)
    else:
        path.write_bytes(png_16(values))
    expected = np.rint(values.astype(np.float64) * 255 / 65535)
    expected = expected[..., :3] if channels >= 3 else np.repeat(expected[..., :1], 3, axis=2)
    checked = lic_data.check_images([path])
    assert checked.deep == 1 and not checked.bad
    assert np.array_equal(checked.decoded[0].permute(1, 2, 0).numpy(), expected)
    lic_data.settle(checked, "training", skip_bad=False)
    assert capsys.readouterr().err == "1 of 1 training images have 16 bits per channel; they are rounded to 8\n"


def test_a_deep_tiff_without_tifffile_is_said(tmp_path, monkeypatch):
    (tmp_path / "deep.tif").write_bytes(tiff_16(np.zeros((70, 80, 3))))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(lic_data.InputError, match="a TIFF with 16 bits per channel in colour needs the package tifffile"):
        lic_data.read_image(tmp_path / "deep.tif")


def test_floats_are_refused(tmp_path):
    for mode in "FI":
        Image.new(mode, (80, 70)).save(tmp_path / f"{mode}.tif")
        with pytest.raises(lic_data.InputError, match="32 bits per channel, whose range is not known"):
            lic_data.read_image(tmp_path / f"{mode}.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation):
    """A viewer's way round, in every format that says it, and found before the pixels are read."""
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    # the EXIF standard's table: where the stored image's first row and first column are seen
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2), 7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: pixels[:, ::-1].transpose(1, 0, 2),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(pixels)
    stored.save(tmp_path / "a.png", exif=exif)
    stored.save(tmp_path / "b.tif", exif=exif)
    stored.save(tmp_path / "c.webp", exif=exif, lossless=True)
    (tmp_path / "d.png").write_bytes(png_16(pixels.astype(np.uint16) * 257, exif.tobytes().removeprefix(b"Exif\0\0")))
    (tmp_path / "e.tif").write_bytes(tiff_16(pixels.astype(np.uint16) * 257, orientation))
    for path in sorted(tmp_path.iterdir()):
        with lic_data.open_image(path) as image:
            assert lic_data.oriented_size(image) == upright.shape[1::-1], path.name
        if path.name == "e.tif" and not has_tifffile():
            continue
        assert np.array_equal(lic_data.read_image(path).permute(1, 2, 0).numpy(), upright), path.name
        assert lic_data.decoded_size(path) == upright.shape[1::-1]


def has_tifffile() -> bool:
    try:
        import tifffile  # noqa: F401
    except ImportError:
        return False
    return True


def test_other_kinds_of_pixels_become_rgb(tmp_path):
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8))
    alpha = colour.copy()
    alpha.putalpha(7)
    for name, image in (("p.png", colour.quantize(16)), ("l.png", colour.convert("L")), ("1.png", colour.convert("1")),
                        ("cmyk.tif", colour.convert("CMYK")), ("rgba.png", alpha)):  # fmt: skip
        image.save(tmp_path / name)
        expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(lic_data.read_image(tmp_path / name).permute(1, 2, 0).numpy(), expected), name
    assert lic_data.read_image(tmp_path / "rgba.png").permute(1, 2, 0).numpy().tobytes() == colour.tobytes()
    frames = [Image.new("RGB", (80, 70), shade) for shade in ("#204060", "#ffffff")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert lic_data.read_image(tmp_path / "moving.gif")[:, 0, 0].tolist() == [0x20, 0x40, 0x60]


def test_damaged_exif_does_not_make_an_image_unreadable(tmp_path):
    path = save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f\x01\x00garbage")
    assert not lic_data.check_images([path]).bad
