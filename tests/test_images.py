"""What becomes of odd and bad image files, on every path that decodes."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import TINY, VIT, run_main, the_error
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

import main_linprobe
import main_pretrain
from util.args import finetune_parser
from util.data.images import BadImage, open_image, to_8_bits
from util.data.order import SeededDataset
from util.data.pixels import RGB
from util.data.transforms import eval_transform, probe_transform
from util.datasets import build_transform, open_dataset
from util.errors import UserError
from util.visualize import preview_images
from util_contrastive import TwoCrops, cut


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).resize((96, 64))


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def png_header(width: int, height: int) -> bytes:
    """A PNG of 8-bit grey pixels, none of which are there."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT": b""}
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def alpha(photo: Image.Image, mode: str) -> Image.Image:
    """With an opacity that rises from left to right."""
    image = photo.convert(mode)
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(photo.size))
    return image


GREY16 = np.linspace(0, 65535, 64 * 96).astype(np.uint16).reshape(64, 96)

# Files by kind, with what Pillow makes of the same pixels by itself, RGB [H, W, 3].
KINDS = {
    "rgba": lambda p: (saved(alpha(p, "RGBA"), "PNG"), p),
    "la": lambda p: (saved(alpha(p, "L"), "PNG"), p.convert("L").convert("RGB")),
    "palette": lambda p: (saved(p.quantize(32), "PNG"), p.quantize(32).convert("RGB")),
    "palette with alpha": lambda p: (
        saved(p.quantize(32), "PNG", transparency=bytes(range(0, 256, 8))),
        p.quantize(32).convert("RGB"),
    ),
    "1 bit": lambda p: (saved(p.convert("1"), "PNG"), p.convert("1").convert("RGB")),
    "16 bits": lambda p: (
        saved(Image.fromarray(GREY16), "PNG"),
        Image.fromarray(np.round(GREY16 / 257).astype(np.uint8)).convert("RGB"),
    ),
    "16 bits, big-endian": lambda p: (
        b"P5 96 64 65535\n" + GREY16.astype(">u2").tobytes(),
        Image.fromarray(np.round(GREY16 / 257).astype(np.uint8)).convert("RGB"),
    ),
    # what Pillow writes: an Adobe marker, and ink counted from none (255) to full (0)
    "cmyk": lambda p: (saved(p.convert("CMYK"), "JPEG", quality=100, subsampling=0), p),
    "gif with alpha": lambda p: (saved(alpha(p, "RGBA"), "GIF"), None),
    **{
        f"exif {i}": lambda p, i=i: (
            saved(p, "PNG", exif=exif(i)),
            ImageOps.exif_transpose(Image.open(io.BytesIO(saved(p, "PNG", exif=exif(i))))),
        )
        for i in range(1, 9)
    },
    "garbled exif": lambda p: (saved(p, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" * 3), p),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Palette", "ignore:Corrupt EXIF")  # pytest undoes our own filter
def test_every_kind_of_pixels_becomes_pillow_s_own_rgb(kind, photo):
    content, expected = KINDS[kind](photo)
    if expected is None:
        expected = Image.open(io.BytesIO(content)).convert("RGB")
    image = to_8_bits(open_image(io.BytesIO(content)))
    assert image.mode == "RGB"
    assert image.size == expected.size
    difference = np.abs(np.int16(image) - np.int16(expected))
    assert difference.mean() < (2 if kind == "cmyk" else 1e-9)  # JPEG's own loss
    assert np.asarray(image).std() > 20
    # pretraining's path: the same pixels, and whole crops
    pixels = RGB.decode(open_image(io.BytesIO(content)))
    assert torch.equal(pixels, TF.pil_to_tensor(image))
    width, height = image.size
    (crop,) = cut(open_image(io.BytesIO(content)), [(0, 0, height, width)], 60)
    whole = TF.pil_to_tensor(TF.resize(image, [60, 60]))
    torch.testing.assert_close(crop.int(), whole.int(), rtol=0, atol=1)


@pytest.mark.parametrize("turn", range(2, 9))
def test_shrunk_jpegs_are_turned_upright_too(turn):
    """Decoded at half their size; crops are (top, left, height, width) of the upright image."""
    photo = Image.fromarray(load_sample_images().images[0][:416])  # whole blocks at either end
    content = saved(photo, "JPEG", quality=95, exif=exif(turn))
    (crop,) = cut(open_image(io.BytesIO(content)), [(40, 60, 300, 250)], 100)
    half = Image.open(io.BytesIO(content))
    half.draft("RGB", (320, 208))
    half = ImageOps.exif_transpose(half)
    expected = TF.pil_to_tensor(TF.resized_crop(half, 20, 30, 150, 125, [100, 100]))
    torch.testing.assert_close(crop.int(), expected.int(), rtol=0, atol=1)


def finetune_transform(size: tuple[int, int], *more: str):
    flags = ["--data_path", "x", "--model", "vit_nano_patch4", "--input_size", *map(str, size)]
    return build_transform(True, finetune_parser().parse_args([*flags, *more]))


def deep_transform(size: tuple[int, int]):
    return finetune_transform(size, "--pixel_range", "0", "255")


TRANSFORMS = {
    "pretrain": TwoCrops,
    "eval": eval_transform,
    "probe": probe_transform,
    "finetune": finetune_transform,
    "finetune, deep": deep_transform,
}


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (1, 500), (500, 1), (1, 30_000)])
@pytest.mark.parametrize("wanted", [(8, 8), (4, 32), (32, 4)])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_images_of_one_pixel_are_images(transform, wanted, size):
    transform, image = TRANSFORMS[transform](wanted), Image.new("RGB", size, (9, 99, 199))
    data = SeededDataset([(image, 3)], transform, 0)
    for epoch in range(20):
        views, label, bad = data[epoch, 0]
        assert (label, bad) == (3, ("", ""))
        for view in views if isinstance(views, list) else [views]:
            assert view.shape == (3, *wanted)
            assert view.isfinite().all()


