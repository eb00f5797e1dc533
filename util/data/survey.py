"""What was opened, in words; and what a run needs to know of its images' pixels beforehand."""

import argparse
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from util.data.image_folder import left_out_words
from util.data.images import (
    BadImage,
    NotPillows,
    content_of,
    has_pages,
    is_deep,
    loses_bits,
    open_image,
    upright_size,
)
from util.data.pixels import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Pixels,
    dtype_range,
    read_array,
    without_alpha,
)
from util.data.source import Source
from util.distributed import from_rank_zero
from util.errors import UserError
from util.idle import idle_of

logger = logging.getLogger(__name__)

SOME = 10_000_000  # labels counted at once: bounds the memory for it
LOOKED_AT, MEASURED = 100, 1000  # images: for the words, and for ranges, means and deviations
PER_IMAGE = 4096  # pixels that a measurement takes at least, and less than twice of,
VALUES = 6 * PER_IMAGE  # up to so many values of all channels: fewer pixels of more than 3
TAILS = (0.1, 99.9)  # percentiles that `--pixel_range auto` maps to 0 and 1
UNUSED = 8  # a range that is wider than the values by this much is worth a word
PIXEL_FLAGS = ("in_chans", "pages", "pixel_range", "pixel_mean", "pixel_std")
# What a checkpoint without a value was trained with; its images had 8 bits.
UNSAID = {"in_chans": (3,), "pages": ("first",), "pixel_range": ("dtype", [0, 255])}


def inherit_pixels(
    args: argparse.Namespace, flags: dict[str, Any], source: Any, strict: bool = False
) -> None:
    """Takes what flags say of pixels, `--resize` and flips from a checkpoint's, unless given.

    Raises:
        UserError: those of pixels differ, and `strict`; otherwise, and of `--resize`, a warning
            says so.
    """
    _inherit_flips(args, flags, source)
    theirs = flags.get("resize") or args.resize
    args.resize = args.resize or theirs
    if args.resize != theirs:
        logger.warning(f"warning: --resize is {args.resize}, but {theirs} in {source}")
    for name in PIXEL_FLAGS if flags.keys() & set(PIXEL_FLAGS) else ():
        theirs, ours = flags.get(name), getattr(args, name)
        other = args.in_chans not in (None, flags.get("in_chans") or 3)
        if other and name.startswith("pixel_"):  # of other channels
            continue
        alike = UNSAID.get(name, (ours,)) if theirs is None else (theirs,)
        if ours in (None, "auto") and theirs not in (None, "dtype"):  # which the data decide
            setattr(args, name, theirs)
            if ours == "auto":
                logger.info(f"--{name} {_words(theirs)}, as {source} has it")
        elif ours is not None and ours not in alike:
            differs = f"--{name} is {_words(ours)}, but {_words(alike[0])} in {source}"
            if strict:
                raise UserError(differs)
            logger.warning(f"warning: {differs}")


def _inherit_flips(args: argparse.Namespace, flags: dict[str, Any], source: Any) -> None:
    """Takes `--flip` and `--rotate90` from a checkpoint's flags, unless given; says so if used."""
    own = vars(args)
    if "flip" not in own or not (flags or own.get("augment") == "none"):
        return
    theirs = {"flip": flags.get("flip"), "rotate90": flags.get("rotate90", False)}
    was_none, is_none = (some.get("augment") == "none" for some in (flags, own))
    if was_none and not is_none:
        theirs["flip"] = theirs["flip"] or "none"
    if is_none and not was_none:  # it asks for none, whatever was before
        theirs = {"flip": None, "rotate90": False}
    unused = idle_of(own)(own)
    for name, value in theirs.items():
        if own[name] is None:
            setattr(args, name, value)
            if value and name not in unused:
                words = "" if value is True else f" {value}"
                logger.info(f"--{name}{words}, as {source} has it")


def settle_pixels(args: argparse.Namespace, **splits: Dataset) -> dict[str, str]:
    """Sets what flags leave open of channels, range, mean and deviation; by the first split.

    Args:
        args: resize, rotate90 and the flags of `PIXEL_FLAGS`, which are overwritten, and so saved.
        **splits: data sets by name.
    Returns:
        What was opened, in words, by split; it has been logged.
    Raises:
        UserError: the images have another number of channels, or no known range.
    """

    def settle() -> tuple[dict[str, Any], dict[str, str]]:
        surveys = {name: Survey(data, args) for name, data in splits.items() if data}
        words = {name: survey.words(name) for name, survey in surveys.items()}
        for line in words.values():
            logger.info(line)
        first = next(iter(surveys.values()))
        first.warn()
        _measure(args, first.dataset)
        return {name: getattr(args, name) for name in PIXEL_FLAGS}, words

    found, words = from_rank_zero(settle)
    vars(args).update(found, resize=args.resize or "crop")
    if vars(args).get("rotate90", "") is None:
        args.rotate90 = False
    return words


