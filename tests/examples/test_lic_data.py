"""examples/lic_data.py: which files are found, what is checked before training, and what a step sees of them."""

import hashlib
import os
from pathlib import Path

import lic_data
import numpy as np
import pytest
import torch
import train_lic
from image_files import png_16, save
from PIL import Image

pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning", "ignore:Corrupt EXIF data"
)
TINY = ["--N", "8", "--M", "12", "--batch-size", "2", "--eval-crop", "128", "192"]


@pytest.fixture(scope="module")
def files(photos):
    return lic_data.find_images(photos / "train")


# ---- crops ----


def test_a_crop_depends_on_its_number_alone(files):
    crops = lic_data.RandomCrops(files, (64, 48), seed=3)
    forwards = [crops[i] for i in range(20)]
    assert all(crop.shape == (3, 64, 48) and crop.dtype == torch.uint8 for crop in forwards)
    again = lic_data.RandomCrops(files, (64, 48), seed=3)
    assert all(again[i].equal(forwards[i]) for i in reversed(range(20)))
    loaded = [batch for workers in (0, 1) for batch in lic_data.batches(crops, 2, 5, 4, workers, pin_memory=False)]
    for k, batch in enumerate(loaded):
        assert batch.equal(torch.stack(forwards[4 * (2 + k % 3) :][:4]))
    other = lic_data.RandomCrops(files, (64, 48), seed=4)
    assert not any(other[i].equal(forwards[i]) for i in range(20))


def test_loading_draws_nothing_from_the_global_generator(files):
    crops = lic_data.RandomCrops(files, (64, 64), seed=0)
    before = torch.get_rng_state()
    assert len(list(lic_data.batches(crops, 0, 3, 2, 0, pin_memory=False))) == 3
    assert torch.get_rng_state().equal(before)


def test_an_epoch_shows_every_image_once(tmp_path):
    for k in range(6):
        Image.new("RGB", (70, 80), (k, k, k)).save(tmp_path / f"{k}.png")
    crops = lic_data.RandomCrops(lic_data.find_images(tmp_path), (64, 64), seed=0)
    epochs = [[int(crops[i].max()) for i in range(6 * epoch, 6 * epoch + 6)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_set_too_large_to_keep_gives_the_same_crops(files, monkeypatch):
    decoded = lic_data.RandomCrops(files, (64, 64), seed=0)
    monkeypatch.setattr(lic_data, "CACHE_BYTES", 0)
    assert lic_data.RandomCrops(files, (64, 64), seed=0)[7].equal(decoded[7])


def test_folders(photos, tmp_path, examples):
    train, held_out = lic_data.find_dataset(photos)
    assert [len(train), len(held_out)] == [6, 2]
    train, held_out = lic_data.find_dataset(examples / "photos")
    assert [len(train), len(held_out)] == [95, 12]
    for k, file in enumerate(lic_data.find_images(photos)):  # any folder, recursively
        (tmp_path / "any" / str(k)).mkdir(parents=True)
        (tmp_path / "any" / str(k) / "photo.PNG").symlink_to(file)
    train, held_out = lic_data.find_dataset(tmp_path / "any")
    assert [len(train), len(held_out)] == [7, 1] and not set(train) & set(held_out)
    one = tmp_path / "any" / "0"
    assert lic_data.find_dataset(one) == ([one / "photo.PNG"], [one / "photo.PNG"])


def test_centre_crop():
    image = torch.arange(5 * 7).reshape(1, 5, 7)
    assert lic_data.centre_crop(image, (3, 3)).equal(image[:, 1:4, 2:5])
    assert lic_data.centre_crop(image, (0, 99)).equal(image)


def test_the_photographs_crops_are_as_ever(examples):
    """Recorded before links, layouts and checks were thought of: an old run can be resumed, an old result repeated."""
    files, held_out = lic_data.find_dataset(examples / "photos")
    crops = lic_data.RandomCrops(files, (64, 64), seed=0)
    plan = hashlib.sha256()
    for i in range(200):
        epoch, position = divmod(i, len(files))
        which = np.random.default_rng((0, 0, epoch)).permutation(len(files))[position]
        crop, image = crops[i], crops.decoded[which]
        assert crop.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
        top, left = divmod(crop.storage_offset() // 3, image.shape[2])  # Pillow's pixels lie together
        plan.update(f"{files[which].name} {top} {left}\n".encode())
    assert plan.hexdigest() == "cc61518dc0799ba8a0b1324495bf950a0282bcdb1278990111e3d067d71c8e01"
    with Image.open(files[which]) as photo:
        pixels = np.asarray(photo.convert("RGB"))[top : top + 64, left : left + 64]
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), pixels)


# ---- finding ----


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for path in (root / "b" / "1.png", root / "2.png", elsewhere / "deep" / "3.png", tmp_path / "4.png"):
        save(path)
    (root / "a").symlink_to(root / "b")  # the same files by a path that sorts before
    (root / "b" / "up").symlink_to(root)
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (root / "five.png").symlink_to(tmp_path / "4.png")
    (root / "two.png").symlink_to("2.png")
    (root / "self.png").symlink_to("self.png")
    found = [str(path.relative_to(root)) for path in lic_data.find_images(root)]
    assert found == ["2.png", "b/1.png", "five.png", "linked/deep/3.png", "self.png"]
    checked = lic_data.check_images(lic_data.find_images(root))
    assert [path.name for path in checked.bad] == ["self.png"]  # said, rather than passed over
    (tmp_path / "link").symlink_to(root)
    assert len(lic_data.find_images(tmp_path / "link")) == 5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_passed_over(tmp_path):
    save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in lic_data.find_images(tmp_path)] == ["1.png"]


