"""Images per second and core of the input pipeline, against torchvision's transforms of PIL images.

    python benchmarks/loader.py

One loader process on one core, from files in memory; processor time, medians.
"""

import io

import numpy as np
import torch
from common import describe_machine, measure, table
from PIL import Image
from sklearn.datasets import load_sample_images

from util.datasets import SeededDataset
from util_contrastive import TwoCrops, pil_transform

SIZE = 224  # pixels, of a view
# Width, height, JPEG quality: the first as ImageNet's images are on average, of about 110 KB.
FILES = [(500, 375, 94), (1600, 1200, 75)]
IMAGES = 16  # different crops and parameters, averaged in each measurement


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


def main() -> None:
    torch.set_num_threads(1)
    print(describe_machine(torch.device("cpu")))
    rows = []
    for width, height, quality in FILES:
        files = Files(photo(width, height, quality))
        pipelines = {
            "torchvision's recipe": pil_transform(SIZE),
            "crops only": TwoCrops(SIZE, defer=True),
            "all on the CPU": TwoCrops(SIZE),
            "decode only": lambda image: None,  # `read_image` decodes for it
        }
        runs = {}
        for name, transform in pipelines.items():
            data = SeededDataset(files, transform, seed=0)
            runs[name] = lambda data=data: [data[0, i] for i in range(IMAGES)]
        rates = {k: IMAGES / s for k, s in measure(runs, torch.device("cpu")).items()}
        recipe, decode = rates["torchvision's recipe"], rates["decode only"]
        name = f"{width} x {height}, {len(files.encoded) / 1e3:.0f} KB"
        for pipeline, rate in rates.items():
            ratios = [f"{rate / recipe:.2f}", f"{rate / decode:.0%}"]
            rows.append([name, pipeline, f"{rate:.0f}", *ratios])
            name = ""
    table(["file", "pipeline", "images/s", "of the recipe", "of decoding"], rows)


if __name__ == "__main__":
    main()
