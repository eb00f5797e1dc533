"""Does CAN learn better features than its parts? A sweep over this project's own scripts.

    python benchmarks/study/study.py --data_path CIFAR10 --log_dir logs --jobs 2

`--data_path` is a folder with train/ and val/, such as an ImageFolder of CIFAR-10, or `cifar10`
(torchvision's, downloaded). Every run is pretraining and its probes, a process each, on the GPU if
there is one; its log is LOGS/WHAT/NAME-SEED.json. What has a log is not run again, and what was
interrupted continues where it was. `tables.py` and `draw.py` show what the logs say. Test images
are for the final numbers alone: of each training the last epoch counts, not the best.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import paths
import torch
from common import ROOT, describe_machine
from flops import forward_flops
from folders import prepare
from sweeps import SHARES, SWEEPS, Run
from torch.utils.data import DataLoader

from model_vit import build_probe
from util.data.order import SeededDataset
from util.data.transforms import eval_transform
from util.datasets import open_dataset
from util.layouts import settle_grid
from util.parser import HelpFormatter, number
from util.run.checkpoint import LAST, load
from util.sizes import SIZES
from util.slurm.flags import seeds

LOGS = paths.STUDY / "logs"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # as the scripts choose it
SIDE = 32  # of the images, in pixels
PRETRAIN = "--blr 2e-3 --warmup_epochs 2 --blur_prob 0"
SUPERVISED = "--blr 2e-3 --warmup_epochs 2 --aa '' --reprob 0 --drop_path 0 --layer_decay 1"
# Settled on a random encoder and a tenth of the training images held out, before any run.
PROBE_BLR = {"100": 50, "10": 30, "1": 30}
PROBE_LENGTH = {
    "100": "--epochs 50 --warmup_epochs 5",
    "10": "--epochs 100 --warmup_epochs 10",
    "1": "--epochs 200 --warmup_epochs 20",
}
PROBE_BATCH = {"100": 256, "10": 100, "1": 100}  # or all images, if there are fewer
POOLS = {"cls": "--cls_token", "pooled": "--global_pool"}
# With LARS at these rates weights grow with the number of steps, at 50,000 images until probes are
# worse than guessing. There the probe chooses its rate, and pooling, itself.
CHOSEN = {"chosen": "--blr auto"}
DIGITS = 5  # that logs keep


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=HelpFormatter
    )
    positive = number(int, 1)
    parser.add_argument("--data_path", required=True, help="a folder with train/, val/; or cifar10")
    parser.add_argument("--work_dir", type=Path, default=Path("study"), help="data, checkpoints")
    parser.add_argument("--log_dir", type=Path, default=LOGS, help="folder of the runs' logs")
    parser.add_argument("--what", nargs="+", choices=SWEEPS, help="sweeps; default: all")
    parser.add_argument("--only", nargs="*", help="names of runs, if not all")
    parser.add_argument("--size", choices=SIZES, default="nano_patch4", help="model size")
    parser.add_argument("--seeds", type=seeds, help="such as 0-2; default: the sweep's")
    parser.add_argument("--images", type=positive, help="to train on; default: the sweep's")
    parser.add_argument("--test_images", type=positive, help="default: the sweep's")
    parser.add_argument("--epochs", type=positive, help="CAN's; default: the sweep's")
    parser.add_argument("--batch_size", type=positive, default=256, help="over all processes")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at a time")
    parser.add_argument("--num_workers", type=number(int, 0), default=0, help="per run")
    return parser


def epochs_of(run: Run, epochs: int, size: str) -> int:
    """Of a run: those that take the forward FLOPs of `epochs` of CAN, or its share of `epochs`."""
    if run.flops is None:
        return round(run.length * epochs)
    can, other = (forward_flops(f"mae_vit_{size}", name, SIDE) for name in ("CAN", run.flops))
    return round(epochs * can / other)


def settings(run: Run, args: argparse.Namespace) -> dict[str, int | str]:
    """What else tells two runs of a name and seed apart."""
    found = {"size": args.size, "epochs": epochs_of(run, args.epochs, args.size)}
    found |= {name: getattr(args, name) for name in ("images", "test_images", "batch_size")}
    return found | ({"held_out": True} if SWEEPS[args.what].held_out else {})


class Launcher:
    """Runs this project's scripts.

    Attributes:
        commands: those that it ran.
        processor_seconds: that the last one took, with the processes it started.
    """

    def __init__(self):
        self.commands: list[list[str]] = []
        self.processor_seconds = 0.0

    def __call__(self, name: str, *flags: str, processes: int = 1) -> str:
        """What a script prints, whose flags may stand in several strings.

        Raises:
            RuntimeError: it fails; with the end of its output.
        """
        ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher = ranks if processes > 1 else []
        words = itertools.chain(*map(shlex.split, flags))
        self.commands.append([sys.executable, *launcher, str(ROOT / name), *words])
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(self.commands[-1], stdout=out, stderr=err)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)  # it is collected
            out.seek(0)
            err.seek(0)
            said, complaints = out.read(), err.read()
        self.processor_seconds = used.ru_utime + used.ru_stime
        if process.returncode:
            end = (said + complaints)[-2000:]
            raise RuntimeError(f"{shlex.join(self.commands[-1])}: {end}")
        return said


def epochs_log(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{k: _rounded(v) for k, v in line.items()} for line in lines]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


@torch.no_grad()
def right_answers(probe: Path, data_path: str) -> str:
    """Which test images a linear probe has right: a bit for each, in the folder's order, in hex."""
    state = settle_grid(load(probe))
    flags = argparse.Namespace(**state["args"])
    images = open_dataset(data_path, train=False)
    model = build_probe(flags, len(images.classes)).eval()
    model.load_state_dict(state["model"])
    data = SeededDataset(images, eval_transform(SIDE), flags.seed)
    loader = DataLoader(data, 500, sampler=[(0, index) for index in range(len(data))])
    right = [model(imgs).argmax(dim=1) == labels for imgs, labels, _ in loader]
    return np.packbits(torch.cat(right)).tobytes().hex()


