"""Images of any depth and number of channels: no value is lost, and what is done is said."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from util.data import images
from util.data.images import BadImage, is_deep, open_image
from util.data.pixels import RGB, Pixels, read_array
from util.data.transforms import eval_transform
from util_contrastive import TwoCrops

tifffile = pytest.importorskip("tifffile", reason="an optional package: pip install tifffile")

VALUES = np.random.default_rng(0).integers(0, 65536, (12, 10, 12), np.uint16)  # [H, W, C]


def write(path: Path, array: np.ndarray, **kwargs) -> Path:
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, **kwargs)
    else:
        Image.fromarray(array).save(path)
    return path


def decoded(path: Path, **pixels) -> torch.Tensor:
    return Pixels(**{"scale": "dtype"} | pixels).decode(open_image(str(path)))


def expected(array: np.ndarray, low=0, high=65535) -> torch.Tensor:
    scaled = (array.astype(np.float64) - low) / (high - low) * 255
    return torch.from_numpy(scaled.clip(0, 255)).float().permute(2, 0, 1)


INTERLEAVED = {"photometric": "rgb", "planarconfig": "contig"}
PLANAR = {"photometric": "minisblack", "planarconfig": "separate"}


@pytest.mark.parametrize(
    ("name", "array", "kwargs", "chans"),
    [
        ("grey.png", VALUES[..., 0], {}, 1),
        ("grey.tif", VALUES[..., 0], {}, 1),
        ("grey.npy", VALUES[..., 0], {}, 1),
        ("rgb.tif", VALUES[..., :3], {"photometric": "rgb"}, 3),
        ("two.tif", VALUES[..., :2], {"photometric": "minisblack", "planarconfig": "contig"}, 2),
        ("four.tif", VALUES[..., :4], INTERLEAVED | {"extrasamples": ["unspecified"]}, 4),
        ("twelve.tif", np.moveaxis(VALUES, -1, 0), PLANAR, 12),
        ("last.npy", VALUES[..., :4], {}, 4),
        ("first.npy", np.moveaxis(VALUES[..., :4], -1, 0), {}, 4),
    ],
)
def test_sixteen_bits_of_any_channels_are_read_as_they_are(name, array, kwargs, chans, tmp_path):
    file = write(tmp_path / name, array, **kwargs)
    pixels = decoded(file, in_chans=chans)
    torch.testing.assert_close(pixels, expected(VALUES[..., :chans]), rtol=0, atol=2e-5)
    assert len(np.unique(pixels.numpy())) == len(np.unique(VALUES[..., :chans]))


def test_rgb_pngs_of_sixteen_bits_keep_them(tmp_path):
    """Pillow would read 8 of them, and cannot write them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rgb = VALUES[..., :3]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    header = struct.pack(">IIBBBBB", 10, 12, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    torch.testing.assert_close(decoded(tmp_path / "a.png"), expected(rgb), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_signed_and_floating_values_need_a_range(dtype, tmp_path):
    values = (VALUES[..., :1].astype(np.int32) // 20 - 1024).astype(dtype)
    file = write(tmp_path / "ct.tif", values[..., 0])
    with pytest.raises(BadImage, match=r"no known range: --pixel_range LOW HIGH, or auto"):
        decoded(file, in_chans=1)
    pixels = decoded(file, in_chans=1, scale=(-1000.0, 2000.0))
    torch.testing.assert_close(pixels, expected(values, -1000, 2000), rtol=0, atol=2e-5)


def test_pages_are_channels_if_asked_for(tmp_path):
    file = tmp_path / "stack.tif"
    with tifffile.TiffWriter(file) as writer:
        for page in range(5):
            writer.write(VALUES[..., page], photometric="minisblack")
    pixels = decoded(file, in_chans=5, pages="channels")
    torch.testing.assert_close(pixels, expected(VALUES[..., :5]), rtol=0, atol=2e-5)
    first = decoded(file, in_chans=1)
    torch.testing.assert_close(first, expected(VALUES[..., :1]), rtol=0, atol=2e-5)
    frames = [Image.fromarray((VALUES[..., i] >> 8).astype(np.uint8)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decoded(tmp_path / "a.gif", in_chans=3, pages="channels").shape == (3, 12, 10)


def test_grey_and_rgb_stand_for_each_other_and_alpha_is_left_out(tmp_path):
    rgba = (VALUES[..., :4] >> 8).astype(np.uint8)
    file = write(tmp_path / "a.png", rgba)
    assert torch.equal(decoded(file), decoded(write(tmp_path / "b.png", rgba[..., :3])))
    assert decoded(file, in_chans=4).shape[0] == 4
    grey = decoded(write(tmp_path / "c.png", rgba[..., 0]))
    assert torch.equal(grey[0], grey[2])
    luma = decoded(tmp_path / "b.png", in_chans=1)
    torch.testing.assert_close(
        luma[0].double(),
        torch.from_numpy(rgba[..., :3] @ np.array([0.299, 0.587, 0.114])),
        atol=1e-3,
        rtol=0,
    )
    assert luma.shape == (1, 12, 10)
    eight = Pixels(in_chans=1).decode(open_image(str(tmp_path / "b.png")))
    assert (eight.float() - luma).abs().max() <= 1


def test_other_channels_are_refused_with_the_flag_that_reads_them(tmp_path):
    kwargs = INTERLEAVED | {"extrasamples": ["unspecified"]}
    file = write(tmp_path / "four.tif", VALUES[..., :4], **kwargs)
    eight = write(tmp_path / "eight.tif", (VALUES[..., :4] >> 8).astype(np.uint8), **kwargs)
    for path in (file, eight):  # of the second, Pillow would drop the last
        assert is_deep(open_image(str(path)))
        with pytest.raises(BadImage, match="4 channels, not 3: --in_chans 4 reads them"):
            decoded(path)
    assert decoded(eight, in_chans=4).shape[0] == 4


@pytest.mark.parametrize("turn", range(1, 9))
def test_deep_images_are_upright_too(turn, tmp_path):
    """As Pillow turns those of 8 bits."""
    grey = Image.fromarray((VALUES[..., 0] >> 8).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = turn
    grey.save(tmp_path / "a.png", exif=exif)
    image = str(tmp_path / "a.png")
    array, _ = read_array(open_image(image))
    turned = RGB.decode(open_image(image))
    assert np.array_equal(array[..., 0], turned[0].numpy())


def test_without_tifffile_one_line_says_so(tmp_path, monkeypatch):
    file = write(tmp_path / "a.tif", np.moveaxis(VALUES, -1, 0), **PLANAR)

    def missing():
        raise BadImage("this TIFF needs a library: pip install tifffile")

    monkeypatch.setattr(images, "import_tifffile", missing)
    with pytest.raises(BadImage, match="pip install tifffile"):
        open_image(str(file))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 5)])
def test_arrays_that_are_no_images(shape, tmp_path):
    file = write(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with pytest.raises(BadImage, match="is no image"):
        decoded(file)


def test_crops_of_deep_images_are_those_of_shallow_ones(tmp_path):
    """256 grey levels, in 8 bits and in 16; the same boxes, the same colours, no rounding."""
    rgb = np.asarray(Image.effect_noise((40, 30), 80).convert("RGB").resize((40, 30)))
    shallow = write(tmp_path / "a.png", rgb)
    deep = write(tmp_path / "a.tif", rgb.astype(np.uint16) * 257, photometric="rgb")
    for level in ("ssl", "weak", "none"):
        views = []
        for file, pixels in ((shallow, RGB), (deep, Pixels(scale="dtype"))):
            torch.manual_seed(0)
            views.append(TwoCrops(16, pixels=pixels, level=level)(open_image(str(file))))
        for one, two in zip(*views, strict=True):
            assert (one - two).abs().max() < 0.1  # crops of 8 bits are rounded
    a, b = (
        eval_transform(16, pixels=p)(open_image(str(f)))
        for f, p in ((shallow, RGB), (deep, Pixels(scale="dtype")))
    )
    assert (a - b).abs().max() < 0.2


@pytest.mark.parametrize("size", [(8, 16), (16, 8), 16])
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("shape", [(40, 40, 3), (10, 90, 3), (90, 10, 3), (1, 1, 3)])
def test_evaluation_has_the_input_s_size(size, resize, shape):
    image = Image.fromarray(np.full(shape, 200, np.uint8))
    height, width = (size, size) if isinstance(size, int) else size
    assert eval_transform(size, resize=resize)(image).shape == (3, height, width)
    views = TwoCrops(size)(image) + TwoCrops(size, level="none")(image)
    assert {view.shape for view in views} == {(3, height, width)}


def test_padding_is_the_mean_and_around_the_image():
    image = Image.fromarray(np.full((16, 4, 3), 255, np.uint8))
    padded = eval_transform(16, resize="pad")(image)
    assert torch.equal(padded[:, :, :6], torch.zeros(3, 16, 6))
    assert (padded[:, :, 6:10] > 2).all()
    assert torch.equal(padded[:, :, 10:], torch.zeros(3, 16, 6))


def test_views_without_augmentation_are_twice_the_middle():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), np.uint8))
    one, two = TwoCrops(20, level="none")(image)
    assert torch.equal(one, two)
    middle = eval_transform(20, 1.0)(image.crop((20, 0, 40, 20)))
    torch.testing.assert_close(one, middle, atol=1e-5, rtol=0)


def test_weak_views_are_crops_of_the_same_colours():
    image = Image.fromarray(np.full((20, 20, 3), (10, 200, 30), np.uint8))
    for view in TwoCrops(8, level="weak")(image):
        torch.testing.assert_close(view, eval_transform(8)(image), atol=1e-5, rtol=0)


def test_flips_and_quarter_turns():
    image = Image.fromarray((np.arange(64).reshape(8, 8) * 3).astype(np.uint8)).convert("RGB")

    def seen(**kwargs) -> int:
        torch.manual_seed(0)
        views = [
            v
            for _ in range(60)
            for v in TwoCrops(8, crop_scale=(1, 1), level="none", **kwargs)(image)
        ]
        return len({view.numpy().tobytes() for view in views})

    assert seen() == seen(flip="none") == 1
    assert seen(flip="horizontal") == 2
    assert seen(flip="both") == 4
    assert seen(flip="none", rotate90=True) == 4
    assert seen(flip="both", rotate90=True) == 8