def test_what_is_not_read_is_counted(tmp_path, capsys):
    for name in ("1.png", "2.gif", "3.JPEG", "4.webp", "5.jp2"):
        save(tmp_path / name)
    for name in ("a.heic", "b.heic", "c.svg", "d.CR2", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    train, held_out = lic_data.find_dataset(tmp_path)
    assert sorted(path.name for path in train + held_out) == ["1.png", "2.gif", "3.JPEG", "4.webp", "5.jp2"]
    assert capsys.readouterr().err == "not used, since they are not read here: 1 .cr2 file, 2 .heic files, 1 .svg file\n"
    for file in train + held_out:
        file.unlink()
    with pytest.raises(lic_data.InputError, match=r"no images below .* \(1 .cr2 file, 2 .heic files, 1 .svg file are not read"):
        lic_data.find_dataset(tmp_path)


def names(found: tuple[list[Path], list[Path]], root: Path) -> tuple[list[str], list[str]]:
    return tuple([str(path.relative_to(root)) for path in files] for files in found)


def test_layouts(tmp_path):
    def made(name: str, *paths: str) -> Path:
        for path in paths:
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).touch()
        return tmp_path / name

    clic = made("clic", "train/a.png", "valid/b.png", "test/c.png")
    assert names(lic_data.find_dataset(clic), clic) == (["train/a.png"], ["valid/b.png"])
    coco = made("coco", "train2017/1.jpg", "val2017/2.jpg", "annotations/x.json")
    assert names(lic_data.find_dataset(coco), coco) == (["train2017/1.jpg"], ["val2017/2.jpg"])
    open_images = made("open", "train/1.jpg", "test/3.jpg", *(f"validation/{k:03}.jpg" for k in range(250)))
    train, held_out = names(lic_data.find_dataset(open_images), open_images)
    assert train == ["train/1.jpg"] and len(held_out) == 100
    assert held_out[:3] == ["validation/000.jpg", "validation/002.jpg", "validation/005.jpg"]

    frames = [f"sequences/00001/{clip:04}/im{k}.png" for clip in range(1, 5) for k in range(1, 8)]
    vimeo = made("vimeo", *frames)
    (vimeo / "sep_trainlist.txt").write_text("00001/0003\n00001/0001\n")
    (vimeo / "sep_testlist.txt").write_text("00001/0004\n\n")
    train, held_out = names(lic_data.find_dataset(vimeo), vimeo)
    assert train == ["sequences/00001/0001/im4.png", "sequences/00001/0003/im4.png"]
    assert held_out == ["sequences/00001/0004/im4.png"]

    kodak = made("kodak", *(f"kodim{k:02}.png" for k in range(1, 25)))
    flat = made("flat", *(f"{k}.jpg" for k in range(30)))
    train, held_out = lic_data.find_dataset(flat, kodak)
    assert len(train) == 30 and held_out == sorted(kodak.iterdir())
    assert lic_data.find_dataset(clic, kodak)[0] == [clic / "train/a.png"]
    train, held_out = lic_data.find_dataset(clic.parent, kodak)  # never trained on, though below --dataset
    assert held_out == sorted(kodak.iterdir()) and not set(train) & set(held_out)
    with pytest.raises(lic_data.InputError, match="--eval-dataset .*nowhere is not a folder"):
        lic_data.find_dataset(flat, tmp_path / "nowhere")


# ---- checking ----