def log_path(run: Run, seed: int, args: argparse.Namespace, folder: str = "") -> Path:
    """In the sweep's folder, or another."""
    return args.log_dir / (folder or args.what) / f"{run.name}-{seed}.json"


def percent(before: str, output: str) -> float:
    """The last number after these words."""
    return float(re.findall(rf"{before} ([\d.]+)", output)[-1])


def is_done(where: Callable, run: Run, seed: int, args: argparse.Namespace) -> bool:
    """Whether the run has its log, `where(run, seed, args)`.

    Raises:
        SystemExit: it has one, of other settings.
    """
    log = where(run, seed, args)
    if not log.exists():
        return False
    kept = {"precision": "bf16"} | json.loads(log.read_text())
    if kept["precision"] != args.precision:
        print(f"{log}, of {kept['precision']}, counts as done")
    for name, value in settings(run, args).items():
        if kept.get(name) != value:
            sys.exit(
                f"{Path(sys.argv[0]).name}: error: {log} has {name} {kept.get(name)}, not {value}:"
                " give another --log_dir and --work_dir, or the settings it has"
            )
    return True


def train(run: Run, launch: Launcher, size: str, flags: str, folder: Path, data: str) -> dict:
    """Trains in a folder; returns the log of its epochs, and of a pretraining the analysis."""
    flags = f"{flags} --data_path {data} --output_dir {folder} --resume auto"
    if run.supervised:
        launch("main_finetune.py", f"--model vit_{size} {flags} {SUPERVISED}")
        return {"training": epochs_log(folder)}
    if run.flags is None:
        return {}
    words = ["main_pretrain.py", f"--model mae_vit_{size} {flags} {PRETRAIN} {run.flags}"]
    analyse = f"--checkpoint {folder / LAST} --data_path {data}"
    if run.variant:
        words = ["benchmarks/study/variants.py", run.variant, words[1]]
        analyse += f" --variant {run.variant}"
    launch(*words, processes=run.processes)
    analysis = json.loads(launch("benchmarks/study/analysis.py", analyse))
    return {"training": epochs_log(folder), "analysis": analysis}


