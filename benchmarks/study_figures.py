"""Tables (printed, in Markdown) and figures (benchmarks/figures/) of `study.py`'s logs.

    python -m pip install matplotlib
    python benchmarks/study_figures.py
    python benchmarks/study_figures.py --work_dir study    # and pictures of what models do

Means over seeds, with the standard error of that mean where there are two seeds or more. Ablations
are differences from CAN, in percent of the test images; their standard error has two parts: what
seeds change (pooled over all runs, since few seeds tell little of their own spread), and which
images the test happens to have. Differences beyond two standard errors are bold.
"""

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import ROOT
from flops import forward_flops
from sklearn.manifold import TSNE
from study import ABLATIONS, LOGS, METHODS, POOLS, SIDE, SIZE

from model_mae import MaskedAutoencoderViT, model_from_checkpoint
from model_vit import build_probe
from util.args import number
from util.checkpoint import load
from util.datasets import open_dataset, preview_images
from util.visualize import reconstruction_grid

FIGURES = ROOT / "benchmarks" / "figures"
NAMES = {"can": "CAN", "mae": "MAE", "simclr": "SimCLR"}
# Share of the test images that one of two runs' probes has right and the other wrong: what
# `disagreement` finds.
DISAGREEMENT = 0.25
LEVELS = (0.0, 0.5, 1.0)  # of the noise, as shares of the largest
ROWS = ("clean", "masked", "reconstructed")  # of `reconstruction_grid`
FEATURE_IMAGES = 1000
Logs = dict[str, list[dict]]  # of all seeds, by a run's name


def read(what: str, order: list) -> Logs:
    """In the order of the study's tables; without runs that have no log yet."""
    logs = {run.name: sorted((LOGS / what).glob(f"{run.name}-[0-9]*.json")) for run in order}
    return {
        name: [json.loads(path.read_text()) for path in paths]
        for name, paths in logs.items()
        if paths
    }


def mean(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error, which is NaN for one value."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return float(np.mean(values)), float(error)


def written(values: list[float], digits: int = 1) -> str:
    centre, error = mean(values)
    return f"{centre:.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")


def accuracies(records: list[dict]) -> dict[str, list[float]]:
    """Percent of the test images, by column: probes and kNN, of every seed."""
    columns = defaultdict(list)
    for record in records:
        for name, probe in record.get("probe", {}).items():
            columns[f"probe {name}"].append(probe["test_acc1"])
        for name, value in record.get("knn", {}).items():
            columns[f"kNN {name}"].append(value)
        if "probe" not in record:
            columns["fine-tuned"].append(record["training"][-1]["test_acc1"])
    return columns


def last(records: list[dict], name: str) -> list[float]:
    found = (record.get("training", [{}])[-1].get(f"train_{name}") for record in records)
    return [value for value in found if value is not None]


def forward_total(record: dict) -> float:
    """Forward FLOPs of the whole pretraining."""
    objective = NAMES[record["name"].split("-")[0]]
    flops = forward_flops(f"mae_vit_{SIZE}", objective, SIDE)
    return flops * record["epochs"] * record["images"]


def markdown(header: list[str], rows: list[list[str]]) -> None:
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(row) + " |")
    print()


def tables(logs: Logs) -> None:
    """Accuracies; then the losses at the end, and what the analysis found."""
    columns = list(dict.fromkeys(c for records in logs.values() for c in accuracies(records)))
    rows = []
    for name, records in logs.items():
        found = accuracies(records)
        cells = [written(found[column]) if column in found else "" for column in columns]
        rows.append([name, str(records[0]["epochs"]), str(len(records)), *cells])
    markdown(["run", "epochs", "seeds", *columns], rows)
    terms_table(logs)


def terms_table(logs: Logs) -> None:
    """The losses at the end of training, and what they do to the encoder."""
    header = ["reconstruction", "noise / its zero predictor", "contrastive"]
    header += [f"gradient of {term}" for term in ("reconstruction", "noise", "contrastive")]
    header += [f"rank of {pool}" for pool in POOLS]
    rows = []
    for name, records in logs.items():
        noise, zero = last(records, "noise"), last(records, "noise_zero")
        ratio = [a / b for a, b in zip(noise, zero, strict=True) if b]
        ratio *= is_trained("noise", records)
        cells = [(last(records, "reconstruction"), 3), (ratio, 2)]
        cells += [(last(records, "contrastive"), 2)]
        found = [record["analysis"] for record in records if "analysis" in record]
        for term in ("reconstruction", "noise", "contrastive"):
            norms = [analysis["trunk_gradient"].get(term) for analysis in found]
            cells.append(([norm for norm in norms if norm is not None], 3))
        for pool in POOLS:
            cells.append(([analysis["effective_rank"][pool] for analysis in found], 1))
        words = [written(values, digits) if values else "" for values, digits in cells]
        if any(words):
            rows.append([name, *words])
    markdown(["run", *header], rows)


