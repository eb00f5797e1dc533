"""Processor time of pretraining, of each run of `--what scale`; prints JSON.

    OMP_NUM_THREADS=1 python benchmarks/study/cost.py --data_path IMAGES > logs/cost.json

`IMAGES` is a folder with train/ and val/, such as study.py makes. The study's own runs are hours
and machines apart; these take turns on one, so that whatever disturbs it disturbs all alike.
Start-up is not counted: a round is a run of two epochs less one of one epoch.
"""

import argparse
import json

import paths  # noqa: F401
from common import describe_machine
from study import DEVICE, PRETRAIN, SIDE, Launcher
from sweeps import SCALE, Run

from util.datasets import open_dataset
from util.parser import number
from util.run.launch import launch
from util.sizes import SIZES


def processor_seconds(run: Run, epochs: int, args: argparse.Namespace) -> float:
    """Of a whole run that keeps nothing."""
    pretrain = Launcher()
    how = f"--model mae_vit_{args.size} --input_size {SIDE} --num_workers 0 --precision bf16"
    length = f"--batch_size {args.batch_size} --epochs {epochs} --warmup_epochs 0"
    where = f"--data_path {args.data_path} --output_dir ''"
    pretrain("main_pretrain.py", how, PRETRAIN, run.flags, length, where)
    return pretrain.processor_seconds


def main(args: argparse.Namespace) -> None:
    images = len(open_dataset(args.data_path, train=True))
    images -= images % args.batch_size
    trained = [run for run in SCALE if run.flags is not None]
    found = {run.name: [] for run in trained}
    for _ in range(args.rounds):
        for run in trained:
            one, two = (processor_seconds(run, epochs, args) for epochs in (1, 2))
            found[run.name].append(round(1000 * (two - one) / images, 3))
    machine = describe_machine(DEVICE)
    setting = {"images": images, "batch_size": args.batch_size, "size": args.size}
    setting |= {"machine": machine, "seconds per 1,000 images": found}
    print(json.dumps(setting, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="a folder with train/ and val/")
    parser.add_argument("--size", choices=SIZES, default="nano_patch4", help="model size")
    parser.add_argument("--batch_size", type=number(int, 1), default=256)
    parser.add_argument("--rounds", type=number(int, 1), default=3)
    launch(main, parser.parse_args())