class Survey:
    """A sample of a data set's images, as they are in their files."""

    def __init__(self, dataset: Dataset, args: argparse.Namespace):
        self.dataset, self.args = dataset, args
        self.kinds: Counter[str] = Counter()
        self.sizes: list[tuple[int, int]] = []
        self.paged = self.alpha = self.bad = self.lossy = 0
        self.low, self.high, self.limit = np.inf, -np.inf, 0.0
        for image in _sample(dataset, LOOKED_AT):
            try:
                self._look_at(image)
            except BadImage:
                self.bad += 1

    def _look_at(self, image: Image.Image | NotPillows) -> None:
        size = upright_size(image)
        if paged := has_pages(image):
            image = open_image(content_of(image))  # at the first page
        if image.format == "JPEG":  # an eighth of the size tells enough
            image.draft(None, (1, 1))
        array, kind = read_array(image, self.args.pages or "first")
        self.sizes.append(size)
        if image.format in ("AVIF", "JPEG2000") and array.dtype == np.uint8:
            self.lossy += loses_bits(image)
        self.paged += paged
        self.alpha += kind == "alpha"
        channels = array.shape[2]
        names = {("colour", 1): "grey", ("colour", 3): "RGB"}
        alpha = "grey with alpha" if channels == 2 else "RGB with alpha"
        name = alpha if kind == "alpha" else names.get((kind, channels), f"{channels} channels")
        self.kinds[f"{name} {array.dtype}"] += 1
        if array.dtype.kind in "ub":
            self.limit = max(self.limit, dtype_range(array)[1])
        used = without_alpha(array, kind, self.args.in_chans or 3)
        low, high = float(np.nanmin(used)), float(np.nanmax(used))
        self.low, self.high = min(self.low, low), max(self.high, high)

    def words(self, split: str) -> str:
        """One line."""
        data = self.dataset
        files = getattr(data, "dataset", data)  # of which it may be a part
        parts = [f"{split}: {len(data):,} images"]
        if isinstance(files, Source):
            parts[0] += f" of {files.where}" + _classes_words(files, data.targets)
            if files.left_out:
                parts.append(f"left out {left_out_words(files.left_out)}")
        if self.sizes:
            kinds = [
                f"{k} ({n})" if len(self.kinds) > 1 else k for k, n in self.kinds.most_common()
            ]
            low, high = (pick(self.sizes, key=np.prod) for pick in (min, max))
            sizes = _size(low) if low == high else f"{_size(low)} to {_size(high)}"
            seen = (
                f"{len(self.sizes)} looked at" if len(self.sizes) < len(data) else "all looked at"
            )
            values = f"values {self.low:g} to {self.high:g}"
            parts.append(f"{seen}: {', '.join(kinds)}, {sizes} pixels, {values}")
        if self.bad:
            parts.append(f"{self.bad} of those looked at are not readable")
        return "; ".join(parts)

    def warn(self) -> None:
        """What is dropped or made worse, and the flag for it."""
        chans, given = self.args.in_chans or 3, self.args.pixel_range
        if self.paged and self.args.pages is None:
            logger.warning(
                f"warning: {self.paged} of {len(self.sizes)} images have several frames or pages: "
                "only the first is used; --pages channels takes them as channels"
            )
        if self.alpha and chans not in (2, 4):
            logger.warning(f"warning: {self.alpha} images have an alpha channel, which is not used")
        if self.lossy:
            logger.warning(f"warning: {self.lossy} images have more bits than the 8 that are read")
        grey = [k for k in self.kinds if k.startswith("grey")]
        if chans == 3 and grey:
            logger.info("grey images are read as RGB; --in_chans 1 takes them as they are")
        if chans == 1 and len(grey) < len(self.kinds):
            logger.info("RGB images are read as grey")
        span = self.high - self.low
        if given is None and self.limit > 255 and 0 < self.high * UNUSED < self.limit:
            logger.warning(
                f"warning: values reach {self.high:g} of {self.limit:g}: --pixel_range 0 "
                f"{2 ** int(np.ceil(np.log2(self.high + 1))) - 1}, or auto, uses the whole scale"
            )
        elif self.limit and self.sizes and span * 32 < self.limit and given is None:
            logger.warning(
                f"warning: nearly constant: values {self.low:g} to {self.high:g} of "
                f"{self.limit:g}; --pixel_range auto stretches them"
            )


