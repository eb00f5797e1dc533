"""Flags that differ between a checkpoint and the run that resumes it."""

import argparse
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from util.data.source import few
from util.distributed import from_rank_zero, max_over_ranks
from util.errors import UserError
from util.idle import idle_of
from util.recipes import RECIPES
from util.weights import load_model

logger = logging.getLogger(__name__)

# Flags that define the experiment, of all scripts together; with those of a recipe.
EXPERIMENT = (
    "seed", "model", "input_size", "weight_mae", "weight_simclr", "noise_loss", "mask_ratio", "std",
    "global_pool", "layer_decay", "cache_features", "augment", "flip", "rotate90", "blur_prob",
    "local_negatives",
)  # fmt: skip
# What checkpoints mean that are older than some flags.
OLD = RECIPES["release"] | {
    "recipe": "release", "augment": "ssl", "flip": None, "rotate90": False, "blur_prob": 0.5,
    "local_negatives": False,
}  # fmt: skip
# Flags that may differ at a resume without changing what is learnt.
INDIFFERENT = (
    "device", "num_workers", "pin_mem", "output_dir", "log_dir", "save_freq", "save_interval",
    "keep_last", "resume", "overwrite", "start_epoch", "compile", "world_size", "local_rank",
    "dist_on_itp", "dist_url", "eval", "dist_eval", "eval_freq", "predict", "grad_checkpointing",
    "finetune", "init",
)  # fmt: skip
# Of the model, also where it makes no use of what they shape.
SHAPES = {"projection_layers", "projection_dim", "projection_norm"}
SHAPES |= {"mask_token_width", "noise_level_tokens"}
COUNT = r"\w+: ([\d,]+) images"  # how the words of a split begin
MIXED = ": in another order from here on, some of this epoch's twice, some not at all"
SCHEDULE = "the learning rate follows the new schedule from here on"
IMAGES = "the epoch continues at the same image, in steps of the new size"
MEANING = dict.fromkeys(("epochs", "warmup_epochs", "lr", "blr", "min_lr"), SCHEDULE)
MEANING |= dict.fromkeys(("batch_size", "accum_iter"), IMAGES)
MEANING["data_path"] = "the epoch continues at the same position, of what images are there now"
MEANING["shuffle_window"] = "in another order: some images of this epoch are seen twice, some not"


def check_experiment(state: dict[str, Any], args: argparse.Namespace, source: str | Path) -> None:
    """Raises UserError if `--resume auto` found a checkpoint of another script or objective."""
    there, here = OLD | state.get("args", {}), OLD | vars(args)
    find = idle_of(here)
    unused = (find(here | there).keys() & find(here).keys()) - SHAPES
    names = (*EXPERIMENT, *RECIPES["release"]) if state.get("args") else ()
    if differing := _differing([n for n in names if n not in unused], there, here):
        name, words = next(iter(differing.items()))
        if name in RECIPES["release"]:  # the one flag that sets it and others, if that differs
            words = _differing(["recipe"], there, here).get("recipe", words)
        other = "" if differing.keys() & SHAPES else f", or --resume {source}"
        raise UserError(
            f"--resume auto: {source} is of another experiment: {words}; "
            f"give another --output_dir{other}"
        )


def _differing(names: Iterable[str], there: dict[str, Any], here: dict[str, Any]) -> dict[str, str]:
    """Words about each of these flags that a checkpoint has otherwise, by the flag's name."""
    flags = {n: [repr(f[n]) if n in f else "no flag" for f in (there, here)] for n in names}
    return {n: f"--{n} is {a} there, {b} here" for n, (a, b) in flags.items() if a != b}


def load_weights(
    model: nn.Module, state: dict[str, Any], args: argparse.Namespace, source: str | Path
) -> None:
    """Takes a checkpoint's weights out of it.

    Raises:
        UserError: they do not fit; also names the flags by which shapes may differ.
    """
    try:
        load_model(model, state.pop("model"), source)
    except UserError as error:
        there, here = OLD | state.get("args", {}), vars(args)
        differ = _differing(sorted(SHAPES & here.keys()), there, here).values()
        raise UserError("; ".join([str(error), *differ])) from None


def check_same_everywhere(state: dict[str, Any], source: str | Path) -> None:
    """Raises UserError, on every rank, if another rank has read another checkpoint than rank 0."""
    place = [state.get(name) for name in ("epoch", "images", "logged_steps")]
    if max_over_ranks(int(place != from_rank_zero(lambda: place))):
        raise UserError(
            f"{source} is not the same on all machines: it must be one file, in a folder they share"
        )


def check_data(
    state: dict[str, Any], data: dict[str, str], classes: list[str], source: str | Path
) -> None:
    """Prints if there are other numbers of images than a checkpoint's run had.

    Args:
        data: `settle_pixels`'s words.
        classes: the classifier's.
    Raises:
        UserError: the checkpoint's classifier has classes of other names.
    """
    for split, words in data.items():
        counts = re.match(COUNT, state.get("data", {}).get(split, "")), re.match(COUNT, words)
        if all(counts) and counts[0][1] != counts[1][1]:
            had, has = (count[1] for count in counts)
            mixed = MIXED if split == "train" and state.get("images") else ""
            logger.info(f"changed: {split} had {had} images, has {has}{mixed}")
    before = state.get("classes")
    if before and before != classes:
        odd = few(sorted(set(before) ^ set(classes))) or "the same, in another order"
        other = "--finetune starts from weights alone"
        raise UserError(f"{source} cannot be resumed: its classes are others ({odd}); {other}")


def tell_changes(
    state: dict[str, Any], flags: dict[str, Any], given: dict[str, Any], same_steps: bool
) -> None:
    """Prints which flags differ from those of the checkpoint, and what that means.

    Args:
        given: `accum_iter` and `lr` before they were resolved.
        same_steps: whether the global batch is what it was.
    """
    before = OLD | state["args"] if "args" in state else {}
    before |= {"lr": given["lr"]}
    before |= {name: state[key] for name in given if (key := f"given_{name}") in state}
    for name, value in (flags | given).items():
        if name in before and before[name] != value and name not in INDIFFERENT:
            meaning = MEANING.get(name, "it holds from here on")
            meaning = "steps stay as large" if meaning == IMAGES and same_steps else meaning
            logger.info(f"changed: --{name} was {before[name]}, is {value}: {meaning}")
