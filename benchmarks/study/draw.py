"""Figures of `study.py`'s logs, in benchmarks/study/figures/.

python -m pip install matplotlib
python benchmarks/study/draw.py
python benchmarks/study/draw.py --work_dir study    # and pictures of what models do
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import paths
import torch
from flops import forward_flops
from folders import data_folder
from sklearn.manifold import TSNE
from study import SIDE
from sweeps import ABLATIONS, METHODS, SCALE
from tables import (
    TERMS,
    Cost,
    Logs,
    accuracies,
    get_args_parser,
    is_trained,
    mean,
    processor_hours,
    read,
    read_cost,
    seed_deviations,
)

from model_mae import MaskedAutoencoderViT, model_from_checkpoint
from util.args import number
from util.data.transforms import eval_transform
from util.datasets import open_dataset
from util.run.checkpoint import LAST, load
from util.visualize import preview_images, reconstruction_grid

FIGURES = paths.STUDY / "figures"
NAMES = {"can": "CAN", "mae": "MAE", "simclr": "SimCLR"}
LEVELS = (0.0, 0.5, 1.0)  # of the noise, as shares of the largest
ROWS = ("clean", "masked", "reconstructed")  # of `reconstruction_grid`
FEATURE_IMAGES = 1000


def forward_total(record: dict) -> float:
    """Forward FLOPs of the whole pretraining."""
    objective = NAMES[record["name"].split("-")[0]]
    flops = forward_flops(f"mae_vit_{record['size']}", objective, SIDE)
    return flops * record["epochs"] * record["images"]


def draw_accuracies(logs: Logs) -> None:
    """Probe accuracy by method, error bars over seeds; and against forward FLOPs."""
    supervised = mean(accuracies(logs["supervised"])["fine-tuned"])[0]
    logs = {name: records for name, records in logs.items() if "probe" in records[0]}
    figure, (methods, cost) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2))
    for column, marker in (("probe cls-100", "s"), ("probe pooled-100", "o"), ("kNN pooled", "^")):
        centres, errors = zip(*(mean(accuracies(r)[column]) for r in logs.values()), strict=True)
        label = column.removesuffix("-100")
        methods.errorbar(range(len(logs)), centres, errors, fmt=marker, capsize=4, label=label)
    methods.set_xticks(range(len(logs)), [n.replace("-", "\n") for n in logs], fontsize=7)
    methods.axhline(supervised, color="grey", ls=":", label="supervised from scratch")
    methods.set_ylabel("top-1 (%)")
    methods.grid(axis="y", alpha=0.3)
    methods.legend(fontsize=8)
    for name, records in logs.items():
        if name != "random":
            centre, error = mean(accuracies(records)["probe pooled-100"])
            total = forward_total(records[0]) / 1e12
            color, marker, _ = style(name)
            cost.errorbar(total, centre, error, fmt=marker, color=color, capsize=4, label=name)
    cost.set_xlabel("forward FLOPs of pretraining ($10^{12}$)")
    cost.set_ylabel("linear probe on pooled features, top-1 (%)")
    cost.grid(alpha=0.3)
    cost.legend(fontsize=7, loc="lower right")
    save(figure, "accuracy.png")


def draw_scale(logs: Logs, cost: Cost, deviations: dict[str, float]) -> None:
    """Accuracy of a linear probe and of kNN against the processor time of pretraining.

    Args:
        deviations: between seeds, of the first study's runs: few of these have several.
    """
    logs = {name: records for name, records in logs.items() if "training" in records[0]}
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8))
    panels = (  # title, readout, and the first study's like it
        ("linear probe", "probe chosen-100", "probe pooled-100"),
        ("kNN on pooled features", "kNN pooled", "kNN pooled"),
    )
    for axis, (title, readout, first) in zip(axes, panels, strict=True):
        for i, (name, records) in enumerate(logs.items()):
            if not (values := accuracies(records).get(readout)):
                continue
            hours, error = processor_hours(records[0], cost), deviations[first] / len(values) ** 0.5
            label = f"{name}, {records[0]['epochs']} epochs"
            marker = {"s": "s", "c": "o", "m": "^"}[name[0]] + f"C{i}"  # SimCLR, CAN, MAE
            axis.errorbar(hours, np.mean(values), error, fmt=marker, capsize=4, label=label)
        axis.set_title(title)
        axis.set_xlabel("processor hours of pretraining")
        axis.set_ylabel("top-1 (%), with its error by seeds")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, "scale.png")


def style(name: str) -> tuple[str, str, str]:
    """Colour, marker and line: one colour for each method, also where it trained to equal FLOPs."""
    names = [run.name for run in METHODS if run.flops is None]
    method = name.removesuffix("-equal-flops")
    return (f"C{names.index(method)}", *(("o", "-") if method == name else ("D", "--")))


def draw_losses(logs: Logs) -> None:
    """Mean over seeds of each term's loss by epoch, where it is trained."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, term in zip(axes, TERMS, strict=True):
        for name, records in logs.items():
            curves = [[e.get(f"train_{term}") for e in r.get("training", [])] for r in records]
            if any(curves) and curves[0][0] is not None and is_trained(term, records):
                color, _, line = style(name)
                epochs = range(1, len(curves[0]) + 1)
                axis.plot(epochs, np.mean(curves, 0), color=color, ls=line, label=name)
        axis.set_title(term)
        axis.set_xlabel("epoch")
        if term == "noise":
            axis.axhline(0.05**2 / 3, color="grey", ls=":", label="predicting zero")
        if term != "contrastive":
            axis.set_yscale("log")
        axis.legend(fontsize=7)
    save(figure, "losses.png")


