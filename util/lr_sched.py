"""The learning-rate schedule: linear warm-up, then half a cosine (Loshchilov & Hutter 2017)."""

import argparse
import math

import torch

from util.distributed import get_world_size


def global_batch(args: argparse.Namespace) -> int:
    """Images per optimizer step, over all processes."""
    return args.batch_size * args.accum_iter * get_world_size()


def scale_learning_rate(args: argparse.Namespace) -> None:
    """Sets `lr`, where it is not given, to blr x global batch / 256 (Goyal et al. 2017)."""
    if args.lr is None:
        args.lr = args.blr * global_batch(args) / 256


def adjust_learning_rate(
    optimizer: torch.optim.Optimizer, epoch: float, args: argparse.Namespace
) -> float:
    """Sets and returns the learning rate at a point of the run.

    Args:
        optimizer: a parameter group's `lr_scale`, where it has one, multiplies its rate.
        epoch: epochs done so far, with fraction.
        args: lr, min_lr, warmup_epochs, epochs.
    """
    if epoch < args.warmup_epochs:
        lr = args.lr * epoch / args.warmup_epochs
    else:
        progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
        lr = args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
