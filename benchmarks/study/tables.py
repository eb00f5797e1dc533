"""Tables of `study.py`'s logs, in Markdown.

    python benchmarks/study/tables.py

Absolute numbers are means over seeds, with the standard error of that mean where there are two
seeds or more. Differences from CAN have a standard error of two parts:

- seeds: their deviation, pooled over all runs, since few seeds tell little of their own spread;
- test images: two kinds of run differ more on some images than on others, so that other images
  would give another difference. Beyond what seeds change anyway, that is the share of images on
  which one of two runs of different kinds is right and the other wrong, less the same share for two
  seeds of one kind.

Differences beyond two standard errors are *italic*, beyond three **bold**. Of twenty differences
that are none, one is italic by chance.
"""

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from study import LOGS, POOLS
from sweeps import ABLATIONS, METHODS, NOISE, SCALE, SMALL, SWEEPS, Run

TERMS = ("reconstruction", "noise", "contrastive")
MAIN_READOUTS = ("probe cls-100", "probe pooled-100", "kNN cls", "kNN pooled")
KINDS = ("probe", "knn")  # of what is read out of frozen features of other images
Logs = dict[str, list[dict]]  # of all seeds, by a run's name
Cost = dict[str, list[float]]  # by a run's name, processor seconds of 1,000 images, by round


def read(folder: Path, order: list[Run]) -> Logs:
    """In the order of the study's tables; without runs that have no log yet."""
    logs = {run.name: [] for run in order}
    for path in sorted(folder.glob("*.json")):
        name, _, _seed = path.stem.rpartition("-")
        if name in logs:
            logs[name].append(path)
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
    if not values:
        return ""
    centre, error = mean(values)
    return f"{centre:.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}")


def accuracies(records: list[dict]) -> dict[str, list[float]]:
    """Percent of the test images, by readout: probes and kNN, of every seed."""
    columns = defaultdict(list)
    for record in records:
        for name, probe in record.get("probe", {}).items():
            columns[f"probe {name}"].append(probe["test_acc1"])
        for name, value in record.get("knn", {}).items():
            columns[f"kNN {name}"].append(value)
        if "knn" not in record:
            columns["fine-tuned"].append(record["training"][-1]["test_acc1"])
    return dict(columns)


def processor_hours(record: dict, cost: Cost) -> float:
    """Of a whole pretraining, by what `cost.py` has measured."""
    steps = record["epochs"] * (record["images"] // record["batch_size"])
    images = steps * record["batch_size"]
    return np.median(cost[record["name"]]) * images / 1000 / 3600


def last(records: list[dict], name: str) -> list[float]:
    """A training metric after the last epoch, of every seed that has it."""
    found = (record.get("training", [{}])[-1].get(f"train_{name}") for record in records)
    return [value for value in found if value is not None]


def is_trained(term: str, records: list[dict]) -> bool:
    """False where a term was computed, but its weight is 0."""
    gradients = [r.get("analysis", {}).get("trunk_gradient", {}) for r in records]
    return not any(gradient.get(term) == 0 for gradient in gradients)


def seeds(records: list[dict]) -> str:
    """How many there are, and how many of them ran in fp32 and not in bf16."""
    others = sum(record.get("precision") == "fp32" for record in records)
    return f"{len(records)} ({others} in fp32)" if others else str(len(records))


def markdown(header: list[str], rows: list[list[str]]) -> None:
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(row) + " |")
    print()


def read_cost(folder: Path) -> Cost:
    """Empty where it has not been measured."""
    path = folder / "cost.json"
    return json.loads(path.read_text())["seconds per 1,000 images"] if path.exists() else {}