def save(figure: plt.Figure, name: str, bottom: float = 0) -> None:
    """Writes a figure, with a share of its height left free at the bottom."""
    FIGURES.mkdir(exist_ok=True)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(FIGURES / name, dpi=100, bbox_inches="tight")
    plt.close(figure)


def draw_reconstructions(checkpoint: Path, data: Path) -> None:
    """Clean, masked, reconstructed rows at each of `LEVELS`, from no noise to the most."""
    state = load(checkpoint)
    model = model_from_checkpoint(state, checkpoint)
    imgs = preview_images(open_dataset(str(data), train=False), 8, eval_transform(SIDE))
    grids = []
    for level in LEVELS:

        def add_noise(imgs: torch.Tensor, level: float = level) -> tuple:
            noise = model.std * level * torch.randn_like(imgs)
            return imgs + noise, noise, imgs.new_full((len(imgs),), level)

        model.add_noise = add_noise
        grids.append(reconstruction_grid(model, imgs, state["args"]["mask_ratio"]))
    figure, axes = plt.subplots(len(grids), 1, figsize=(6, 2.4 * len(grids)))
    for axis, grid, level in zip(axes, grids, LEVELS, strict=True):
        axis.imshow(grid)
        axis.set_title(f"noise of deviation {level * model.std:g}", fontsize=9)
        height = grid.height / 3
        axis.set_yticks([height / 2 + height * i for i in range(3)], ROWS, fontsize=8)
        axis.set_xticks([])
    save(figure, "reconstructions.png")


def draw_features(checkpoints: dict[str, Path], data: Path) -> None:
    """t-SNE of pooled features of test images, coloured by class, a panel for each model."""
    images = open_dataset(str(data), train=False)
    count = min(FEATURE_IMAGES, len(images))
    chosen = np.linspace(0, len(images) - 1, count).astype(int)
    labels = np.array(images.targets)[chosen]
    imgs = preview_images(images, count, eval_transform(SIDE))
    figure, axes = plt.subplots(1, len(checkpoints), figsize=(4 * len(checkpoints), 4))
    for axis, (name, path) in zip(axes, checkpoints.items(), strict=True):
        with torch.no_grad():
            latent = _model(path).forward_encoder(imgs, mask_ratio=0.0)[0]
        places = TSNE(random_state=0).fit_transform(latent[:, 1:].mean(dim=1).numpy())
        points = axis.scatter(*places.T, c=labels, cmap="tab10", s=4)
        axis.set_title(name)
        axis.set_xticks([])
        axis.set_yticks([])
    handles, _ = points.legend_elements()
    figure.legend(handles, images.classes, loc="lower center", ncols=len(handles), fontsize=8)
    save(figure, "features.png", bottom=0.08)


def _model(checkpoint: Path) -> MaskedAutoencoderViT:
    return model_from_checkpoint(load(checkpoint), checkpoint).eval()


def main(args: argparse.Namespace) -> None:
    methods = read(args.log_dir / "methods", METHODS)
    draw_accuracies(methods)
    draw_losses(methods)
    scale, cost = read(args.log_dir / "scale", SCALE), read_cost(args.log_dir)
    if scale and cost:
        ablations = read(args.log_dir / "ablations", ABLATIONS)
        deviations = seed_deviations([*methods.values(), *ablations.values()])
        draw_scale(scale, cost, deviations)
    if args.work_dir:
        can = methods["can"][0]
        data = data_folder(args.work_dir, can["images"], can["test_images"])
        paths = {
            title: args.work_dir / "methods" / f"{name}-{args.seed}" / "train" / LAST
            for name, title in NAMES.items()
        }
        draw_reconstructions(paths["CAN"], data)
        draw_features(paths, data)


if __name__ == "__main__":
    parser = get_args_parser()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--work_dir", type=Path, help="study.py's, where its checkpoints are")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the pictures' models")
    main(parser.parse_args())
