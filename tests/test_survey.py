"""What is measured and told of images before a run."""

from pathlib import Path

import numpy as np
import pytest
from test_pixels import INTERLEAVED, write

from util.args import pretrain_parser
from util.data.survey import settle_pixels
from util.datasets import open_dataset

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