def accuracy_table(logs: Logs, cost: Cost | None = None) -> None:
    found = {name: accuracies(records) for name, records in logs.items()}
    columns = list(dict.fromkeys(column for values in found.values() for column in values))
    columns.sort(key=lambda column: column.startswith("probe"), reverse=True)
    rows = []
    for name, records in logs.items():
        trained = "training" in records[0]
        epochs = str(records[0]["epochs"]) if trained else ""
        cells = [written(found[name].get(column, [])) for column in columns]
        if cost:
            cells.insert(0, f"{processor_hours(records[0], cost):.2f}" if trained else "")
        rows.append([name, epochs, seeds(records), *cells])
    hours = ["processor h"] if cost else []
    markdown(["run", "epochs", "seeds", *hours, *columns], rows)


def terms_table(logs: Logs) -> None:
    """The losses at the end of training, and what they do to the encoder."""
    header = ["reconstruction", "noise / its zero predictor", "contrastive"]
    header += [f"gradient of {term}" for term in TERMS] + [f"rank of {pool}" for pool in POOLS]
    rows = []
    for name, records in logs.items():
        noise, zero = last(records, "noise"), last(records, "noise_zero")
        ratio = [a / b for a, b in zip(noise, zero, strict=True) if b]
        if not is_trained("noise", records):
            ratio = []
        cells = [written(last(records, "reconstruction"), 3), written(ratio, 2)]
        cells.append(written(last(records, "contrastive"), 2))
        found = [record["analysis"] for record in records if "analysis" in record]
        for term in TERMS:
            norms = [analysis["trunk_gradient"].get(term) for analysis in found]
            cells.append(written([norm for norm in norms if norm], 3))
        for pool in POOLS:
            cells.append(written([analysis["effective_rank"][pool] for analysis in found]))
        if any(cells):
            rows.append([name, *cells])
    markdown(["run", *header], rows)


def noise_ratios(record: dict) -> list[float]:
    """The noise loss over its zero predictor's, mean over each epoch."""
    return [e["train_noise"] / e["train_noise_zero"] for e in record["training"]]


def noise_table(logs: Logs) -> None:
    """How the prediction of noise fares with steps; below 1 it is better than predicting zero."""
    rows = []
    for name, records in logs.items():
        if not last(records, "noise_zero") or not is_trained("noise", records):
            continue
        curve = np.mean([noise_ratios(record) for record in records], axis=0)
        steps = records[0]["images"] // records[0]["batch_size"]  # of an epoch
        below = next((epoch for epoch in range(len(curve)) if (curve[epoch:] < 1).all()), None)
        places = [round(len(curve) * part / 6) for part in range(1, 7)]
        cells = [f"{curve[place - 1]:.3f}" for place in places]
        crossed = "never" if below is None else f"{(below + 1) * steps:,}"
        rows.append([name, f"{len(curve) * steps:,}", *cells, crossed])
    sixths = [f"{part}/6" for part in range(1, 7)]
    markdown(["noise / its zero predictor", "steps", *sixths, "below 1 by step"], rows)


def downstream_table(logs: Logs) -> None:
    """Fine-tuned accuracy by share of the labels; on other images means over folds, and seeds."""
    shares = dict.fromkeys(share for (r, *_) in logs.values() for share in r["finetuned"])
    readouts = [(s, kind) for (r, *_) in logs.values() for s in r["transfer"] for kind in KINDS]
    readouts = dict.fromkeys(readouts)
    rows = []
    for name, records in logs.items():
        cells = [written([r["finetuned"][share] for r in records]) for share in shares]
        for images, kind in readouts:
            cells.append(written([np.mean(r["transfer"][images][kind]) for r in records]))
        rows.append([name, seeds(records), *cells])
    header = [f"fine-tuned, {share} %" for share in shares]
    header += [f"{images}, {kind}" for images, kind in readouts]
    markdown(["run", "seeds", *header], rows)


def seed_deviations(runs: list[list[dict]]) -> dict[str, float]:
    """Standard deviation between seeds of each readout, pooled over all runs of several seeds."""
    squares, degrees = defaultdict(float), defaultdict(int)
    for records in runs:
        for column, values in accuracies(records).items():
            if len(values) > 1:
                squares[column] += np.var(values) * len(values)
                degrees[column] += len(values) - 1
    return {column: (squares[column] / degrees[column]) ** 0.5 for column in squares}