def bad_folder(root: Path, examples: Path) -> list[str]:
    """A folder with three good photographs and, in sorted order, these that are not."""
    whole = sorted((examples / "photos" / "train").iterdir())[0].read_bytes()
    root.mkdir()
    (root / "a-cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "b-empty.png").touch()
    (root / "c-no-image.jpg").write_bytes(b"not a photograph")
    (root / "d-header.ppm").write_bytes(b"P6\nten 10\n255\n" + bytes(300))
    save(root / "e-small.png", (100, 40))
    save(root / "f-cut.png", (200, 200))
    (root / "f-cut.png").write_bytes((root / "f-cut.png").read_bytes()[:60000])
    (root / "g-gone.png").symlink_to(root / "nowhere.png")
    (root / "h-cut-deep.png").write_bytes(png_16(np.random.default_rng(0).integers(0, 65536, (200, 200, 3)))[:90000])
    bad = sorted(path.name for path in root.iterdir())
    bad = sorted({*bad, "g-gone.png"})
    for k in range(3):
        (root / f"x{k}.jpg").write_bytes(whole)
    return bad


@pytest.mark.parametrize("cached", [True, False])
def test_everything_bad_is_found_at_once(tmp_path, examples, monkeypatch, capsys, cached):
    """Too large a set to be kept is decoded all the same: a truncated file is met now, and not after four days."""
    monkeypatch.setattr(lic_data, "CACHE_BYTES", (1 << 30) * cached)
    root = tmp_path / "set"
    bad = bad_folder(root, examples)
    files = lic_data.find_images(root)
    with pytest.raises(lic_data.InputError) as caught:
        lic_data.RandomCrops(files, (64, 64), seed=0)
    assert str(caught.value) == (
        "8 of 11 training images cannot be used (1 too small, 7 unreadable): replace them, or leave them out with --skip-bad, "
        "or take a smaller --patch-size"
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "cannot be used: 8 of 11 training images (1 too small, 7 unreadable)"
    for name, line in zip(bad, lines[1:], strict=True):
        assert str(root / name) in line
    for words in ("is truncated", "cannot identify image file", "is 100 x 40 pixels, smaller than --patch-size 64 x 64",
                  "No such file"):  # fmt: skip
        assert any(words in line for line in lines), words

    crops = lic_data.RandomCrops(files, (64, 64), seed=0, skip_bad=True)
    assert [path.name for path in crops.files] == ["x0.jpg", "x1.jpg", "x2.jpg"]
    assert [path.name for path in crops.bad] == bad and (crops.decoded is not None) == cached
    assert capsys.readouterr().err.splitlines() == [lines[0].replace("cannot be used", "left out"), *lines[1:]]
    assert crops[0].equal(lic_data.RandomCrops(crops.files, (64, 64), seed=0)[0])


def test_a_long_list_is_cut(tmp_path, capsys):
    files = [tmp_path / f"{k:02}.png" for k in range(25)]
    with pytest.raises(
        lic_data.InputError, match=r"none of 25 training images can be used \(25 unreadable\): cannot read .*00"
    ):
        lic_data.RandomCrops(files, (64, 64), seed=0)
    assert capsys.readouterr().err == ""
    with pytest.raises(lic_data.InputError, match="^25 of 26 training images cannot be used"):
        lic_data.RandomCrops([*files, save(tmp_path / "good.png")], (64, 64), seed=0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12 and lines[-1].strip() == ".. and 15 more"


def test_an_image_that_breaks_during_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lic_data, "CACHE_BYTES", 0)
    files = [save(tmp_path / f"{k}.png") for k in range(5)]
    before = lic_data.RandomCrops(files, (64, 64), seed=0)
    strict, lenient = (lic_data.RandomCrops(files, (64, 64), seed=0, skip_bad=skip) for skip in (False, True))
    expected = [before[i] for i in range(5)]
    order = np.random.default_rng((0, 0, 0)).permutation(5)
    at = int(np.flatnonzero(order == 4)[0])  # the last file, whose place the first takes
    files[4].write_bytes(files[4].read_bytes()[:3000])
    for i in range(5):
        if i != at:
            assert strict[i].equal(expected[i]) and lenient[i].equal(expected[i])
    with pytest.raises(lic_data.InputError, match=r"4\.png as an image: .*truncated.*could be read when training began"):
        strict[at]
    top, left = np.random.default_rng((0, 1, at)).integers((7, 17))
    crop = lenient[at]
    assert crop.equal(lic_data.read_image(files[0])[:, top : top + 64, left : left + 64]) and crop.equal(lenient[at])
    assert capsys.readouterr().err.count("the next image takes its place") == 1
    for file in files:
        file.unlink()
    with pytest.raises(lic_data.InputError, match="none of the training images can be read any more"):
        lenient[at]


def test_a_large_set_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    """The bar comes after two seconds; here at once."""
    real = lic_data.tqdm
    monkeypatch.setattr(lic_data, "tqdm", lambda *a, **k: real(*a, **(k | {"delay": 0, "mininterval": 0})))
    lic_data.check_images([save(tmp_path / f"{k}.png") for k in range(3)], decode=True, keep_bytes=0)
    shown = capsys.readouterr().err
    assert "reading headers: 100%" in shown and "checking images: 100%" in shown


# ---- as train_lic.py's user meets it ----


def last_line(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        train_lic.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_bad_images_at_the_command_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    line = last_line(capsys, ["--dataset", str(tmp_path / "empty")])
    assert line == f"train_lic.py: error: no images below {tmp_path / 'empty'}"
    for k in range(3):
        save(tmp_path / "one" / f"{k}.png", (100, 40 if k == 1 else 100))
    small = tmp_path / "one" / "1.png"
    line = last_line(capsys, ["--dataset", str(small.parent)])
    assert f"{small} is 100 x 40 pixels, smaller than --patch-size 64 x 64" in line and "--skip-bad leaves it out" in line
    line = last_line(capsys, ["--patch-size", "448", "512"])
    assert "94 of 95 training images cannot be used (94 too small)" in line and "take a smaller --patch-size" in line
    line = last_line(capsys, ["--dataset", str(small.parent), "--eval-dataset", str(tmp_path / "empty")])
    assert line == f"train_lic.py: error: no images below {tmp_path / 'empty'}"


@pytest.mark.slow
def test_a_run_that_skips_bad_images_is_resumed_with_the_same(tmp_path, examples, photos, capsys, monkeypatch):
    root, folder = tmp_path / "set", tmp_path / "run"
    bad = bad_folder(root, examples)
    broken = tmp_path / "kodak" / "1.png"
    (save(broken).parent / "2.png").symlink_to(next((photos / "test").iterdir()))
    broken.write_bytes(broken.read_bytes()[:2000])
    options = ["--dataset", str(root), "--eval-dataset", str(broken.parent), *TINY, "--steps", "2", "--save", str(folder)]
    assert "8 of 11 training images cannot be used" in last_line(capsys, options)
    assert train_lic.main([*options, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert "3 images to train on, 1 to evaluate on" in captured.out
    assert f"left out: 1 of 2 evaluation images (1 unreadable)\n  cannot read {broken}" in captured.err
    stored = torch.load(folder / "checkpoint.pth.tar", weights_only=True)["options"]
    assert stored["left_out"] == sorted([*(str(root / name) for name in bad), str(broken)])

    assert (folder / "left-out.txt").read_text().splitlines() == stored["left_out"]

    # Decoded once, by the run that began: the same images, whatever has become of those that it left out.
    monkeypatch.setattr(lic_data, "CACHE_BYTES", 0)
    monkeypatch.setattr(lic_data, "decoded_size", None)
    save(root / "b-empty.png")
    assert train_lic.main(["--resume", str(folder / "checkpoint.pth.tar"), "--steps", "4"]) == 0
    captured = capsys.readouterr()
    assert "3 images to train on, 1 to evaluate on" in captured.out and "warning" not in captured.err
    monkeypatch.undo()
    save(root / "new.png")
    assert train_lic.main(["--resume", str(folder / "checkpoint.pth.tar"), "--steps", "5"]) == 0
    assert f"warning: other images are below {root} than when this run began" in capsys.readouterr().err


@pytest.mark.slow
def test_an_image_that_breaks_is_named_by_a_worker(tmp_path, photos, capsys, monkeypatch):
    root = tmp_path / "set"
    root.mkdir()
    for file in lic_data.find_images(photos / "train"):
        (root / file.name).write_bytes(file.read_bytes())
    cut = sorted(root.iterdir())[1]
    monkeypatch.setattr(lic_data, "CACHE_BYTES", 0)
    checked = lic_data.check_images

    def and_then_cut(files, *rest, **more):
        result = checked(files, *rest, **more)
        cut.write_bytes(cut.read_bytes()[:2000])
        return result

    monkeypatch.setattr(lic_data, "check_images", and_then_cut)
    options = ["--dataset", str(root), "--eval-dataset", str(photos / "test"), *TINY, "--num-workers", "1", "--steps", "9"]
    line = last_line(capsys, [*options, "--save", str(tmp_path / "run")])
    assert line.startswith(f"train_lic.py: error: cannot read {cut} as an image: image file is truncated")
