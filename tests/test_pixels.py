"""Images of any depth and number of channels: no value is lost, and what is done is said."""

import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from util.args import pretrain_parser
from util.data import images
from util.data.images import BadImage, is_deep, open_image
from util.data.pixels import RGB, Pixels, read_array
from util.data.survey import Survey
from util.datasets import open_dataset
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


def png_of_sixteen_bits(path: Path, rgb: np.ndarray) -> None:
    """Which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    header = struct.pack(">IIBBBBB", *rgb.shape[1::-1], 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def test_rgb_pngs_of_sixteen_bits_keep_them(tmp_path):
    """Pillow would read 8 of them."""
    rgb = VALUES[..., :3] // 16
    png_of_sixteen_bits(tmp_path / "a.png", rgb)
    torch.testing.assert_close(decoded(tmp_path / "a.png"), expected(rgb), rtol=0, atol=2e-5)
    pixels = Pixels(scale=(0, 4095))
    for view in TwoCrops(12, pixels=pixels, level="none")(open_image(str(tmp_path / "a.png"))):
        assert len(view.unique()) > 256
        assert view.mean().abs() < 1
    args = pretrain_parser().parse_args(["--data_path", "x"])
    words = Survey(open_dataset(str(tmp_path), train=True), args).words("train")
    assert f"RGB uint16, 10 x 12 pixels, values {rgb.min()} to {rgb.max()}" in words


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
    monkeypatch.setitem(sys.modules, "tifffile", None)  # its import fails
    with pytest.raises(BadImage, match="pip install tifffile"):
        open_image(str(file))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(5, np.uint8),
        np.zeros((2, 3, 4, 5)),
        np.zeros((0, 4, 3)),
        np.array([["a"]]),
        np.array([[{}]], dtype=object),
        b"",
        b"no array",
    ],
)
def test_arrays_that_are_no_images(array, tmp_path):
    if isinstance(array, bytes):
        (tmp_path / "a.npy").write_bytes(array)
    else:
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(BadImage):
        open_image(str(tmp_path / "a.npy"))


@pytest.mark.parametrize(
    ("shape", "size", "chans"),
    [
        ((16, 16, 200), (16, 16), 200),
        ((12, 300, 10), (300, 12), 10),
        ((4, 9, 8), (8, 9), 4),
        ((8, 9, 4), (9, 8), 4),
        ((9, 8), (8, 9), 1),
        ((1, 9, 8), (8, 9), 1),
    ],
)
def test_an_array_s_channels_are_last_or_its_shortest_side(shape, size, chans, tmp_path):
    image = open_image(str(write(tmp_path / "a.npy", np.zeros(shape, np.uint8))))
    assert image.size == size
    assert Pixels(chans, scale="dtype").decode(image).shape == (chans, *size[::-1])


def test_rgb_arrays_are_grey_for_one_channel(tmp_path):
    file = write(tmp_path / "a.npy", np.full((9, 8, 3), 100, np.uint8))
    assert (
        decoded(file, in_chans=1).eq(100).all()
        or decoded(file, in_chans=1).sub(100).abs().max() < 1e-3
    )


def test_signs_and_inverted_greys_of_tiffs(tmp_path):
    signed = write(tmp_path / "a.tif", np.int8([[-1, 1], [5, -100]]))
    assert decoded(signed, in_chans=1, scale=(-100, 155)).flatten().tolist() == [99, 101, 105, 0]
    white = write(tmp_path / "b.tif", VALUES[..., 0], photometric="miniswhite", compression=None)
    first = decoded(white, in_chans=1)
    stack = decoded(white, in_chans=1, pages="channels")
    torch.testing.assert_close(stack, expected(65535 - VALUES[..., :1]), rtol=0, atol=2e-5)
    assert torch.equal(first, stack)


def test_one_bit_is_black_or_white_on_any_scale(tmp_path):
    Image.fromarray(np.eye(8, dtype=bool)).save(tmp_path / "a.png")
    for scale in ("dtype", (0, 4095)):
        assert decoded(tmp_path / "a.png", in_chans=1, scale=scale).unique().tolist() == [0, 255]


def test_colours_of_sixteen_bits_that_nobody_keeps_are_refused(tmp_path):
    header = b"P6 4 4 65535\n"
    (tmp_path / "a.ppm").write_bytes(header + VALUES[:4, :4, :3].tobytes())
    with pytest.raises(BadImage, match="16 bits of each colour are not read"):
        decoded(tmp_path / "a.ppm")


@pytest.mark.parametrize(
    ("suffix", "name", "place", "byte"),
    [(".avif", b"av1C", 6, 0x40), (".jp2", b"ihdr", 14, 15), (".j2k", b"\xff\x51", 40, 15)],
)
def test_bits_that_pillow_drops_are_told(suffix, name, place, byte, tmp_path, caplog):
    """By the header: nothing here writes such files."""
    file = tmp_path / f"a{suffix}"
    Image.fromarray((VALUES[..., :3] >> 8).astype(np.uint8)).save(file)
    assert not images.loses_bits(SimpleNamespace(filename=str(file)))
    content = bytearray(file.read_bytes())
    content[content.find(name) + place] |= byte
    file.with_stem("b").write_bytes(content)
    assert images.loses_bits(SimpleNamespace(filename=str(file.with_stem("b"))))
    args = pretrain_parser().parse_args(["--data_path", "x"])
    Survey([(open_image(str(file)), 0)], args).warn()
    assert "more bits" not in caplog.text
    survey = Survey([], args)
    survey.lossy = 1
    survey.warn()
    assert "warning: 1 images have more bits than the 8 that are read" in caplog.text


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_tiffs_are_upright_however_they_are_read(turn, tmp_path):
    for name, chans, kind in (("a", 3, "rgb"), ("b", 5, "minisblack"), ("c", 1, "minisblack")):
        values = (VALUES[..., :chans] >> 8).astype(np.uint8)
        extra = [(274, "H", 1, turn, True)]
        kwargs = {"photometric": kind, "extratags": extra}
        kwargs |= {"planarconfig": "contig"} if chans > 1 else {}
        array = values if chans > 1 else values[..., 0]
        file = str(write(tmp_path / f"{name}.tif", array, **kwargs))
        upright = {1: values, 3: np.rot90(values, 2), 6: np.rot90(values, -1), 8: np.rot90(values)}
        if chans < 5:
            eight = Pixels(chans).decode(open_image(file)).permute(1, 2, 0)
            assert np.array_equal(eight.numpy(), upright[turn])
        found = Pixels(chans, scale="dtype").decode(open_image(file))
        assert np.array_equal(found.permute(1, 2, 0).numpy(), upright[turn])
        assert images.upright_size(open_image(file)) == upright[turn].shape[1::-1]
    deep = write(tmp_path / "d.tif", VALUES[..., 0], extratags=extra)
    upright = {1: VALUES, 3: np.rot90(VALUES, 2), 6: np.rot90(VALUES, -1), 8: np.rot90(VALUES)}
    wanted = expected(upright[turn][..., :1].copy())
    torch.testing.assert_close(decoded(deep, in_chans=1), wanted, rtol=0, atol=2e-5)


# Each sample of an image of its own value; upright, by EXIF's orientation.
UPRIGHT = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a[:, ::-1].swapaxes(0, 1),
}  # fmt: skip


@pytest.mark.parametrize("turn", UPRIGHT)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float32"])
@pytest.mark.parametrize("chans", [1, 3, 4, 5])
def test_tiffs_of_any_kind_are_upright_in_folders_and_archives(chans, dtype, turn, tmp_path):
    values = (VALUES[..., :chans] >> (8 if dtype == "uint8" else 1)).astype(dtype)
    kwargs = {"photometric": "rgb" if chans in (3, 4) else "minisblack"}
    kwargs |= {"planarconfig": "contig"} if chans > 1 else {}
    file = tmp_path / "a.tif"
    array = values if chans > 1 else values[..., 0]
    write(file, array, extratags=[(274, "H", 1, turn, True)], **kwargs)
    for source in (str(file), BytesIO(file.read_bytes())):
        image = open_image(source, "a.tif")
        size = images.upright_size(image)
        found, _ = read_array(image)
        assert np.array_equal(found, UPRIGHT[turn](values))
        assert size == found.shape[1::-1]