def probe(
    run: Run,
    launch: Launcher,
    encoder: str,
    args: argparse.Namespace,
    work: Path,
    data: dict[str, str],
) -> dict:
    """Probes an encoder, given by flags: kNN, linear probes, and which images those have right."""
    found = {"knn": {}, "probe": {}, "right": {}}
    for pool, flag in POOLS.items():
        output = launch("main_linprobe.py", encoder, flag, f"--data_path {data['100']} --knn")
        found["knn"][pool] = percent("kNN top-1", output)
    for pool, flag in (CHOSEN if SWEEPS[args.what].probe_chooses else POOLS).items():
        for share in run.shares:
            folder = work / f"probe-{pool}-{share}"
            batch = min(PROBE_BATCH[share], int(SHARES[share] * args.images))
            where = f"--data_path {data[share]} --output_dir {folder} --resume auto"
            how = f"--cache_features --batch_size {batch} {PROBE_LENGTH[share]}"
            rate = f"--blr {PROBE_BLR[share]}" if pool in POOLS else ""
            launch("main_linprobe.py", encoder, flag, rate, where, how)
            found["probe"][f"{pool}-{share}"] = epochs_log(folder)[-1]
        found["right"][pool] = right_answers(work / f"probe-{pool}-100" / LAST, data["100"])
    return found


def carry_out(run: Run, seed: int, args: argparse.Namespace, data: dict[str, str]) -> str:
    """Trains and probes one run, and writes its log; returns a line about it."""
    log, begin, launch = log_path(run, seed, args), time.time(), Launcher()
    work = args.work_dir / args.what / f"{run.name}-{seed}"
    common = f"--input_size {SIDE} --seed {seed} --num_workers {args.num_workers}"
    common += f" --precision {args.precision}"
    record = {"name": run.name, "seed": seed, "precision": args.precision} | settings(run, args)

    length = f"--batch_size {args.batch_size // run.processes} --epochs {record['epochs']}"
    record |= train(run, launch, args.size, f"{common} {length}", work / "train", data["100"])
    if not run.supervised:
        weights = "" if run.flags is None else f"--finetune {work / 'train' / LAST}"
        encoder = f"--model vit_{args.size} {weights} {common}"
        record |= probe(run, launch, encoder, args, work, data)

    record["data"], record["seconds"] = Path(args.data_path).name, round(time.time() - begin)
    write_log(log, record, launch)
    return f"{run.name} {seed}: {record['seconds']} s"


def write_log(log: Path, record: dict, launch: Launcher) -> None:
    record["commands"] = [shlex.join(["python", *command[1:]]) for command in launch.commands]
    record["machine"] = describe_machine(DEVICE)
    log.parent.mkdir(parents=True, exist_ok=True)
    temporary = log.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1).replace(str(ROOT) + os.sep, "") + "\n")
    temporary.replace(log)


def complete(args: argparse.Namespace, what: str) -> argparse.Namespace:
    """The flags for one sweep, with its settings where none were given."""
    own = ("seeds", "images", "test_images", "epochs")
    found = {name: getattr(args, name) or getattr(SWEEPS[what], name) for name in own}
    return argparse.Namespace(**vars(args) | found | {"what": what})


def missing(args: argparse.Namespace, where: Callable) -> list[tuple[Run, int]]:
    """What a sweep's flags ask for and has no log yet, `where(run, seed, args)`; seed by seed."""
    return [
        (run, seed)
        for seed in args.seeds
        for run in SWEEPS[args.what].runs
        if (not args.only or run.name in args.only) and not is_done(where, run, seed, args)
    ]


def work_off(jobs: int, actions: list[Callable[[], str]]) -> None:
    """Does so many at a time, and prints what they return or raise.

    Raises:
        SystemExit: in the end, if one has failed.
    """
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(action) for action in actions]
        failed = False
        for future in concurrent.futures.as_completed(started):
            failed |= future.exception() is not None
            print(future.exception() or future.result(), flush=True)
    if failed:
        name = Path(sys.argv[0]).name
        sys.exit(f"{name}: error: some runs failed, as shown above; the others have their logs")


def main(args: argparse.Namespace) -> None:
    actions = []
    for sweep in (complete(args, what) for what in args.what or SWEEPS):
        data = prepare(sweep)
        actions += [partial(carry_out, *run, sweep, data) for run in missing(sweep, log_path)]
    work_off(args.jobs, actions)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
