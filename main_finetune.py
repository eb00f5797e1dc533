"""Fine-tuning: trains a pretrained encoder and a classifier together.

On ImageNet with MAE's recipe for ViT-B, 1024 images per step:

    torchrun --nproc_per_node=8 main_finetune.py --data_path IMAGENET --model vit_base_patch16 \\
        --finetune can/checkpoint-last.pth --batch_size 32 --accum_iter 4 --epochs 100 \\
        --blr 5e-4 --layer_decay 0.65 --mixup 0.8 --cutmix 1.0 --dist_eval
"""

import util.parents  # isort: skip  # noqa: F401 (before torch, see there)

import argparse

import torch

from engine_finetune import build_mixup, fit, report, set_up
from model_vit import build_model
from util.args import finetune_parser as get_args_parser
from util.data.loader import train_loader
from util.data.order import SeededDataset
from util.datasets import build_transform
from util.lr_decay import param_groups_lrd
from util.run.launch import launch, session
from util.run.training import Training


@session
def main(args: argparse.Namespace) -> None:
    task = set_up(args, build_model)
    train_transform = build_transform(True, args)
    if args.eval or args.predict:
        report(task)
        return

    model, precision = task.model, task.precision
    groups = param_groups_lrd(model, args.weight_decay, model.no_weight_decay(), args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    task.run.resume(model, optimizer=optimizer, scaler=precision.scaler)
    data = SeededDataset(task.train, train_transform, args.seed)
    loader = train_loader(data, args, precision.device)
    training = Training(model, loader, optimizer, precision, args, task.run, args.clip_grad)
    mixup = build_mixup(args, model.num_classes)
    fit(training, task.val_loader, mixup, args.smoothing, task.class_weights())


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
