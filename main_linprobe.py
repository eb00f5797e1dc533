"""Linear probing: trains a classifier on a frozen encoder's features.

On ImageNet with MAE's recipe, and on digits in seconds:

    torchrun --nproc_per_node=4 main_linprobe.py --data_path IMAGENET --batch_size 512 \\
        --model vit_base_patch16 --cls_token --finetune can/checkpoint-last.pth --dist_eval
    python main_linprobe.py --data_path digits --input_size 16 --model vit_nano_patch4 --blr 10 \\
        --finetune quickstart/checkpoint-last.pth --cache_features --output_dir ''
"""

import util.parents  # isort: skip  # noqa: F401 (before torch, see there)

import argparse
import logging

from engine_finetune import fit, fit_grid, report, set_up
from model_vit import build_probe
from util.args import linprobe_parser as get_args_parser
from util.data.loader import eval_loader, train_loader
from util.data.order import SeededDataset
from util.data.pixels import Pixels
from util.data.transforms import probe_transform_of
from util.features import encode, knn_accuracies
from util.lars import LARS
from util.run.launch import launch, session
from util.run.training import Training

logger = logging.getLogger(__name__)


@session
def main(args: argparse.Namespace) -> None:
    task = set_up(args, build_probe)
    model, precision, device = task.model, task.precision, task.precision.device
    if args.knn:
        parts = (encode(model.features, part, args, precision) for part in (task.train, task.val))
        *others, (k, accuracy) = knn_accuracies(*parts).items()
        words = ", ".join(f"{other:.2f} % with {fewer}" for fewer, other in others)
        logger.info(f"kNN top-1 {accuracy:.2f} % with k = {k}, {words}")
        return
    if args.eval or args.predict:
        report(task)
        return
    if args.grid:
        fit_grid(task)
        return

    optimizer = LARS(model.head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    task.run.resume(model, optimizer=optimizer, scaler=precision.scaler)
    if args.cache_features:
        trained = model.head
        train, val = (
            encode(model.features, part, args, precision).cpu() for part in (task.train, task.val)
        )
        loader = train_loader(train, args, device, num_workers=0)  # rows of a tensor need none
        val_loader = eval_loader(val, args, device, share=args.dist_eval, num_workers=0)
    else:
        trained, val_loader = model, task.val_loader
        data = SeededDataset(task.train, probe_transform_of(args), args.seed)
        loader = train_loader(data, args, device, finish=Pixels.of(args).finish)
    training = Training(trained, loader, optimizer, precision, args, task.run)
    fit(training, val_loader, weights=task.class_weights())


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
