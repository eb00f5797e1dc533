"""Images per second and core of the input pipeline, against torchvision's transforms of PIL images.

    python benchmarks/loader.py
    python benchmarks/loader.py --profile

One loader process on one core, from files in memory; processor time, medians. `--profile` shows the
milliseconds of each stage instead. Where kornia is installed, it is measured, too.
"""

import argparse
import functools
import io
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from common import SECONDS, describe_machine, measure, table
from PIL import Image, ImageFile
from sklearn.datasets import load_sample_images
from torch.utils.data import default_collate

import util.data.augment
import util_contrastive
from util.data.order import SeededDataset
from util.data.pixels import IMAGENET_MEAN, IMAGENET_STD, RGB, Pixels
from util.data.transforms import CROP_ASPECT
from util_contrastive import (
    BLUR_PROB,
    BLUR_SIGMA,
    CROP_SCALE,
    FLIP_P,
    GREY_P,
    JITTER_P,
    GaussianBlur,
    TwoCrops,
    TwoCropTransform,
    color_jitter,
)

# Width, height, JPEG quality: the first as ImageNet's images are on average, of about 110 KB; the
# last small, as CIFAR's.
FILES = [(500, 375, 94), (1600, 1200, 75), (32, 32, 94)]
IMAGES = 16  # different crops and parameters, averaged in each measurement
CPU = torch.device("cpu")
VIEW = 224  # pixels, or a smaller file's own
ROUNDS = 10 if SECONDS else 1  # of a profile

RECIPE, KORNIA, CROPS, ALL, DECODE = (
    "torchvision's recipe",
    "kornia",
    "crops only",
    "all on the CPU",
    "decode only",
)

# What does a stage's work, here and in the recipe. What they call counts for its own stage.
STAGES = {
    "decode": [(ImageFile.ImageFile, "load"), (Pixels, "decode")],
    "crop, resize": [(util_contrastive, "cut"), (T.RandomResizedCrop, "forward")],
    "draws": [(util_contrastive, "draw_parameters"), (T.RandomResizedCrop, "get_params")],
    "jitter, grey": [
        (util.data.augment, "blend"),
        (util.data.augment, "shift_hue"),
        (T.ColorJitter, "forward"),
        (T.RandomGrayscale, "forward"),
    ],
    "blur": [(util.data.augment, "blur"), (GaussianBlur, "__call__")],
    "normalise": [
        (util_contrastive, "augment"),
        (T.ToTensor, "__call__"),
        (T.Normalize, "forward"),
    ],
    "the rest": [],  # opening, seeding, flips, batches
}


def photo(width: int, height: int, quality: int) -> bytes:
    """A JPEG of a real photograph; grain makes up for the detail that magnifying does not add."""
    image = Image.fromarray(load_sample_images().images[0]).resize((width, height))
    grain = np.random.default_rng(0).normal(0, 8, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=quality
    )
    return buffer.getvalue()


class Files:
    """One image file, again and again, not decoded yet."""

    def __init__(self, encoded: bytes):
        self.encoded = encoded

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.encoded)), 0


def pil_transform(size: int) -> TwoCropTransform:
    """The recipe as torchvision's transforms; `TwoCrops` draws from the same distribution."""
    return TwoCropTransform(
        T.Compose(
            [
                RGB.load,
                T.RandomResizedCrop(size, scale=CROP_SCALE, ratio=CROP_ASPECT),
                T.RandomHorizontalFlip(FLIP_P),
                T.RandomApply([color_jitter()], p=JITTER_P),
                T.RandomGrayscale(p=GREY_P),
                T.RandomApply([GaussianBlur()], p=BLUR_PROB),
                T.ToTensor(),
                T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
    )


def kornia_transform(size: int) -> Callable[[Image.Image], list[torch.Tensor]]:
    """The recipe in kornia's words, which takes tensors."""
    import kornia.augmentation as K

    augment = K.AugmentationSequential(
        K.RandomResizedCrop((size, size), scale=CROP_SCALE, ratio=CROP_ASPECT),
        K.RandomHorizontalFlip(),
        K.ColorJiggle(0.4, 0.4, 0.4, 0.1, p=JITTER_P),
        K.RandomGrayscale(p=GREY_P),
        K.RandomGaussianBlur((13, 13), BLUR_SIGMA, p=BLUR_PROB),
        K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)),
    )
    return lambda image: [augment(TF.to_tensor(RGB.load(image))[None])[0] for _ in range(2)]


