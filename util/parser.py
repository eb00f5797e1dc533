"""`argparse` with errors of one line, types that are ranges, and defaults worth showing."""

import argparse
import math
import os
import sys
from collections.abc import Callable

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are values; a help text says what the others resolve to."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required or action.nargs == 0 or action.default in (None, "", []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """`argparse` with one-line errors, and a `check` of flags that depend on each other.

    Args:
        check: called with the parsed namespace; fills in derived defaults, and raises ValueError
            with the line to show. The process then exits with status 2, as for any bad flag.
        idle: which flags the checked namespace makes no use of, and why; those that were given are
            named, once.
    """

    def __init__(
        self,
        check: Callable[[argparse.Namespace], None] | None = None,
        idle: Callable[[argparse.Namespace], dict[str, str]] | None = None,
        **kwargs,
    ):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        self.check, self.idle, self._named = check, idle, set()

    def parse_args(self, args=None, namespace=None):
        parsed = super().parse_args(args, namespace)
        given = {name: v for name, v in vars(parsed).items() if v != self.get_default(name)}
        if self.check is not None:
            try:
                self.check(parsed)
            except ValueError as error:
                self.error(str(error))
        for name, why in self.idle(parsed).items() if self.idle else ():
            if name in given:
                self._warn(f"{self._option(name, given[name])} is not used here: {why}")
        return parsed

    def _option(self, name: str, value: object) -> str:
        """What gives a flag this value, of several."""
        found = [action for action in self._actions if action.dest == name]
        exact = [action for action in found if action.nargs == 0 and action.const == value]
        return (exact or found)[0].option_strings[0]

    def _warn(self, words: str) -> None:
        if words not in self._named and _is_first():
            print(f"{self.prog}: warning: {words}", file=sys.stderr)
        self._named.add(words)

    def error(self, message: str):
        if _is_first():  # all ranks parse the same flags
            message = message.replace("\n", "\\n")  # file names may hold some
            print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def _is_first() -> bool:
    """Whether this is the only process of a run, or its first, as launchers number them."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


class Sides(argparse.Action):
    """One number, or two that differ, as a list (H, W)."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, "one side, or H and W")
        same = len(set(values)) == 1
        setattr(namespace, self.dest, values[0] if same else values)


class NumbersOr(argparse.Action):
    """Numbers as a list, `count` of them if that is given, or one of some words."""

    def __init__(self, *args, words: tuple[str, ...], count: int | None = None, **kwargs):
        super().__init__(*args, nargs="+", **kwargs)
        self.words, self.count = words, count

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) == 1 and values[0] in self.words:
            setattr(namespace, self.dest, values[0])
            return
        try:
            found = [float(value) for value in values]
        except ValueError:
            found = [math.nan]
        if not all(map(math.isfinite, found)) or len(found) != (self.count or len(found)):
            what = f"{self.count} numbers" if self.count else "a number for each channel"
            raise argparse.ArgumentError(self, f"not {what}, nor {' or '.join(self.words)}")
        setattr(namespace, self.dest, found)


def number(kind: type, low: float, high: float = math.inf, ends: str = "[)") -> Callable:
    """An argparse type: an int or float between low and high; `ends` as in [low, high)."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            word = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}") from None
        above = low <= value if ends[0] == "[" else low < value
        below = value <= high if ends[1] == "]" else value < high
        if not (above and below):  # refuses NaN too, which compares false with everything
            span = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
            raise argparse.ArgumentTypeError(f"{text} is outside {span}")
        return value

    return parse


def or_word(kind: Callable, word: str) -> Callable:
    """An argparse type: one word, or what another type takes."""
    return lambda text: word if text == word else kind(text)


COUNT, POSITIVE = number(int, 0), number(int, 1)
AMOUNT, SHARE = number(float, 0), number(float, 0, 1, "[]")
BELOW_1, ABOVE_0 = number(float, 0, 1), number(float, 0, ends="()")
