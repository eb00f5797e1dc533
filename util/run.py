"""One training run: where its state comes from and goes to, and when."""

import argparse
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from util.checkpoint import BEST, LAST, NUMBERED, load, load_model, save
from util.distributed import from_rank_zero, get_world_size, host_group
from util.errors import Stopped, UserError
from util.interrupt import Interrupts, no_poll
from util.loader import DeviceLoader
from util.lr_sched import global_batch
from util.misc import MetricLogger

logger = logging.getLogger(__name__)

# What else a run goes on from, with its types.
PARTS = {
    "optimizer": dict,
    "scaler": dict,
    "metrics": list,
    "bad_images": list,
    "log": list,
    "epoch": int,
    "images": int,
    "world_size": int,
    "global_batch": int,
    "given_accum_iter": int,
    "best": float | int,
}
# Flags that make another experiment of a run, in all scripts together.
EXPERIMENT = (
    "seed",
    "model",
    "input_size",
    "weight_mae",
    "weight_simclr",
    "weight_noise",
    "noise_loss",
    "norm_pix_loss",
    "mask_ratio",
    "std",
    "global_pool",
    "layer_decay",
    "cache_features",
)
# What optimisers remember of each parameter: "step" is a number, the others have its shape.
MEMORIES = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "LARS": {"mu"}}
MOST_EPOCHS = 10**6  # -1 of them are done in the first


