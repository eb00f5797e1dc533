"""Losses, gradients and weights that are not finite: all ranks see the same and act alike."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from util.distributed import is_main_process, mean_over_ranks
from util.errors import UserError
from util.peers import wait_for

logger = logging.getLogger(__name__)

GRADIENT = "gradient norm"
# So many halvings of float16's initial loss scale, 2^16, that no finite gradient overflows.
OVERFLOWS = 40


class FiniteCheck:
    """Ends a run, or skips a step, when its loss or gradient is not finite.

    A step's values are averaged over the ranks. They are read one step late, when the device has
    them and the host need not wait; until then the device alone knows whether a step is skipped.

    Args:
        skips: how many steps in a row may be skipped.
        scaled: float16's loss scaling is on: infinite gradients are normal while it finds a scale.
        saved: says what the last checkpoint holds.
    Attributes:
        _in_a_row: steps that were not finite, by whether it was because of too large a loss scale.
        _pending: place, names, values of the step to read next, and when they are copied.
    """

    def __init__(self, skips: int, scaled: bool, saved: Callable[[], str] = str):
        self.skips, self.scaled, self.saved = skips, scaled, saved
        self._in_a_row = {True: 0, False: 0}
        self._pending: tuple[str, list[str], Tensor, torch.cuda.Event | None] | None = None

    def step(
        self, place: str, values: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Checks a step before its update, after the one before.

        Args:
            place: of the step, for messages.
            values: scalars: this rank's losses, and last, as `GRADIENT`, the gradient's norm.
        Returns:
            Two scalars on the device: 1 if the update must be skipped, else 0; and 1 if what the
            forward pass has measured is to be left out, too, which is fine where only float16's
            gradients are infinite. None: no step may be skipped.
        Raises:
            UserError: as `settle`.
        """
        self.settle()
        means = mean_over_ranks(torch.stack([value.float() for value in values.values()]))
        copy, copied = means.to("cpu", non_blocking=True), None
        if means.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._pending = place, list(values), copy, copied
        if not (self.skips or self.scaled):
            return None, None
        bad = ~means.isfinite()
        return bad.any().float(), (bad[:-1] if self.scaled else bad).any().float()

    def check_weights(self, place: str, model: nn.Module) -> None:
        """Checks a model after an update.

        Raises:
            UserError: a weight or statistic is not finite; on all ranks.
        """
        tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
        if not mean_over_ranks(get_total_norm(tensors, foreach=True)).isfinite():
            raise UserError(f"weights are not finite after {place}; {self.saved()}")

    def settle(self) -> None:
        """Reads the pending step, if any.

        Raises:
            UserError: it is not finite, and no more steps may be skipped; on all ranks.
        """
        if self._pending is None:
            return
        (place, names, means, copied), self._pending = self._pending, None
        if copied is not None:
            wait_for(copied)
        if means.isfinite().all():
            self._in_a_row = {True: 0, False: 0}
            return
        values = dict(zip(names, means.tolist(), strict=True))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        overflow = self.scaled and bad == [GRADIENT]
        self._in_a_row[overflow] += 1
        shown = dict.fromkeys([*bad, GRADIENT])
        line = ", ".join(f"{name} is {values[name]:.3g}" for name in shown) + f" at {place}"
        if self._in_a_row[overflow] > (OVERFLOWS if overflow else self.skips):
            raise UserError(f"{line}; {self.saved()}")
        if not overflow and is_main_process():
            skipped = f"{self._in_a_row[False]} in a row of {self.skips} allowed"
            logger.warning(f"warning: {line}; step skipped, {skipped}")
