"""Fine-tuning and probing: set-up, one epoch, evaluation, the whole run."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn
from torch.utils.data import Dataset

from util.data.loader import DeviceLoader, eval_loader, to_device
from util.data.order import SeededDataset
from util.data.survey import inherit_pixels, settle_pixels
from util.data.transforms import eval_transform_of
from util.datasets import open_labelled
from util.distributed import (
    broadcast_buffers,
    from_rank_zero,
    init_distributed_mode,
    sum_over_ranks,
)
from util.misc import seed_all
from util.precision import Precision
from util.run.checkpoint import load, load_published
from util.run.interrupt import Poll, polled
from util.run.logs import describe_run, log_to_console
from util.run.run import Run
from util.run.training import Training
from util.weights import load_encoder, load_model

logger = logging.getLogger(__name__)

TOP5_CLASSES = 6  # with fewer, the five best are all classes, or all but one


@dataclass
class Task:
    """What fine-tuning and probing start with: images with labels, and a model with weights."""

    run: Run
    train: Dataset  # of (PIL image, label) pairs, like val
    val: Dataset
    val_loader: DeviceLoader
    model: nn.Module
    precision: Precision


def set_up(args: argparse.Namespace, build: Callable[[argparse.Namespace, int], nn.Module]) -> Task:
    """Joins the process group, opens the data, builds the model and loads `--finetune`'s weights.

    With `--eval` all weights are `--resume`'s.

    Args:
        build: the model for the flags and a number of classes, on the CPU.
    Raises:
        UserError: weights, data or the output folder are not as the flags say.
    """
    device = init_distributed_mode(args)
    log_to_console()
    run = Run(args)
    source = args.resume if args.eval else args.finetune
    state = (load if args.eval else load_published)(source) if source else {}
    inherit_pixels(args, state.get("args", {}), source)
    train, val, classes = from_rank_zero(
        lambda: open_labelled(
            args.data_path, args.nb_classes, args.val_fraction, args.output_dir, args.labels
        )
    )
    run.data = settle_pixels(args, train=train, val=val)
    val_data = SeededDataset(val, eval_transform_of(args), args.seed)
    val_loader = eval_loader(val_data, args, device, share=args.dist_eval)

    seed_all(args.seed)
    precision = Precision(args.precision, device)
    model = build(args, classes)
    if not state:
        logger.info("encoder: random, since --finetune names no weights")
    elif args.eval:
        load_model(model, state["model"], source)
    else:
        load_encoder(model, state["model"], source, state.get("args"))
    return Task(run, train, val, val_loader, model.to(device), precision)


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, with label smoothing; None if no flag asks for them."""
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
    training: Training, epoch: int, mixup: Mixup | None = None, smoothing: float = 0.0
) -> dict[str, float]:
    """Trains for one epoch and returns its mean metrics over all ranks.

    Args:
        training: its model maps the loader's inputs (images, or cached features) to logits.
        mixup: smooths labels itself.
        smoothing: of labels, without mixup.
    Raises:
        UserError, Stopped: as `Training.batches`.
    """
    smoothing = 0.0 if mixup else smoothing
    for batch in training.batches(epoch):
        inputs, labels = to_device(batch, training.precision.device)
        if mixup:
            inputs, labels = mixup(inputs, labels)
        with training.precision.autocast():
            logits = training.model(inputs)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        training.backward({"loss": loss})
    return training.means()


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DeviceLoader, precision: Precision, poll: Poll | None = None
) -> dict[str, float]:
    """Mean loss, top-1 and, from 6 classes on, top-5 accuracy in percent: `loss, acc1, acc5`.

    Every process counts the images of its loader, and the counts are added up: exact both for
    loaders that share the images without overlap and for loaders that each hold all of them.

    Args:
        model: not wrapped in DDP, so that processes may see different numbers of batches.
        loader: of (input, label) batches.
        poll: called after each batch, equally often on every rank; None cannot save.
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


def summary(scores: dict[str, float]) -> str:
    """The scores of `evaluate` as text."""
    top5 = f"top-5 {scores['acc5']:.2f} %, " if "acc5" in scores else ""
    return f"top-1 {scores['acc1']:.2f} %, {top5}loss {scores['loss']:.4f}"


def report(task: Task) -> None:
    """`--eval`: evaluates and prints one line."""
    logger.info(summary(evaluate(task.model, task.val_loader, task.precision)))


def fit(
    training: Training, val_loader: DeviceLoader, mixup: Mixup | None = None, smoothing: float = 0.0
) -> None:
    """Trains to the last epoch; evaluates, logs and saves after each.

    Args:
        mixup, smoothing: `train_one_epoch`'s.
    """
    run, model = training.run, training.model.module
    describe_run(training.args, model, training.precision, training.steps)
    for epoch in range(run.epoch, training.args.epochs):
        stats = train_one_epoch(training, epoch, mixup, smoothing)
        scores = evaluate(model, val_loader, training.precision, run.poll)
        best = max(run.best, scores["acc1"])
        logger.info(f"epoch {epoch}: {summary(scores)}; best top-1 {best:.2f} %")
        training.log.add_epoch(epoch, stats, {f"test_{name}": v for name, v in scores.items()})
        run.save(epoch, score=scores["acc1"])
    training.log.close()
