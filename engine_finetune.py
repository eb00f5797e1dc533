"""Fine-tuning and probing: set-up, one epoch, evaluation, the whole run."""

import argparse
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils.data import Dataset

from util.data.loader import DeviceLoader, eval_loader, to_device, train_loader
from util.data.order import SeededDataset
from util.data.source import classes_of, labels_of, match_classes
from util.data.survey import inherit_pixels, settle_pixels
from util.data.transforms import eval_transform_of
from util.datasets import check_classes, held_out, open_dataset, open_labelled
from util.distributed import (
    broadcast_buffers,
    from_rank_zero,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    max_over_ranks,
    sum_over_ranks,
)
from util.errors import UserError
from util.features import encode
from util.layouts import settle_grid
from util.misc import seed_all
from util.precision import Precision
from util.predictions import Predictions, See, Tally, balanced_weights, count
from util.probe_grid import HELD_OUT, GridHeads, both_pools
from util.run.checkpoint import load, load_published
from util.run.interrupt import Poll, polled
from util.run.logs import describe_run, log_to_console
from util.run.run import Run
from util.run.training import Training
from util.weights import fit_input, load_encoder, load_model, warn_of_pooling

logger = logging.getLogger(__name__)


@dataclass
class Task:
    """What fine-tuning and probing start with: images with labels, and a model with weights."""

    run: Run
    train: Dataset | None  # of (PIL image, label) pairs, like val; None if there is no training
    val: Dataset
    val_loader: DeviceLoader
    model: nn.Module
    precision: Precision

    def class_weights(self) -> Tensor | None:
        """`--class_weights`'s, on the device; None for none."""
        if self.run.args.class_weights is None:
            return None
        weights = balanced_weights(labels_of(self.train), len(self.run.classes))
        return weights.to(self.precision.device)


def set_up(args: argparse.Namespace, build: Callable[[argparse.Namespace, int], nn.Module]) -> Task:
    """Joins the process group, opens the data, builds the model and loads `--finetune`'s weights.

    With `--eval` and `--predict` all weights are `--resume`'s.

    Args:
        build: the model for the flags and a number of classes, on the CPU.
    Raises:
        UserError: weights, data or the output folder are not as the flags say.
    """
    device = init_distributed_mode(args)
    log_to_console()
    run = Run(args)
    weighs_up = args.eval or args.predict  # trained weights, without more training
    # What is resumed has all weights: those that it started from may be gone.
    source = args.resume if weighs_up else "" if run.resumed else args.finetune
    state = (load if weighs_up else load_published)(source) if source else {}
    if weighs_up:
        state = settle_grid(state)
        args.global_pool = state.get("args", {}).get("global_pool", args.global_pool)
    inherit_pixels(args, state.get("args", {}), source)
    train, val, run.classes = from_rank_zero(lambda: open_images(args, state))
    run.data = settle_pixels(args, train=train, val=val)
    val_data = SeededDataset(val, eval_transform_of(args), args.seed)
    val_loader = eval_loader(val_data, args, device, share=args.dist_eval)

    seed_all(args.seed)
    precision = Precision(args.precision, device)
    model = build(args, len(run.classes))
    if weighs_up:
        for words in fit_input(model, state["model"], source, state.get("args")):
            logger.info(words)
        load_model(model, state["model"], source)
    elif state:
        load_encoder(model, state["model"], source, state.get("args"))
        warn_of_pooling(args, state.get("args", {}), source)
    elif not run.resumed:
        logger.info("encoder: random, since --finetune names no weights")
    return Task(run, train, val, val_loader, model.to(device), precision)


