"""One training run: what it resumes from, and when and what it saves."""

import argparse
import contextlib
import logging
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from util.data.loader import DeviceLoader
from util.data.survey import inherit_pixels
from util.distributed import from_rank_zero, get_world_size, host_group
from util.errors import Stopped, UserError
from util.lr_sched import global_batch, scale_learning_rate
from util.misc import MetricLogger
from util.run import changes
from util.run.background import Background, HostCopy
from util.run.checkpoint import BEST, LAST, NUMBERED, copy_file, load, save
from util.run.folder import claim_folder, open_folder
from util.run.interrupt import Interrupts
from util.run.lock import check_locks

logger = logging.getLogger(__name__)

LEAST = {"epoch": -1, "images": 0, "world_size": 1, "global_batch": 1}  # what a checkpoint may hold
# What loading a state of another kind or objective raises.
MISFIT = (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError)


class Run:
    """Saves and resumes: after epochs, every few minutes, and when asked to stop.

    A checkpoint's `epoch` is the last complete one (-1 before the first one ends), `images` the
    number trained on in the next, `metrics` what each rank has measured there. Random numbers need
    no state: they are a function of (seed, epoch, batch, rank), see `util.misc.seed_all`.

    Args:
        args: output_dir ('' saves nothing), data_path, save_freq, save_interval, keep_last, epochs,
            start_epoch, resume; accum_iter and lr are resolved here, see `resolve`.
    Attributes:
        epoch, step: the current position.
        offset: added to steps to place points in TensorBoard, where an epoch once had another
            number of steps.
        best: the highest score so far.
        resumed: the checkpoint that it goes on from, until all of it is loaded; else {}.
        data, classes: what was opened, in words, by split; the classifier's classes, in its order.
        folder: of the checkpoints; None for none.
        _model, _states; _loader, _metrics: what is saved, registered by `resume` and `begin`.
        source: the path of the checkpoint to resume.
        _interrupts, _given: stop requests and the clock; flags as they were given.
        _background, _copy: writes checkpoints while training goes on, from a copy of the state.
        _steps: of an epoch.
        _saved: the position that the folder's `LAST` is of.
    Raises:
        UserError: the folder holds another run, there is no such checkpoint, it is damaged, or with
            `--resume auto` of another experiment.
    """

    def __init__(self, args: argparse.Namespace):
        from_rank_zero(lambda: claim_folder(args))
        self.args, self._given = args, {"accum_iter": args.accum_iter, "lr": args.lr}
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.epoch, self.step, self.best = args.start_epoch, 0, -math.inf
        self.offset, self._steps, self._saved = 0, 0, ""
        self.data: dict[str, str] = {}
        self.classes: list[str] = []
        self._interrupts = Interrupts(60 * args.save_interval)
        self._background, self._copy = Background(), HostCopy()
        self._model: nn.Module | None = None
        self._states: dict[str, Any] = {}
        self._loader: DeviceLoader | None = None
        self._metrics: MetricLogger | None = None
        self.resumed: dict[str, Any] = {}
        weighs_up = vars(args).get("eval") or vars(args).get("predict")
        resume = "" if weighs_up else args.resume  # else they read it by themselves
        self.source = self.folder / LAST if resume == "auto" else resume
        if resume == "auto" and not from_rank_zero(lambda: os.path.exists(self.source)):
            logger.info(f"no {self.source} yet: starting from the beginning")
        elif resume:
            try:
                self.resumed = load(self.source)
            except UserError as error:
                raise UserError(f"{error}{self._others(resume)}") from None
            for name, least in LEAST.items():
                value = self.resumed.get(name, least)
                if not isinstance(value, int) or value < least:
                    raise UserError(f"{self.source} is damaged: its {name} is {value!r}")
        inherit_pixels(args, self.resumed.get("args", {}), self.source, resume == "auto")
        if self.resumed and resume == "auto":
            changes.check_experiment(self.resumed, args, self.source)
        resolve(args, self.resumed)

    def _others(self, resume: str) -> str:
        """What else there is to resume where `--resume auto` found a checkpoint that is damaged."""
        if resume != "auto":
            return ""
        for epoch in reversed(self._numbered()):
            path = self.folder / NUMBERED.format(epoch)
            with contextlib.suppress(UserError):
                load(path)
                return f"; {path} is good: --resume {path} continues from it"
        return "; no numbered one is good either: --overwrite starts over"

    def _numbered(self) -> list[int]:
        """The epochs of the numbered checkpoints."""
        names = [re.fullmatch(NUMBERED.format(r"(\d+)"), p.name) for p in self.folder.iterdir()]
        return sorted(int(name[1]) for name in names if name)

    def last_saved(self) -> str:
        """What a run that ends now leaves; called by all ranks."""
        saved = from_rank_zero(lambda: self._background.wait() or self._saved)
        return f"{LAST} is of {saved}" if saved else "this run has saved nothing yet"

    def resume(self, model: nn.Module, **states: Any) -> None:
        """Registers model and optimizer, and loads the checkpoint to resume, if any.

        Args:
            model: not wrapped in DDP.
            **states: what else has `state_dict()` and is part of the run: optimizer, scaler, ...
        Raises:
            UserError: the checkpoint is of another run.
        """
        self._model, self._states = model, states
        state, path = self.resumed, self.source
        changes.check_same_everywhere(state, path)
        if not state:
            return
        if missing := {*states, "epoch"} - state.keys():
            lacking = " and no ".join(sorted(missing))
            other = "--init of main_pretrain.py, and --finetune, start from weights alone"
            raise UserError(f"{path} cannot be resumed: it has no {lacking}; {other}")
        changes.load_weights(model, state, self.args, path)
        for name, part in states.items():
            try:
                load_state(part, state.pop(name))
            except MISFIT as error:
                why = f"its {name} state belongs to another objective or precision"
                line = str(error).splitlines()[0]
                raise UserError(f"{path} cannot be resumed: {why} ({line})") from None
        self.epoch = state["epoch"] + 1
        # In images: with another global batch, a step that they fill only in part is repeated.
        self.step = state.get("images", 0) // global_batch(self.args)
        self.best = state.get("best", self.best)
        place = f"epoch {self.epoch}, step {self.step}"
        logger.info(f"resumed {path}: {place}")
        if self.folder is not None and Path(path).resolve() == (self.folder / LAST).resolve():
            self._saved = place
        same_steps = state.get("global_batch") == global_batch(self.args)
        changes.tell_changes(state, vars(self.args), self._given, same_steps)
        if self.epoch >= (epochs := self.args.epochs):
            logger.info(f"all {epochs} epochs are done; a larger --epochs trains longer")

    def begin(self, loader: DeviceLoader, metrics: MetricLogger, steps: int) -> None:
        """Registers what changes within an epoch, loads its state, if any, and opens the folder.

        Args:
            steps: of an epoch.
        Raises:
            UserError: the checkpoint does not fit, or the folder cannot be written.
        """
        self._loader, self._metrics, self._steps = loader, metrics, steps
        state, self.resumed = self.resumed, {}
        changes.check_data(state, self.data, self.classes, self.source)
        if self.step > steps:
            at = f"it is at step {self.step}, but an epoch has {steps}"
            raise UserError(f"{self.source} cannot be resumed: {at}")
        position = self.epoch * steps + self.step
        self.offset = state.get("logged_steps", position) - position
        before = state.get("args", {}).get("data_path", self.args.data_path)
        if Path(before) == Path(self.args.data_path):  # of other data they do not count
            loader.remember_bad(map(str, state.get("bad_images", [])))
        if self.step and state.get("metrics"):
            device = next(self._model.parameters()).device
            try:
                metrics.load_state_dicts(state["metrics"], device)
            except MISFIT:
                raise UserError(f"{self.source} is damaged: its metrics are malformed") from None
        from_rank_zero(lambda: open_folder(self.args, self.epoch))

    def after_step(self, check: Callable[[], Any]) -> None:
        """Counts a step of the epoch; else as `poll`."""
        self.step += 1
        self.poll(check)

    def poll(self, check: Callable[[], Any] | None = None) -> None:
        """Saves the current position when the interval is over, or when asked to stop.

        Called by all ranks equally often: after each step, and while the epoch is evaluated.

        Args:
            check: raises UserError on all ranks if the state must not be saved.
        Raises:
            UserError: as `check`; or the state cannot be saved before stopping; on all ranks.
            Stopped: some rank got a signal; on all ranks, after saving.
        """
        number, due = self._interrupts.poll()
        check_locks()
        self._report()
        if not (number or due):
            return
        if check is not None:
            check()
        metrics = [None] * get_world_size()
        dist.all_gather_object(metrics, self._metrics.state_dict(), group=host_group())
        position = {"images": self.step * global_batch(self.args), "metrics": metrics}
        self._save([LAST], position, last_chance=bool(number))
        if number:
            raise Stopped(number, agreed=True, saved=self.folder is not None)

    def save(self, epoch: int, score: float | None = None) -> None:
        """Saves the state after an epoch: every save_freq epochs numbered, and as the last.

        If it is neither the best, numbered nor the run's end, only when the interval is over.

        Args:
            score: the state with rank 0's highest one so far is also saved as the best.
        Raises:
            UserError: the last epoch's cannot be saved; on all ranks.
        """
        self.epoch, self.step = epoch + 1, 0
        final = self.epoch == self.args.epochs
        names = []
        score = from_rank_zero(lambda: score)  # sums in another order may make another's the best
        if score is not None and score > self.best:
            self.best = score
            names.insert(0, BEST)
        if final or self.epoch % self.args.save_freq == 0:
            names.insert(0, NUMBERED.format(epoch))
        if names or from_rank_zero(self._interrupts.is_due):
            # The last comes last: a run that is killed before it repeats the epoch.
            self._save([*names, LAST], {}, final)

    def _save(self, names: list[str], position: dict[str, Any], last_chance: bool) -> None:
        """Takes a copy of the state on rank 0, while others wait, and writes files from it."""
        self._interrupts.saved()
        if self.folder is not None:
            from_rank_zero(lambda: self._write(names, position, last_chance))

    def _write(self, names: list[str], position: dict[str, Any], last_chance: bool) -> None:
        """Waits for the files, and raises UserError if one fails, only if it is the last chance."""
        state = {name: part.state_dict() for name, part in self._states.items()} | position
        state |= {"model": self._model.state_dict(), "epoch": self.epoch - 1}
        state |= {"args": vars(self.args), "given_accum_iter": self._given["accum_iter"]}
        state["given_lr"] = self._given["lr"]
        state |= {"world_size": get_world_size(), "global_batch": global_batch(self.args)}
        state |= {"data": self.data, "classes": self.classes}
        state |= {"bad_images": sorted(self._loader.bad), "best": self.best}
        state["logged_steps"] = self.offset + self.epoch * self._steps + self.step
        self._background.wait()  # it may still write from the copy before
        self._report()
        state, place = self._copy.take(state), f"epoch {self.epoch}, step {self.step}"
        self._background.start(partial(self._write_files, state, names, place, self.epoch))
        if last_chance:
            self._background.wait()
            for error in self._background.failures():
                raise error

    def _report(self) -> None:
        """Warns of what could not be written, which only rank 0 knows."""
        for error in self._background.failures():
            logger.warning(f"warning: {error}; training continues; the next save tries again")

    def _write_files(
        self, state: dict[str, Any], names: list[str], place: str, epoch: int
    ) -> list[UserError]:
        """Tries all files, in a thread; returns the failures."""
        failed, written = [], None
        for name in names:
            path = self.folder / name
            try:
                if written is None or not copy_file(written, path):
                    save(state, path)
                written = path
                if name == LAST:
                    self._saved = place
            except UserError as error:
                failed.append(error)
        if self.args.keep_last and not failed:
            self._remove_old(epoch)
        return failed

    def _remove_old(self, epoch: int) -> None:
        """Removes numbered checkpoints but the newest before an epoch; never any later ones."""
        try:
            past = [number for number in self._numbered() if number < epoch]
            for number in past[: -self.args.keep_last]:
                (self.folder / NUMBERED.format(number)).unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"warning: cannot remove old checkpoints: {error}")


