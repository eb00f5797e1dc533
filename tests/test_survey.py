"""What is measured and told of images before a run."""

import re
import tracemalloc
from argparse import Namespace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shards
from PIL import Image
from test_pixels import INTERLEAVED, write
from torch.utils.data import Dataset

from util.args import finetune_parser, linprobe_parser, pretrain_parser
from util.data.images import open_image
from util.data.survey import PIXEL_FLAGS, _some, _words, inherit_pixels, settle_pixels
from util.datasets import open_dataset
from util.errors import UserError

RNG = np.random.default_rng(0)


def settled(folder: Path, **flags):
    """A run's flags once they are resolved, and what it says of its images."""
    args = pretrain_parser().parse_args(["--data_path", "x"])
    vars(args).update(flags)
    words = settle_pixels(args, train=open_dataset(str(folder), train=True))
    return args, words["train"]


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize(("colours", "dtype"), [(3, "uint16"), (3, "uint8"), (1, "uint8")])
def test_alpha_that_is_dropped_is_not_measured(colours, dtype, chans, tmp_path):
    """A sixteenth of the type's values is used; alpha is opaque, the largest of them."""
    most = np.iinfo(dtype).max
    array = RNG.integers(0, most // 16 + 1, (64, 64, colours + 1), dtype)
    array[0, 0, 0], array[0, 1, 0], array[..., -1] = 0, most // 16, most
    if dtype == "uint8":
        write(tmp_path / "a.png", array)
    else:
        write(tmp_path / "a.tif", array, extrasamples=["unassalpha"], **INTERLEAVED)
    args, words = settled(tmp_path, in_chans=chans, pixel_range="auto")
    assert args.pixel_range == pytest.approx(np.percentile(array[..., :-1], (0.1, 99.9)))
    assert f"values 0 to {most // 16}" in words
    args, words = settled(tmp_path, in_chans=colours + 1, pixel_range="auto")
    assert args.pixel_range[1] == most
    assert f"values 0 to {most}" in words


def stack(path: Path, side: int = 32) -> bytes:
    """A file of five pages or frames."""
    first, *others = (Image.fromarray(p) for p in RNG.integers(0, 256, (5, side, side), np.uint8))
    first.save(path, save_all=True, append_images=others)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".tif", ".gif"])
def test_files_cut_off_after_the_first_page(suffix, tmp_path, caplog):
    """Wherever they are. Training reads the first; all pages of a good file alone."""
    content = stack(tmp_path / f"a{suffix}")
    for share in np.linspace(0.35, 0.95, 25):
        (tmp_path / f"b{suffix}").write_bytes(content[: int(share * len(content))])
        _, words = settled(tmp_path)
        assert re.search("all looked at: (grey|RGB) uint8, 32 x 32 pixels, values 0 to 255$", words)
        assert "warning: 2 of 2 images have several frames or pages" in caplog.text
        caplog.clear()
        assert "2 images" in settled(tmp_path, pages="channels", in_chans=5)[1]


@pytest.mark.parametrize("suffix", [".tif", ".gif"])
def test_large_files_cut_off_after_the_first_page_are_written_as_they_are(suffix, tmp_path):
    content = stack(tmp_path / f"a{suffix}")
    (tmp_path / f"a{suffix}").write_bytes(content[: int(len(content) * 0.5)])
    out = write_shards(tmp_path, tmp_path / "out", "--max_side", 16)
    kept, _ = open_dataset(str(out), train=True).content(0)
    assert kept.getvalue() == (tmp_path / f"a{suffix}").read_bytes()


def measured(shape: tuple[int, int], chans: int) -> tuple[Namespace, np.ndarray, int]:
    """Flags settled for 40 images, the first of those, and how much memory it took."""
    array = (RNG.random((*shape, chans)) * 4095).astype(np.float32)

    class Images(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            buffer = BytesIO()
            np.save(buffer, array + np.float32(index))
            return open_image(buffer, "a.npy"), 0

    args = pretrain_parser().parse_args(["--data_path", "x"])
    args.in_chans, args.pixel_range = chans, "auto"
    args.pixel_mean = args.pixel_std = "auto"
    tracemalloc.start()
    try:
        settle_pixels(args, train=Images())
        return args, array, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("shape", "chans"), [((210, 100), 200), ((1024, 1024), 1), ((256, 256), 24)], ids=str
)
def test_what_is_measured_fits_memory(shape, chans):
    """Of a thousand images; those are not kept whole, however many channels they have."""
    args, array, peak = measured(shape, chans)
    values = np.concatenate([array.ravel() + i for i in range(0, 40, 4)])
    assert args.pixel_range == pytest.approx(np.percentile(values, (0.1, 99.9)), abs=25)
    low, high = args.pixel_range
    channel = (np.stack([array[..., 0] + i for i in range(40)]) - low) / (high - low)
    assert args.pixel_mean[0] == pytest.approx(channel.mean(), abs=0.02)
    assert args.pixel_std[0] == pytest.approx(channel.std(), abs=0.02)
    taken = 40 * 3 * 8192  # values: of three channels, or as many of more
    assert peak < 4 * 8 * taken + 8 * array.nbytes