BAD = {
    "empty": lambda p: b"",
    "text": lambda p: b"no image",
    "truncated jpeg": lambda p: saved(p, "JPEG")[:600],
    "truncated png": lambda p: saved(p, "PNG")[:3000],
    "header alone": lambda p: saved(p, "JPEG")[:20],
    "no pixels": lambda p: png_header(40, 40),
    "bomb": lambda p: png_header(20_000, 20_000),
    "float": lambda p: saved(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
    "postscript": lambda p: saved(p, "EPS"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_told_from_images_without_being_decoded(kind, photo, monkeypatch):
    content = BAD[kind](photo)
    if kind in ("bomb", "postscript"):
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with pytest.raises(BadImage) as error:
        to_8_bits(open_image(io.BytesIO(content)))
    assert "\n" not in str(error.value)


def folder_of(tmp_path: Path, photo: Image.Image, count: int, bad: dict[int, bytes]) -> Path:
    """train/ with `count` PNGs of two classes, black and white, of which some are bad."""
    for i in range(count):
        path = tmp_path / "train" / ("black", "white")[i >= count // 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = 255 * (i >= count // 2)
        path.write_bytes(bad.get(i, saved(Image.new("RGB", (8, 8), (shade,) * 3), "PNG")))
    return tmp_path


def test_another_image_with_its_own_label_stands_in(tmp_path, photo):
    root = folder_of(tmp_path, photo, 10, {3: b"", 7: b"text"})
    data = SeededDataset(open_dataset(str(root), train=True), eval_transform(8), seed=0)
    means = []
    for epoch in range(20):
        image, label, (name, reason) = data[epoch, 3]
        assert Path(name).name == "003.png"
        assert reason
        assert (image.mean() > 0) == label  # white is 1
        means.append(label)
        again = SeededDataset(data.dataset, data.transform, seed=0)[epoch, 3]
        assert torch.equal(again[0], image)
    assert 0 < sum(means) < 20  # another one in another epoch
    assert data[0, 4][2] == ("", "")


def test_where_nothing_is_readable_the_file_is_named(tmp_path, photo):
    root = folder_of(tmp_path, photo, 4, dict.fromkeys(range(4), b"x"))
    data = SeededDataset(open_dataset(str(root), train=True), eval_transform(8), seed=0)
    with pytest.raises(UserError, match=r"002\.png is not a readable image \(unknown format"):
        data[0, 2]


def test_the_preview_shows_readable_images(tmp_path, photo, caplog):
    root = folder_of(tmp_path, photo, 8, {0: b""})
    assert preview_images(open_dataset(str(root), train=True), 8, eval_transform(8)).shape == (
        8,
        3,
        8,
        8,
    )
    assert caplog.text.count("000.png") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named_once_and_trained_without(workers, tmp_path, photo, capsys):
    root = folder_of(tmp_path / "data", photo, 20, {5: b""})
    flags = ["--data_path", root, *TINY, "--batch_size", 10, "--epochs", 3]
    flags += ["--num_workers", workers, "--output_dir", tmp_path / "out"]
    assert run_main(main_pretrain, *flags) == 0
    assert capsys.readouterr().out.count("005.png") == 1
    assert (tmp_path / "out/bad-images.txt").read_text().endswith("train/black/005.png\n")


@pytest.mark.parametrize("out", ["out", ""])
def test_too_many_bad_images_end_the_run(out, tmp_path, photo, capsys):
    root = folder_of(tmp_path / "data", photo, 20, {5: b"", 13: b"x"})
    out = tmp_path / out if out else ""
    flags = ["--data_path", root, *TINY, "--batch_size", 10, "--epochs", 3, "--output_dir", out]
    assert run_main(main_pretrain, *flags) == 1
    line = the_error(capsys.readouterr().err)
    assert "2 of 20 images are not readable, more than 1%: " in line
    if out:
        names = (out / "bad-images.txt").read_text().splitlines()
        assert line.endswith(f"listed in {out / 'bad-images.txt'}")
    else:
        names = line.removesuffix(", ...").rpartition(": ")[2].split(", ")
    assert sorted(Path(name).name for name in names) == ["005.png", "013.png"]


@pytest.mark.parametrize("extra", [["--knn"], ["--cache_features"], []], ids=str)
def test_too_many_bad_images_end_a_probe(extra, tmp_path, photo, capsys):
    root = folder_of(tmp_path, photo, 20, {5: b"", 13: b"x", 14: b"x"})
    flags = ["--data_path", root, "--val_fraction", 0.5, *VIT]
    flags += ["--batch_size", 5, "--epochs", 1, "--output_dir", ""]
    assert run_main(main_linprobe, *flags, *extra) == 1
    assert "of 10 images are not readable" in the_error(capsys.readouterr().err)