def seed_deviations(everything: list[list[dict]]) -> dict[str, float]:
    """Standard deviation between seeds of each column, pooled over all runs."""
    squares, degrees = defaultdict(float), defaultdict(int)
    for records in everything:
        for column, values in accuracies(records).items():
            squares[column] += np.var(values) * len(values)
            degrees[column] += len(values) - 1
    return {column: (squares[column] / degrees[column]) ** 0.5 for column in squares}


def differences(ablations: Logs, can: list[dict], deviations: dict[str, float]) -> None:
    """Each ablation's accuracies less CAN's."""
    base = accuracies(can)
    columns = [column for column in base if column in accuracies(next(iter(ablations.values())))]
    rows = [["can", str(len(can)), *(written(base[column]) for column in columns)]]
    images = 100 * (DISAGREEMENT / can[0]["test_images"]) ** 0.5
    for name, records in ablations.items():
        found = accuracies(records)
        cells = []
        for column in columns:
            change = mean(found[column])[0] - mean(base[column])[0]
            seeds = deviations[column] * (1 / len(found[column]) + 1 / len(base[column])) ** 0.5
            error = np.hypot(seeds, images)
            bold = "**" if abs(change) > 2 * error else ""
            cells.append(f"{bold}{change:+.1f}{bold} ± {error:.1f}")
        rows.append([name, str(len(records)), *cells])
    markdown(["run", "seeds", *columns], rows)


def draw_accuracies(logs: Logs) -> None:
    """Probe accuracy by method, error bars over seeds; and against forward FLOPs."""
    logs = {name: records for name, records in logs.items() if "probe" in records[0]}
    figure, (methods, cost) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2))
    for column, marker in (("probe cls-100", "s"), ("probe pooled-100", "o"), ("kNN pooled", "^")):
        centres, errors = zip(*(mean(accuracies(r)[column]) for r in logs.values()), strict=True)
        label = column.removesuffix("-100")
        methods.errorbar(range(len(logs)), centres, errors, fmt=marker, capsize=4, label=label)
    methods.set_xticks(range(len(logs)), [n.replace("-", "\n") for n in logs], fontsize=7)
    methods.set_ylabel("top-1 (%)")
    methods.grid(axis="y", alpha=0.3)
    methods.legend(fontsize=8)
    for name, records in logs.items():
        if name != "random":
            centre, error = mean(accuracies(records)["probe pooled-100"])
            total = forward_total(records[0]) / 1e12
            cost.errorbar(total, centre, error, capsize=4, label=name, **style(name))
    cost.set_xlabel("forward FLOPs of pretraining ($10^{12}$)")
    cost.set_ylabel("linear probe on pooled features, top-1 (%)")
    cost.grid(alpha=0.3)
    cost.legend(fontsize=7, loc="lower right")
    save(figure, "accuracy.png")


def style(name: str) -> dict[str, str]:
    """One colour for each method; its training to equal FLOPs has another marker and dashes."""
    names = [run.name for run in METHODS if run.flops is None]
    method = name.removesuffix("-equal-flops")
    other = method != name
    return {"color": f"C{names.index(method)}", "fmt": "D--" if other else "o-"}


def draw_losses(logs: Logs) -> None:
    """Mean over seeds of each term's loss by epoch, where it is trained."""
    terms = ("reconstruction", "noise", "contrastive")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for axis, term in zip(axes, terms, strict=True):
        for name, records in logs.items():
            curves = [[e.get(f"train_{term}") for e in r.get("training", [])] for r in records]
            if any(curves) and curves[0][0] is not None and is_trained(term, records):
                look = style(name)
                dashes = look["fmt"][1:]
                epochs = range(1, len(curves[0]) + 1)
                axis.plot(epochs, np.mean(curves, 0), dashes, color=look["color"], label=name)
        axis.set_title(term)
        axis.set_xlabel("epoch")
        if term == "noise":
            axis.axhline(0.05**2 / 3, color="grey", ls=":", label="predicting zero")
        if term != "contrastive":
            axis.set_yscale("log")
        axis.legend(fontsize=7)
    save(figure, "losses.png")


