"""How well noise could be predicted: by the best linear map of each patch alone; prints JSON.

    python benchmarks/study/noise.py --data_path IMAGES > benchmarks/study/logs/noise.json

Patches of augmented images have a covariance with eigenvalues v. Of white noise of deviation s on
them, the best linear predictor (Wiener's) leaves the share mean(v / (v + s^2)) of its variance,
which it cannot tell from the image. A network that also sees other patches can do better.

- `raw`: what is left of sigma e, mean over sigma ~ U(0, std), by the zero predictor's loss.
- `unit`: the same of e, whose zero predictor has loss 1.
"""

import argparse
import itertools
import json

import torch
from analysis import batches
from study import SIDE
from torch import Tensor

from model_mae import mae_vit_nano_patch4
from util.data.order import SeededDataset
from util.datasets import open_dataset
from util.misc import seed_all
from util.run.launch import launch
from util_contrastive import TwoCrops

BATCHES = 8  # of images, two views each
STDS = (0.05, 0.1, 0.25)
LEVELS = torch.arange(1, 1001, dtype=torch.float64) / 1000  # of noise, as shares of the largest


def shares_left(variances: Tensor, std: float) -> tuple[float, float]:
    """`raw` and `unit`, for patches whose covariance has these eigenvalues."""
    power = (std * LEVELS) ** 2
    left = (variances / (variances + power[:, None])).mean(dim=1)
    return ((left * power).sum() / power.sum()).item(), left.mean().item()


def main(args: argparse.Namespace) -> None:
    seed_all(0)
    images = SeededDataset(
        open_dataset(args.data_path, train=True), TwoCrops(SIDE, blur_prob=0.0), seed=0
    )
    views = [torch.cat(views) for views, *_ in itertools.islice(batches(images), BATCHES)]
    patches = mae_vit_nano_patch4(img_size=SIDE).patchify(torch.cat(views)).flatten(0, 1)
    variances = torch.linalg.eigvalsh(torch.cov(patches.T.double()))
    found = {"eigenvalues": {"smallest": variances[0].item(), "largest": variances[-1].item()}}
    for std in STDS:
        raw, unit = shares_left(variances, std)
        found[f"std {std}"] = {"raw": round(raw, 3), "unit": round(unit, 3)}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="a folder with train/ and val/")
    launch(main, parser.parse_args())