def disagreements(logs: Logs, pool: str = "pooled") -> tuple[float, float]:
    """Shares of the test images that one of two probes has right and the other wrong.

    Only of different seeds: runs of one seed begin alike, and err alike.

    Returns:
        Mean over pairs of runs of different kinds, and over pairs of one kind (0 where there is no
        such pair: then all of the first counts).
    """
    bits = [
        (np.unpackbits(np.frombuffer(bytes.fromhex(record["right"][pool]), np.uint8)), record)
        for records in logs.values()
        for record in records
        if "right" in record
    ]
    shares = {True: [], False: []}
    for (one, a), (two, b) in itertools.combinations(bits, 2):
        if a["seed"] != b["seed"]:
            shares[a["name"] == b["name"]].append((one != two).sum() / a["test_images"])
    between, within = (float(np.mean(shares[same])) if shares[same] else 0.0 for same in (0, 1))
    return between, within


def images_error(between: float, within: float, test_images: int) -> float:
    """The second part of a difference's standard error, in percent, of `disagreements`."""
    return 100 * (max(between - within, 0.0) / test_images) ** 0.5


def differences(logs: Logs, can: list[dict], deviations: dict[str, float], images: float) -> None:
    """Each run's accuracies minus CAN's, with standard errors: `deviations` and `images`."""
    base = accuracies(can)
    rows = [["can", str(len(can)), *(written(base[column]) for column in MAIN_READOUTS)]]
    for name, records in logs.items():
        found, cells = accuracies(records), []
        for column in MAIN_READOUTS:
            change = np.mean(found[column]) - np.mean(base[column])
            counts = len(found[column]), len(base[column])
            seeds = deviations[column] * sum(1 / count for count in counts) ** 0.5
            error = np.hypot(seeds, images)
            mark = "*" * min(2, max(0, int(abs(change) / error) - 1))
            cells.append(f"{mark}{change:+.1f}{mark} ± {error:.1f}")
        rows.append([name, str(len(records)), *cells])
    markdown(["minus CAN", "seeds", *MAIN_READOUTS], rows)


def first_study(methods: Logs, ablations: Logs) -> None:
    can = methods["can"]
    deviations = seed_deviations([*methods.values(), *ablations.values()])
    between, within = disagreements(ablations)
    images = images_error(between, within, can[0]["test_images"])
    print(f"Right and wrong: {between:.3f} of the test images between runs, {within:.3f} between")
    print(f"seeds; error of a difference from the choice of images: {images:.2f} points\n")
    accuracy_table(methods)
    others = {name: r for name, r in methods.items() if name != "can" and "probe" in r[0]}
    differences(others, can, deviations, images)
    terms_table(methods)
    if ablations:
        differences(ablations, can, deviations, images)
        terms_table({"can": can} | ablations)


def main(args: argparse.Namespace) -> None:
    methods = read(args.log_dir / "methods", METHODS)
    if "can" in methods:
        first_study(methods, read(args.log_dir / "ablations", ABLATIONS))
    if recipes := read(args.log_dir / "recipes", SWEEPS["recipes"].runs):
        accuracy_table(recipes)
        terms_table(recipes)
    scale = read(args.log_dir / "scale", SCALE)
    noise = read(args.log_dir / "noise", NOISE)
    cost = read_cost(args.log_dir)
    if small := read(args.log_dir / "small", SMALL):
        accuracy_table(small, cost)
    for logs in (scale, noise):
        if logs:
            accuracy_table(logs, cost if logs is scale else None)
            terms_table(logs)
            noise_table(logs)
    if downstream := read(args.log_dir / "downstream", SCALE):
        downstream_table(downstream)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log_dir", type=Path, default=LOGS, help="study.py's")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