def is_trained(term: str, records: list[dict]) -> bool:
    """False where a term was computed, but its weight is 0."""
    gradients = [r.get("analysis", {}).get("trunk_gradient", {}) for r in records]
    return not any(gradient.get(term) == 0 for gradient in gradients)


def save(figure: plt.Figure, name: str, bottom: float = 0) -> None:
    """Writes a figure, with a share of its height left free at the bottom."""
    FIGURES.mkdir(exist_ok=True)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(FIGURES / name, dpi=110)
    plt.close(figure)


def draw_reconstructions(checkpoint: Path, data: Path) -> None:
    """Clean, masked, reconstructed rows at each of `LEVELS`, from no noise to the most."""
    state = load(checkpoint)
    model = model_from_checkpoint(state, checkpoint)
    imgs = preview_images(open_dataset(str(data), train=False), 8, SIDE)
    grids = []
    for level in LEVELS:

        def add_noise(imgs: torch.Tensor, level: float = level) -> tuple:
            noise = model.std * level * torch.randn_like(imgs)
            return imgs + noise, noise, imgs.new_full((len(imgs),), level)

        model.add_noise = add_noise
        grids.append(reconstruction_grid(model, imgs, state["args"]["mask_ratio"]))
    figure, axes = plt.subplots(len(grids), 1, figsize=(7, 2.7 * len(grids)))
    for axis, grid, level in zip(axes, grids, LEVELS, strict=True):
        axis.imshow(grid.permute(1, 2, 0))
        axis.set_title(f"noise of deviation {level * model.std:g}", fontsize=9)
        height = grid.shape[1] / 3
        axis.set_yticks([height / 2 + height * i for i in range(3)], ROWS, fontsize=8)
        axis.set_xticks([])
    save(figure, "reconstructions.png")


def draw_features(checkpoints: dict[str, Path], data: Path) -> None:
    """t-SNE of pooled features of test images, coloured by class, a panel for each model."""
    images = open_dataset(str(data), train=False)
    count = min(FEATURE_IMAGES, len(images))
    chosen = np.linspace(0, len(images) - 1, count).astype(int)
    labels = np.array(images.targets)[chosen]
    imgs = preview_images(images, count, SIDE)
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


def disagreement(work_dir: Path, data: Path) -> float:
    """Of two runs' probes, how often one is right and the other wrong; mean over all pairs."""
    images = open_dataset(str(data), train=False)
    imgs, labels = preview_images(images, len(images), SIDE), torch.tensor(images.targets)
    right = []
    for path in sorted(work_dir.glob("*/*/probe-pooled-100/checkpoint-last.pth")):
        state = load(path)
        probe = build_probe(argparse.Namespace(**state["args"]), len(images.classes)).eval()
        probe.load_state_dict(state["model"])
        with torch.no_grad():
            answers = torch.cat([probe(batch).argmax(dim=1) for batch in imgs.split(500)])
        right.append(answers == labels)
    pairs = itertools.combinations(right, 2)
    return float(np.mean([(one != other).float().mean() for one, other in pairs]))


def main(args: argparse.Namespace) -> None:
    methods = read("methods", METHODS)
    ablations = read("ablations", ABLATIONS)
    if methods:
        tables(methods)
    if ablations:
        deviations = seed_deviations([*methods.values(), *ablations.values()])
        differences(ablations, methods["can"], deviations)
        terms_table({"can": methods["can"]} | ablations)
    if methods:
        draw_accuracies(methods)
        draw_losses(methods)
    if args.work_dir:
        runs = args.work_dir / "methods"
        data = next(args.work_dir.glob("*-100"))
        paths = {title: runs / f"{name}-{args.seed}/train/checkpoint-last.pth"
                 for name, title in NAMES.items()}  # fmt: skip
        draw_reconstructions(paths["CAN"], data)
        draw_features(paths, data)
        share = disagreement(args.work_dir, data)
        print(f"One of two probes is right and the other wrong on {share:.0%} of test images.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, help="study.py's, where its checkpoints are")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the pictures' models")
    main(parser.parse_args())