def pipelines(size: int) -> dict[str, tuple[Callable, Callable]]:
    """From a file's image to a sample, and from a batch of samples to views of `size` pixels."""

    def as_is(batch: Any, device: torch.device) -> Any:
        return batch

    found = {RECIPE: (pil_transform(size), as_is)}
    if find_spec("kornia"):
        found[KORNIA] = kornia_transform(size), as_is
    ours = TwoCrops(size, defer=True)
    decoding = (lambda image: RGB.load(image) and 0), as_is
    return found | {CROPS: (ours, as_is), ALL: (ours, ours.finish), DECODE: decoding}


def batches(files: Files, size: int) -> dict[str, Callable[[], None]]:
    """What makes one batch, by pipeline."""

    def batch(data: SeededDataset, finish: Callable) -> None:
        inputs, *_ = default_collate([data[0, i] for i in range(IMAGES)])
        finish(inputs, CPU)

    return {
        name: functools.partial(batch, SeededDataset(files, transform, seed=0), finish)
        for name, (transform, finish) in pipelines(size).items()
    }


@contextmanager
def stopwatches() -> Iterator[Counter]:
    """Seconds of processor time by stage, while it lasts."""
    seconds, now, running = Counter(), time.process_time(), ["the rest"]

    def switch(to: Callable[[], Any]) -> None:
        nonlocal now
        seconds[running[-1]] += time.process_time() - now
        to()
        now = time.process_time()

    def timed(stage: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            switch(lambda: running.append(stage))
            try:
                return function(*args, **kwargs)
            finally:
                switch(running.pop)

        return call

    with ExitStack() as patches:
        for stage, functions in STAGES.items():
            for owner, name in functions:
                call = timed(stage, getattr(owner, name))
                if isinstance(vars(owner)[name], staticmethod):
                    call = staticmethod(call)
                patches.enter_context(mock.patch.object(owner, name, call))
        yield seconds
        switch(lambda: None)


def profile(name: str, runs: dict[str, Callable[[], None]]) -> list[list[str]]:
    rows = []
    for pipeline in (RECIPE, ALL):
        runs[pipeline]()  # to warm up
        with stopwatches() as seconds:
            for _ in range(ROUNDS):
                runs[pipeline]()
        each = [1e3 * seconds[stage] / (ROUNDS * IMAGES) for stage in STAGES]
        rows.append([name, pipeline, *(f"{ms:.2f}" for ms in (*each, sum(each)))])
        name = ""
    return rows


def compare(name: str, runs: dict[str, Callable[[], None]]) -> list[list[str]]:
    rates = {k: IMAGES / s for k, s in measure(runs, CPU).items()}
    rows = []
    for pipeline, rate in rates.items():
        ratios = [f"{rate / rates[RECIPE]:.2f}", f"{rate / rates[DECODE]:.0%}"]
        rows.append([name, pipeline, f"{rate:.0f}", *ratios])
        name = ""
    return rows


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print(describe_machine(CPU))
    rows = []
    for width, height, quality in FILES:
        files = Files(photo(width, height, quality))
        name = f"{width} x {height}, {len(files.encoded) / 1e3:.0f} KB"
        show = profile if options.profile else compare
        rows += show(name, batches(files, min(VIEW, width)))
    columns = [*STAGES, "ms"] if options.profile else ["images/s", "of the recipe", "of decoding"]
    table(["file", "pipeline", *columns], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="milliseconds of each stage")
    main(parser.parse_args())