def open_images(
    args: argparse.Namespace, state: dict[str, Any]
) -> tuple[Dataset | None, Dataset, list[str]]:
    """Training images, those to evaluate on, and the classes; only the latter for `--eval`.

    Args:
        state: of `--eval` and `--predict`, the checkpoint: its classes, in its order, are taken.
    Raises:
        UserError: as `open_labelled`; the checkpoint's classes are others.
    """
    known: list[str] = state.get("classes") or []
    if args.predict:
        heads = [t for name, t in state["model"].items() if re.fullmatch(r"head\.(1\.)?bias", name)]
        numbers = [str(number) for number in range(len(heads[0]) if heads else 0)]
        if not numbers:
            raise UserError(f"{args.resume} holds no classifier: it was pretrained alone")
        return None, open_dataset(args.predict, None, args.output_dir), known or numbers
    if args.eval and not args.val_fraction:
        train, val = None, open_dataset(args.data_path, False, args.output_dir, args.labels)
        check_classes(val, args.data_path, args.nb_classes)
    else:
        train, val, _ = open_labelled(
            args.data_path, args.nb_classes, args.val_fraction, args.output_dir, args.labels
        )
        before = state.get("args", {}).get("val_fraction", args.val_fraction)
        if args.eval and before < args.val_fraction:
            logger.warning(
                f"warning: --val_fraction {args.val_fraction}: {args.resume} was trained on some "
                f"of these images, with --val_fraction {before}"
            )
    classes = classes_of(train or val)
    if args.eval and known:
        match_classes(val, known, classes, args.resume)
        classes = known
    elif args.eval:
        logger.info(f"{args.resume} has no names of classes: those of the images are taken")
    return train, val, classes


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
    training: Training,
    epoch: int,
    mixup: Mixup | None = None,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> dict[str, float]:
    """Trains for one epoch and returns its mean metrics over all ranks.

    Args:
        training: its model maps the loader's inputs (images, or cached features) to logits.
        mixup: smooths labels itself.
        smoothing: of labels, without mixup.
        weights: [K], of the classes; if not given, they are alike.
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
        loss = F.cross_entropy(
            logits.float(),
            labels,
            weights,
            label_smoothing=smoothing,
            reduction="mean" if weights is None else "none",  # not by the sum of weights
        ).mean()
        training.backward({"loss": loss})
    return training.means()


@torch.no_grad()
def tally(
    model: nn.Module,
    loader: DeviceLoader,
    precision: Precision,
    poll: Poll | None = None,
    see: See | None = None,
) -> Tally:
    """Counts of how often a classifier is right.

    Every process counts the images of its loader, and the counts are added up: exact both for
    loaders that share the images without overlap and for loaders that each hold all of them.

    Args:
        model: not wrapped in DDP, so that processes may see different numbers of batches.
        loader: of (input, label) batches.
        poll: called after each batch, equally often on every rank; None cannot save.
        see: called with the logits of each batch.
    Raises:
        UserError: too many images are not readable; on every rank.
    """
    broadcast_buffers(model)  # each process's BatchNorm has seen other images
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=precision.device)
    for batch in polled(loader, poll):
        inputs, labels = to_device(batch, precision.device)
        with precision.autocast():
            logits = model(inputs)
        if see:
            see(logits, loader.replaced)
        new = count(logits, labels)
        sums = F.pad(sums, (0, len(new) - len(sums))) + new
    loader.report_bad()
    size = max_over_ranks(len(sums))  # a process may have had no images
    return Tally.of(sum_over_ranks(F.pad(sums, (0, size - len(sums)))))


def evaluate(
    model: nn.Module, loader: DeviceLoader, precision: Precision, poll: Poll | None = None
) -> dict[str, float]:
    """Mean loss, top-1, balanced and, from 6 classes on, top-5 accuracy in percent.

    Args, raises: as `tally`; the keys are those of `Tally.scores`.
    """
    return tally(model, loader, precision, poll).scores()


def summary(scores: dict[str, float]) -> str:
    """The scores of `evaluate` as text."""
    top5 = f"top-5 {scores['acc5']:.2f} %, " if "acc5" in scores else ""
    balanced = f"balanced {scores['balanced']:.2f} %, "
    return f"top-1 {scores['acc1']:.2f} %, {balanced}{top5}loss {scores['loss']:.4f}"


@torch.no_grad()
def predict(model: nn.Module, loader: DeviceLoader, precision: Precision, see: See) -> None:
    """Shows `see` the logits of each batch; labels are not used. Raises as `tally`."""
    model.eval()
    for images, _ in loader:
        with precision.autocast():
            see(model(images), loader.replaced)
    loader.report_bad()


def report(task: Task) -> None:
    """`--eval` and `--predict`: prints one line, and writes the tables that flags ask for."""
    args, classes = task.run.args, task.run.classes
    found = Predictions(task.val, classes, args.dist_eval, labelled=not args.predict)
    if args.predict:
        predict(task.model, task.val_loader, task.precision, found.add)
    else:
        see = found.add if args.predictions else None
        counts = tally(task.model, task.val_loader, task.precision, see=see)
        logger.info(summary(counts.scores()))
        if args.per_class:
            times = 1 if args.dist_eval else get_world_size()
            from_rank_zero(lambda: counts.write(args.per_class, classes, times))
    if args.predictions:
        found.write(args.predictions)
    for path in filter(None, (args.predictions, args.per_class)):
        logger.info(f"written: {path}")


def fit(
    training: Training,
    val_loader: DeviceLoader,
    mixup: Mixup | None = None,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> None:
    """Trains to the last epoch; evaluates, logs and saves after each.

    Args:
        mixup, smoothing, weights: `train_one_epoch`'s.
    """
    run, model = training.run, training.model.module
    describe_run(training.args, model, training.precision, training.steps)
    stats, guessing = {}, math.log(len(run.classes))
    for epoch in range(run.epoch, training.args.epochs):
        stats = train_one_epoch(training, epoch, mixup, smoothing, weights)
        scores = evaluate(model, val_loader, training.precision, run.poll)
        best = max(run.best, scores["acc1"])
        logger.info(f"epoch {epoch}: {summary(scores)}; best top-1 {best:.2f} %")
        training.log.add_epoch(epoch, stats, {f"test_{name}": v for name, v in scores.items()})
        run.save(epoch, score=scores["acc1"])
    training.log.close()
    loss = stats.get("loss", 0.0)  # there is none if all steps were skipped
    if loss > 1.1 * guessing and is_main_process():  # whatever the smoothing and mixup
        logger.warning(
            f"warning: the last epoch's training loss {loss:.4g} is worse than that of "
            f"guessing, {guessing:.4g}: the learning rate, {training.args.lr:.4g}, may be too high"
        )


def fit_grid(task: Task) -> None:
    """`--blr auto`: trains a grid of probes, chooses one by held-out images, and evaluates that."""
    run, args, precision = task.run, task.run.args, task.precision
    classes, device = len(run.classes), precision.device
    if state := run.resumed:  # of which features are made now
        load_encoder(task.model, state["model"], run.source, state.get("args"), tell=False)
    encoder = both_pools(task.model)
    train, val = (encode(encoder, part, args, precision) for part in (task.train, task.val))
    held = torch.from_numpy(held_out(train.labels.cpu().numpy(), HELD_OUT))
    rest, chosen_by = train.part(~held).cpu(), train.part(held)
    if not held.any():
        raise UserError("--blr auto: classes of one image each leave none to choose by")
    task.model.head = heads = GridHeads(task.model.embed_dim, classes).to(device)
    optimizer = torch.optim.SGD(heads.parameters(), args.lr, momentum=0.9, fused=True)
    run.resume(task.model, optimizer=optimizer, scaler=precision.scaler)
    for p in heads.parameters():  # which torch leaves unfilled if the first step is skipped
        optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
    loader = train_loader(rest, args, device, num_workers=0)
    training = Training(heads, loader, optimizer, precision, args, run)
    describe_run(args, heads, precision, training.steps)
    weights = task.class_weights()
    for epoch in range(run.epoch, args.epochs):
        for batch in training.batches(epoch):
            inputs, labels = to_device(batch, device)
            logits = training.model(inputs)
            loss = heads.loss(logits, labels, weights, args.weight_decay)
            training.backward({"loss": loss}, count=len(logits))
        broadcast_buffers(heads)
        grid = heads.accuracies(chosen_by.features, chosen_by.labels)
        heads.chosen.fill_(grid.argmax())
        scores = heads.tally(val.features, val.labels).scores()
        name = f"{heads.name(heads.chosen)} (held out: {grid.max().item():.2f} %)"
        logger.info(f"epoch {epoch}: {summary(scores)}; chosen: {name}")
        tests = {f"test_{key}": value for key, value in scores.items()}
        tests |= {f"grid_{heads.name(i)}": value for i, value in enumerate(grid.tolist())}
        training.log.add_epoch(epoch, training.means(), tests)
        run.save(epoch, score=grid.max().item())
    training.log.close()