class Run:
    """Saves and resumes: after epochs, after minutes, when asked to stop.

    A checkpoint's `epoch` is the last complete one, `images` those of the next that were trained
    on, `metrics` what each rank has measured in them. Random numbers need no state: they are a
    function of (seed, epoch, step, rank), see `util.misc.seed_all`.

    `epoch` and `step` are where the run stands, `best` is the highest score so far;
    `waiting` are lines of log.txt that a full disk has kept out of it.

    Args:
        args: output_dir ('' saves nothing), data_path, save_freq, save_interval, keep_last, epochs,
            start_epoch; accum_iter may change, see `_keep_global_batch`.
        resume: what `--resume` says; '' for nothing to go on from.
    Raises:
        UserError: no such checkpoint, not a checkpoint, or with `auto` one of another experiment.
    """

    def __init__(self, args: argparse.Namespace, resume: str):
        self.args, self._given_accum_iter = args, args.accum_iter
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.epoch, self.step = args.start_epoch, 0
        self.best = -math.inf
        self._interrupts = Interrupts(60 * args.save_interval)
        self._metrics: MetricLogger | None = None
        self._loader: DeviceLoader | None = None
        self._measured: list[dict] = []  # the ranks' metrics of the epoch that is resumed
        self._bad: set[str] = set()  # images, of the training loader's
        self.waiting: list[str] = []
        self._resumed: dict[str, Any] | None = None
        self._source = self.folder / LAST if resume == "auto" else resume
        if resume == "auto" and not from_rank_zero(lambda: _exists(self._source)):
            logger.info(f"no {self._source} yet: starting from the beginning")
        elif resume:
            self._resumed = load(self._source)
            check_position(self._resumed, self._source)
            if resume == "auto":
                check_experiment(self._resumed, args, self._source)
            self._keep_global_batch(self._resumed)

    def _keep_global_batch(self, state: dict[str, Any]) -> None:
        """Where there are more or fewer processes than before, accumulates fewer or more batches.

        So the steps per epoch and the learning rate stay what they were, if the batches allow it.
        """
        before, images = state.get("world_size"), state.get("global_batch")
        now = get_world_size()
        flags = state.get("args", {}).get("batch_size"), state.get("given_accum_iter")
        same_flags = repr(flags) == repr((self.args.batch_size, self.args.accum_iter))
        # With as many processes, other flags are meant; the same ones were adapted before.
        if before is None or (
            before == now and (not same_flags or images == global_batch(self.args))
        ):
            return
        accum, rest = divmod(images, self.args.batch_size * now)
        if accum and not rest:
            self.args.accum_iter = accum
            kept = f"with --accum_iter {accum} the global batch stays {images}"
        else:
            kept = f"the global batch was {images} and is {global_batch(self.args)}"
        if before != now:
            kept = f"not bit-exact from here: {before} processes before, {now} now; {kept}"
        logger.info(kept)

    def resume(self, model: nn.Module, **states: Any) -> None:
        """Takes up what is trained, and loads what there is to go on from.

        Args:
            model: not wrapped in DDP.
            **states: what else has `state_dict()` and is part of the run: optimizer, scaler, ...
        Raises:
            UserError: the checkpoint is of another run.
        """
        self.model, self.states = model, states
        state, path = self._resumed, self._source
        self._resumed = None  # it may be large
        if state is None:
            return
        load_model(model, state["model"], path)
        for name, part in states.items():
            if name not in state:
                raise UserError(f"{path} cannot be resumed: it has weights, but no {name} state")
            try:
                if isinstance(part, torch.optim.Optimizer):
                    load_optimizer(part, state[name])
                else:
                    part.load_state_dict(state[name])
            except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path} cannot be resumed: its {name} state belongs to another objective or "
                    f"precision ({str(error).splitlines()[0]})"
                ) from None
        if "epoch" not in state:
            raise UserError(f"{path} cannot be resumed: it has no epoch")
        self.epoch = state["epoch"] + 1
        # In images: with another global batch, the step that they fill only in part is repeated.
        self.step = state.get("images", 0) // global_batch(self.args)
        self._measured = state.get("metrics", [])
        here = ("image ", str(Path(self.args.data_path)))  # elsewhere the same files count anew
        self._bad = {str(n) for n in state.get("bad_images", []) if str(n).startswith(here)}
        self.waiting += map(str, state.get("log", []))
        self.best = state.get("best", self.best)
        logger.info(f"resumed {path}: epoch {self.epoch}, step {self.step}")

    def begin_epoch(
        self, epoch: int, metrics: MetricLogger, loader: DeviceLoader, steps: int
    ) -> int:
        """The steps of this epoch, of `steps`, that are done already.

        `metrics` takes up what they measured, and the loader which images are known to be bad.

        Raises:
            UserError: the checkpoint's are not of this epoch.
        """
        self.epoch, self._metrics, self._loader = epoch, metrics, loader
        if self.step > steps:
            raise UserError(
                f"{self._source} cannot be resumed: {self.step} steps of the epoch are done, which "
                f"has {steps}"
            )
        loader.bad |= self._bad
        if self.step and self._measured:
            device = next(self.model.parameters()).device
            try:
                metrics.load_state_dicts(self._measured, device)
            except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError):
                raise UserError(f"{self._source} is damaged: its metrics are not ours") from None
        self._measured = []
        return self.step

    def after_step(self, check: Callable[[], Any]) -> None:
        """Counts a step of the epoch; else as `poll`."""
        self.step += 1
        self.poll(check)

    def poll(self, check: Callable[[], Any] = no_poll) -> None:
        """Saves where the run stands when the interval is over, or when asked to stop.

        Called by all ranks equally often: after each step, and while the epoch is evaluated.

        Args:
            check: raises UserError on all ranks where the state is not fit to be saved.
        Raises:
            UserError: as `check`; or the state cannot be saved before stopping; on all ranks.
            Stopped: some rank got a signal; on all ranks, after saving.
        """
        number, due = self._interrupts.poll()
        if not (number or due):
            return
        check()
        metrics = [None] * get_world_size()
        torch.distributed.all_gather_object(metrics, self._metrics.state_dict(), group=host_group())
        position = {"images": self.step * global_batch(self.args), "metrics": metrics}
        self._save([LAST], position, bool(number), self.best)
        if number:
            raise Stopped(number, saved=self.folder is not None)

    def save(self, epoch: int, score: float | None = None) -> None:
        """Saves the state after an epoch: always the last, every save_freq epochs a numbered.

        Args:
            score: the state with the highest so far is also kept as the best.
        Raises:
            UserError: the last epoch's cannot be saved; on all ranks.
        """
        self.epoch, self.step = epoch + 1, 0
        final = self.epoch == self.args.epochs
        names = [LAST]  # written last: whoever is killed before repeats this epoch, and its files
        best_before = self.best
        if score is not None and score > self.best:
            self.best = score
            names.insert(0, BEST)
        if final or self.epoch % self.args.save_freq == 0:
            names.insert(0, NUMBERED.format(epoch))
        self._save(names, {}, final, best_before)

    def _save(
        self, names: list[str], position: dict[str, Any], last_chance: bool, best_before: float
    ) -> None:
        """Writes files on rank 0, while others wait; only the last chance's failure is an error."""
        self._interrupts.saved()
        if self.folder is None:
            return

        def write() -> None:
            try:
                self._write(names, position, best_before)
            except UserError as error:
                if last_chance:
                    raise
                logger.warning(f"warning: {error}; the run goes on, and tries again when it saves")

        from_rank_zero(write)

    def _write(self, names: list[str], position: dict[str, Any], best_before: float) -> None:
        """Raises UserError with the first failure, after trying all files."""
        state = {name: part.state_dict() for name, part in self.states.items()} | position
        state |= {"model": self.model.state_dict(), "epoch": self.epoch - 1}
        state |= {"args": vars(self.args), "given_accum_iter": self._given_accum_iter}
        state |= {"world_size": get_world_size(), "global_batch": global_batch(self.args)}
        state |= {"bad_images": sorted(self._loader.bad), "log": list(self.waiting)}
        failed = []
        for name in names:
            try:
                save(state | {"best": self.best}, self.folder / name)
            except UserError as error:
                failed.append(error)
                if name == BEST:
                    self.best = best_before
        if failed:
            raise failed[0]
        if self.args.keep_last:
            self._remove_old()

    def _remove_old(self) -> None:
        """Removes numbered checkpoints but the newest; never any of later epochs than this."""
        try:
            names = [re.fullmatch(NUMBERED.format(r"(\d+)"), p.name) for p in self.folder.iterdir()]
            epochs = sorted(int(name[1]) for name in names if name)
            past = [epoch for epoch in epochs if epoch < self.epoch]
            for epoch in past[: -self.args.keep_last]:
                (self.folder / NUMBERED.format(epoch)).unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"warning: cannot remove old checkpoints: {error}")


