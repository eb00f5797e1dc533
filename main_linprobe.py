"""Linear probing: trains a classifier on a frozen encoder's features.

On ImageNet with MAE's recipe, and on digits in seconds:

    torchrun --nproc_per_node=4 main_linprobe.py --data_path IMAGENET --batch_size 512 \\
        --model vit_base_patch16 --cls_token --finetune output_dir/checkpoint-49.pth --dist_eval
    python main_linprobe.py --data_path digits --input_size 16 --model vit_tiny_patch4 \\
        --finetune output_dir/checkpoint-last.pth --cache_features
"""

import argparse
import logging

from engine_finetune import fit, report, set_up
from model_vit import build_probe
from util.args import linprobe_parser as get_args_parser
from util.datasets import SeededDataset, eval_loader, probe_transform, train_loader
from util.distributed import launch
from util.features import encode, encoder_knn
from util.lars import LARS

logger = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> None:
    task = set_up(args, build_probe)
    model, precision = task.model, task.precision
    if args.knn:
        accuracy = encoder_knn(model.features, task.train, task.val, args, precision)
        logger.info(f"kNN top-1 {accuracy:.2f} %")
        return
    if args.eval:
        report(model, task.val_loader, precision)
        return

    optimizer = LARS(model.head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    task.run.resume(model, optimizer=optimizer, scaler=precision.scaler)
    trained, val_loader = model, task.val_loader
    train_data = SeededDataset(task.train, probe_transform(args.input_size), args.seed)
    if args.cache_features:
        trained = model.head
        train_data, val_data = (
            encode(model.features, part, args, precision).cpu() for part in (task.train, task.val)
        )
        args.num_workers = 0  # rows of a tensor need no loader processes
        val_loader = eval_loader(val_data, args, precision.device, share=args.dist_eval)
    loader = train_loader(train_data, args, precision.device)
    fit(trained, loader, val_loader, optimizer, precision, task.run, args)


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