def _classes_words(data: Source, labels: np.ndarray) -> str:
    if data.classes == [""]:
        return ", without classes"
    counts = np.zeros(len(data.classes) + 1, np.int64)  # the last for those without a label
    for some in np.array_split(labels, len(labels) // SOME + 1):
        counts += np.bincount(some % len(counts), minlength=len(counts))
    found = [(int(n), name) for name, n in zip(data.classes, counts, strict=False) if n]
    if not found:
        return ", without labels"
    least, most = (pick(found, key=lambda pair: pair[0]) for pick in (min, max))
    empty = f", {len(data.empty)} more without images" if data.empty else ""
    if least[0] == most[0]:
        return f" in {len(found)} classes of {least[0]:,}{empty}"
    span = f"{least[0]:,} ({least[1]}) to {most[0]:,} ({most[1]})"
    return f" in {len(found)} classes, {span}{empty}"


def _measure(args: argparse.Namespace, dataset: Dataset) -> None:
    """Resolves the flags of pixels that depend on the data; `settle_pixels`'s arguments."""
    args.in_chans = args.in_chans or 3
    if args.pixel_range is None and any(map(is_deep, _sample(dataset, MEASURED))):
        args.pixel_range = "dtype"
    if args.pixel_range == "auto":
        args.pixel_range = list(_range_of(_sample(dataset, MEASURED), args))
        logger.info("--pixel_range {:g} {:g}, measured".format(*args.pixel_range))
    pixels = Pixels.of(vars(args) | {"pixel_mean": None, "pixel_std": None})
    _check(pixels, _sample(dataset, LOOKED_AT))
    names = ("pixel_mean", "pixel_std")
    if args.in_chans == 3:  # by default ImageNet's
        args.pixel_mean = args.pixel_mean or list(IMAGENET_MEAN)
        args.pixel_std = args.pixel_std or list(IMAGENET_STD)
    if wanted := [name for name in names if getattr(args, name) in (None, "auto")]:
        found = dict(zip(names, _moments(dataset, pixels), strict=True))
        for name in wanted:
            setattr(args, name, found[name])
            logger.info(f"--{name} {_words(found[name])}, measured")
    for name in names:
        if (count := len(getattr(args, name))) != args.in_chans:
            raise UserError(f"--{name}: {count} values for {args.in_chans} channels")


def _check(pixels: Pixels, images: Iterator) -> None:
    """Raises UserError if none of the images can be read as the flags say; with the reason."""
    reasons = []
    for image in images:
        try:
            pixels.load(image)
            return
        except BadImage as error:
            reasons.append(str(error))
    if reasons:
        raise UserError(f"images cannot be read: {Counter(reasons).most_common(1)[0][0]}")


def _range_of(images: Any, args: argparse.Namespace) -> tuple[float, float]:
    values = []
    for image in images:
        try:
            array, kind = read_array(image, args.pages or "first")
        except BadImage:
            continue
        array = without_alpha(array, kind, args.in_chans)
        values.append(_some(array.reshape(-1, array.shape[2])).ravel())
    if not values:
        raise UserError("--pixel_range auto: no image can be read")
    together = np.concatenate(values, dtype=np.float64)
    low, high = np.percentile(together[np.isfinite(together)], TAILS)
    if low == high:
        raise UserError(f"--pixel_range auto: all pixels are {low:g}")
    return float(low), float(high)


def _moments(dataset: Dataset, pixels: Pixels) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, in 0 .. 1."""
    rows = []
    for image in _sample(dataset, MEASURED):
        try:
            rows.append(_some(pixels.decode(image).flatten(1).T.numpy()))
        except BadImage:
            continue
    if not rows:
        raise UserError("no image can be read to measure mean and deviation")
    together = np.concatenate(rows, dtype=np.float64)
    together /= 255
    deviation = np.maximum(together.std(axis=0), 1e-3)  # of a constant channel
    return [[float(f"{v:.4g}") for v in found] for found in (together.mean(axis=0), deviation)]


def _some(rows: np.ndarray) -> np.ndarray:
    """A copy of some of an image's pixels [M, C], without which all of it would be kept."""
    rows = rows[:: max(1, len(rows) // PER_IMAGE)]
    if rows.size > VALUES:  # by chance: a longer step might see one column only
        count = VALUES // rows.shape[1]
        return rows[np.random.default_rng(0).choice(len(rows), count, replace=False)]
    return rows.copy()


def _sample(dataset: Dataset, count: int) -> Iterator[Image.Image | NotPillows]:
    """Images spread over a data set, not decoded yet; without those that cannot be opened."""
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)):
        try:
            yield dataset[int(index)][0]
        except Exception:  # named when training meets it
            continue


def _size(size: tuple[int, int]) -> str:
    return "{} x {}".format(*size)


def _words(value: Any) -> str:
    return " ".join(f"{v:g}" for v in value) if isinstance(value, list | tuple) else str(value)