def test_grey_and_rgb_are_measured_at_the_same_pixels():
    """Whatever is done for many channels: at each n-th."""
    for count, chans in ((100, 3), (5000, 1), (8191, 3), (50_000, 3), (10**6, 1)):
        rows = RNG.random((count, chans))
        assert np.array_equal(_some(rows), rows[:: max(1, count // 4096)])


# A flag; what it is here; what a checkpoint has; whether that means something else.
GIVEN = [
    ("pixel_range", [0.0, 4095.0], None, True),
    ("pixel_range", [0.0, 4095.0], "dtype", True),
    ("pixel_range", [0.0, 4095.0], [0.0, 255.0], True),
    ("pixel_range", [0.0, 255.0], "dtype", True),
    ("pixel_range", [0.0, 255.0], None, False),  # whose images have 8 bits
    ("pixel_range", "dtype", None, False),
    ("pixel_range", "dtype", "dtype", False),
    ("pixel_range", "dtype", [0.0, 4095.0], True),
    ("pixel_range", "auto", None, True),
    ("pixel_range", "auto", "dtype", True),
    ("pages", "channels", None, True),
    ("pages", "first", None, False),
    ("in_chans", 1, None, True),
    ("in_chans", 3, None, False),
    ("pixel_mean", [0.5], [0.4], True),
]


@pytest.mark.parametrize(("name", "ours", "theirs", "differs"), GIVEN)
@pytest.mark.parametrize("strict", [True, False])
def test_flags_that_mean_something_else_are_said(name, ours, theirs, differs, strict, caplog):
    flags = dict.fromkeys(PIXEL_FLAGS) | {name: theirs}
    args = Namespace(**dict.fromkeys(PIXEL_FLAGS) | {name: ours}, resize=None)
    words = f"--{name} is {_words(ours)}, but "
    if differs and strict:
        with pytest.raises(UserError, match=f"{words}.* in x.pth"):
            inherit_pixels(args, flags, "x.pth", strict)
    else:
        inherit_pixels(args, flags, "x.pth", strict)
        assert (f"warning: {words}" in caplog.text) == differs
    assert getattr(args, name) == ours
    caplog.clear()
    for unknown in ({}, {"epochs": 3}):  # no checkpoint, or somebody else's
        inherit_pixels(args, unknown, "x.pth", strict)
    for left_open in PIXEL_FLAGS:
        setattr(args, left_open, None)
    inherit_pixels(args, flags, "x.pth", strict)
    assert not caplog.text


@pytest.mark.parametrize(
    ("ours", "theirs", "taken"),
    [("pad", "crop", "pad"), ("pad", "pad", "pad"), (None, "pad", "pad"), ("pad", None, "pad")],
)
def test_another_resize_is_said(ours, theirs, taken, caplog):
    args = Namespace(**dict.fromkeys(PIXEL_FLAGS), resize=ours)
    inherit_pixels(args, {"resize": theirs}, "x.pth", strict=True)
    assert args.resize == taken
    said = "warning: --resize is pad, but crop in x.pth" in caplog.text
    assert said == (theirs == "crop")


TURNED = {"augment": "ssl", "flip": "both", "rotate90": True}


@pytest.mark.parametrize(
    ("parser", "words", "theirs", "flip", "rotate90"),
    [
        (finetune_parser, "", {}, None, None),  # from scratch
        (finetune_parser, "", {"seed": 0}, None, False),  # older than the flags
        (finetune_parser, "", TURNED, "both", True),
        (finetune_parser, "--flip horizontal --no_rotate90", TURNED, "horizontal", False),
        (finetune_parser, "", {"augment": "none", "flip": None}, "none", False),
        (pretrain_parser, "", {"augment": "none", "flip": None}, "none", False),
        (pretrain_parser, "--augment none", TURNED, None, False),
        (pretrain_parser, "--augment none --rotate90", TURNED, None, True),
        (pretrain_parser, "--augment none", TURNED | {"augment": "none"}, "both", True),
        (pretrain_parser, "--augment none", {"augment": "none", "flip": None}, None, False),
    ],
)
def test_flips_are_the_checkpoint_s_unless_given(parser, words, theirs, flip, rotate90):
    args = parser().parse_args(["--data_path", "x", *words.split()])
    inherit_pixels(args, theirs, "a.pth")
    assert (args.flip, args.rotate90) == (flip, rotate90)


def test_flips_are_said_where_images_are_flipped(caplog):
    caplog.set_level("INFO")
    for words in ("--knn", "--cache_features", "--eval --resume a.pth"):
        args = linprobe_parser().parse_args(["--data_path", "x", *words.split()])
        inherit_pixels(args, TURNED, "a.pth")
        assert not caplog.records
    inherit_pixels(linprobe_parser().parse_args(["--data_path", "x"]), TURNED, "a.pth")
    assert caplog.messages == ["--flip both, as a.pth has it", "--rotate90, as a.pth has it"]
