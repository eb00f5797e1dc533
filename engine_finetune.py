"""Supervised training: set-up, an epoch, evaluation, the run; for fine-tuning and probing."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from util.checkpoint import load, load_encoder, load_model
from util.datasets import SeededDataset, eval_loader, eval_transform, open_labelled
from util.distributed import (
    broadcast_buffers,
    from_rank_zero,
    init_distributed_mode,
    is_main_process,
    sum_over_ranks,
)
from util.epoch import Training, run_epoch
from util.folder import check_folder
from util.interrupt import no_poll, polled
from util.loader import DeviceLoader, to_device
from util.logs import RunLog, describe_run
from util.lr_sched import scale_learning_rate
from util.misc import seed_all
from util.precision import Precision
from util.run import Run

logger = logging.getLogger(__name__)

TOP5_CLASSES = 6  # below, the five best are all, or all but none


@dataclass
class Task:
    """What fine-tuning and probing begin with: images with labels, and a model with weights."""

    train: Dataset  # of (PIL image, label) pairs, as val is
    val: Dataset
    val_loader: DeviceLoader
    model: nn.Module
    precision: Precision
    run: Run


def set_up(args: argparse.Namespace, build: Callable[[argparse.Namespace, int], nn.Module]) -> Task:
    """Joins the process group, opens the data, builds the model and loads `--finetune`'s weights.

    With `--eval` the weights are all of `--resume`'s.

    Args:
        build: the model for the flags and a number of classes, on the CPU.
    Raises:
        UserError: weights, data or the output folder are not as the flags say.
    """
    device = init_distributed_mode(args)
    if not vars(args).get("knn"):
        from_rank_zero(lambda: check_folder(args))
    source = args.resume if args.eval else args.finetune
    run = Run(args, "" if args.eval else args.resume)
    weights = load(source)["model"] if source else None
    train, val, classes = from_rank_zero(
        lambda: open_labelled(args.data_path, args.nb_classes, args.val_fraction, args.output_dir)
    )
    val_data = SeededDataset(val, eval_transform(args.input_size), args.seed)
    val_loader = eval_loader(val_data, args, device, share=args.dist_eval)

    seed_all(args.seed)
    model = build(args, classes)
    if weights is None:
        logger.info("encoder: random, since --finetune names no weights")
    elif args.eval:
        load_model(model, weights, source)
    else:
        load_encoder(model, weights, source)
    scale_learning_rate(args)
    precision = Precision(args.precision, device)
    return Task(train, val, val_loader, model.to(device), precision, run)


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, with label smoothing; None where no flag asks for them."""
    if not (args.mixup or args.cutmix or args.cutmix_minmax):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def train_one_epoch(
    training: Training,
    epoch: int,
    mixup: Mixup | None = None,
    smoothing: float = 0.0,
    clip_grad: float | None = None,
) -> dict[str, float]:
    """Trains for one epoch and returns its mean metrics over all ranks; raises as `run_epoch`.

    Args:
        training: its model is from the loader's inputs (images, or features already computed) to
            logits.
        mixup: smooths labels itself.
        smoothing: of labels, where there is no mixup.
        clip_grad: as `run_epoch`'s.
    """
    smoothing = 0.0 if mixup else smoothing

    def losses(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, labels = to_device(batch, training.precision.device)
        if mixup:
            inputs, labels = mixup(inputs, labels)
        with training.precision.autocast():
            logits = training.model(inputs)
        return {"loss": F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)}

    def words(window: dict[str, float]) -> list[str]:
        return [f"loss {window['loss']:.4f}"]

    return run_epoch(training, epoch, losses, words, clip_grad)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    precision: Precision,
    poll: Callable[[], None] = no_poll,
) -> dict[str, float]:
    """Mean loss, top-1 and, from 6 classes on, top-5 accuracy in percent: `loss, acc1, acc5`.

    Every process counts the images of its loader, and the counts are added up: exact for loaders
    that share the images without overlap, and for loaders that each hold all of them.

    Args:
        model: not wrapped in DDP, so that processes may see different numbers of batches.
        loader: of (input, label) batches.
        poll: called after each batch, on every rank equally often.
    Raises:
        UserError: too many images are not readable; on every rank.
    """
    broadcast_buffers(model)  # each process's BatchNorm has seen other images
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=precision.device)
    for batch in polled(loader, poll):
        inputs, labels = to_device(batch, precision.device)
        with precision.autocast():
            logits = model(inputs)
        images, classes = logits.shape
        loss = F.cross_entropy(logits.float(), labels, reduction="none").double().sum()
        hits = logits.topk(min(5, classes)).indices == labels[:, None]
        counts = sums.new_tensor([images, images * classes])
        sums += torch.cat([torch.stack([loss, hits[:, 0].sum(), hits.sum()]), counts])
    loader.report_bad()
    loss, top1, top5, images, classes = sum_over_ranks(sums).tolist()
    scores = {"loss": loss / images, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images}
    if classes / images < TOP5_CLASSES:  # a mean, since a process may have had no images
        del scores["acc5"]
    return scores


def report(model: nn.Module, loader: DeviceLoader, precision: Precision) -> None:
    """`--eval`: evaluates and prints one line."""
    logger.info(summary(evaluate(model, loader, precision)))


def summary(scores: dict[str, float]) -> str:
    """The scores of `evaluate` for people."""
    top5 = f"top-5 {scores['acc5']:.2f} %, " if "acc5" in scores else ""
    return f"top-1 {scores['acc1']:.2f} %, {top5}loss {scores['loss']:.4f}"


def fit(
    model: nn.Module,
    train_loader: DeviceLoader,
    val_loader: DeviceLoader,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    run: Run,
    args: argparse.Namespace,
    **regularisation: Any,
) -> None:
    """Trains to the last epoch; evaluates, saves and logs after each.

    Args:
        model: from the loaders' inputs to logits; all or part of what `run` saves.
        **regularisation: `train_one_epoch`'s mixup, smoothing and clip_grad.
    """
    steps_per_epoch = len(train_loader) // args.accum_iter
    if is_main_process():
        describe_run(args, model, precision, steps_per_epoch)
    log = RunLog(args, run, steps_per_epoch)
    if args.compile:
        model.compile()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    training = Training(ddp, train_loader, optimizer, precision, args, run, log)
    for epoch in range(run.epoch, args.epochs):
        stats = train_one_epoch(training, epoch, **regularisation)
        scores = evaluate(model, val_loader, precision, run.poll)
        best = max(run.best, scores["acc1"])
        logger.info(f"epoch {epoch}: {summary(scores)}; best top-1 {best:.2f} %")
        tests = {f"test_{name}": value for name, value in scores.items()}
        log.scalars({f"perf/{k}": v for k, v in tests.items()}, (epoch + 1) * steps_per_epoch)
        log.epoch({"epoch": epoch} | {f"train_{k}": v for k, v in stats.items()} | tests)
        run.save(epoch, score=scores["acc1"])
    log.close()