def _exists(path: Path) -> bool:
    """Raises UserError where that cannot be told."""
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def check_position(state: dict[str, Any], source: str | Path) -> None:
    """Raises UserError where what `load` returned has parts that no run of ours wrote."""
    for name, kind in PARTS.items():
        if name in state and not isinstance(state[name], kind):
            raise UserError(f"{source} is damaged: its {name} is a {type(state[name]).__name__}")
    if ("world_size" in state) != ("global_batch" in state) or state.get("global_batch", 1) < 1:
        raise UserError(
            f"{source} is damaged: its global_batch is {state.get('global_batch')}, its "
            f"world_size {state.get('world_size')}"
        )
    if not -1 <= state.get("epoch", 0) <= MOST_EPOCHS or state.get("images", 0) < 0:
        raise UserError(
            f"{source} is damaged: its epoch is {state.get('epoch')}, of which "
            f"{state.get('images', 0)} images are done"
        )


def check_experiment(state: dict[str, Any], args: argparse.Namespace, source: str | Path) -> None:
    """Raises UserError where `--resume auto` found a checkpoint of another script or objective."""
    there, here = state.get("args", {}), vars(args)
    for name in EXPERIMENT if there else ():
        values = [repr(flags[name]) if name in flags else "no flag" for flags in (there, here)]
        if values[0] != values[1]:
            raise UserError(
                f"--resume auto: {source} is of another experiment: --{name} is {values[0]} there, "
                f"{values[1]} here; give another --output_dir, or --resume {source}"
            )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what an optimiser remembers of each parameter; its settings stay those of the flags.

    Raises:
        ValueError: it remembers something else, in which its step might read or write beyond ends.
        KeyError, TypeError, AttributeError: it is no optimiser's state at all.
    """
    fresh = optimizer.state_dict()["param_groups"]
    sizes = [
        [len(group["params"]) for group in groups] for groups in (state["param_groups"], fresh)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(f"groups of {sizes[0]} parameters there, of {sizes[1]} here")
    optimizer.load_state_dict({"state": state["state"], "param_groups": fresh})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if set(optimizer.state) - set(parameters):
        raise ValueError("it remembers parameters that are not there")
    for parameter, memory in optimizer.state.items():
        if not MEMORIES.get(type(optimizer).__name__, set()) <= set(memory):
            raise ValueError(f"of a parameter it remembers {', '.join(map(str, memory))}")
        for name, value in memory.items():
            shape = torch.Size() if name == "step" else parameter.shape
            if not isinstance(value, Tensor) or value.shape != shape:
                raise ValueError(f"{name} is no tensor of its parameter's shape {list(shape)}")
            there = value.is_contiguous() or value.stride() == parameter.stride()
            if not (there and value.isfinite().all()):
                raise ValueError(f"{name} is not finite, or not all there")