def resolve(args: argparse.Namespace, state: dict[str, Any]) -> None:
    """Sets `accum_iter` and `lr`, which depend on the number of processes; a run sets no others.

    With more or fewer processes than before, fewer or more batches are accumulated, if that gives
    the same global batch: then steps per epoch and learning rate stay what they were.

    Args:
        state: the checkpoint to resume, or {}.
    """
    before, images = state.get("world_size"), state.get("global_batch")
    now = get_world_size()
    flags = state.get("args", {}).get("batch_size"), state.get("given_accum_iter")
    same_flags = repr(flags) == repr((args.batch_size, args.accum_iter))
    # With as many processes as before: other flags are intended, the same were adapted before.
    if images and (before != now or (same_flags and images != global_batch(args))):
        accum, rest = divmod(images, args.batch_size * now)
        if accum and not rest:
            args.accum_iter = accum
            kept = f"with --accum_iter {accum} the global batch stays {images}"
        else:
            kept = f"the global batch was {images} and is {global_batch(args)}"
        if before != now:
            kept = f"not bit-exact from here: {before} processes before, {now} now; {kept}"
        logger.info(kept)
    scale_learning_rate(args)


def load_state(part: Any, state: dict[str, Any]) -> None:
    """Loads a state; an optimizer keeps the settings of the flags (learning rate, decay, ...).

    Raises:
        Exception: one of `MISFIT`: the state is of another kind, or its tensors do not fit, so that
            an optimizer's step would read or write beyond them.
    """
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(state)
        return
    settings = part.state_dict()["param_groups"]
    sizes = [[len(g["params"]) for g in groups] for groups in (state["param_groups"], settings)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"groups of {sizes[0]} parameters, not {sizes[1]}")
    part.load_state_dict({"state": state["state"], "param_groups": settings})
    for parameter, values in part.state.items():
        for name, value in values.items():
            shape = torch.Size() if name == "step" else parameter.shape
            dense = value.is_contiguous() or value.stride() == parameter.stride()
            if value.shape != shape or not dense:
                raise ValueError(f"{name} is not a tensor of shape {list(shape)}")
