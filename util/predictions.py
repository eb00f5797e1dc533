"""What a classifier says of images, and how often it is right about each class, as CSV files."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from util.data.source import labels_of, name_of
from util.distributed import from_rank_zero, gather_rows
from util.errors import UserError
from util.files import written_whole

TOP = 5  # classes of each image
TOP5_CLASSES = 6  # with fewer, the five best are all classes, or all but one


See = Callable[[Tensor, list[bool]], None]  # looks at logits, and which images were replaced


@dataclass
class Tally:
    """Counts of an evaluation, over all processes: K classes.

    Attributes:
        loss: summed over images.
        top5: images whose class is among the five best.
        hits, images: [K], by true class: those whose class is the best one, and all.
    """

    loss: float
    top5: float
    hits: Tensor
    images: Tensor

    @classmethod
    def of(cls, counts: Tensor) -> "Tally":
        """From sums of `count`."""
        loss, top5, hits, images = counts.cpu().split([1, 1, *2 * [len(counts) // 2 - 1]])
        return cls(loss.item(), top5.item(), hits, images)

    def scores(self) -> dict[str, float]:
        """Mean loss; in percent top-1, its mean over classes (balanced), and from 6 on top-5."""
        total = self.images.sum().item()
        found = {"loss": self.loss / total, "acc1": 100 * self.hits.sum().item() / total}
        present = self.images > 0
        found["balanced"] = 100 * (self.hits[present] / self.images[present]).mean().item()
        if len(self.images) >= TOP5_CLASSES:
            found["acc5"] = 100 * self.top5 / total
        return found

    def write(self, path: str, classes: list[str], times: int) -> None:
        """Each class's number of images and accuracy in percent, as a CSV.

        Args:
            times: that each image was counted, by processes that each saw all.
        """
        rows = zip(classes, self.images.tolist(), self.hits.tolist(), strict=True)
        shares = ([c, int(n / times), f"{100 * hits / n:.2f}" if n else ""] for c, n, hits in rows)
        write_csv(path, ["class", "images", "accuracy"], shares)


def count(logits: Tensor, labels: Tensor) -> Tensor:
    """[2 + 2 K], float64: a batch's loss, those among the five best, hits and images by class.

    Args:
        logits: [N, K].
        labels: [N].
    """
    classes = logits.shape[1]
    loss = F.cross_entropy(logits.float(), labels, reduction="none").double().sum()
    top5 = logits.topk(min(TOP, classes)).indices == labels[:, None]
    # Sums by class: `bincount` would make the host wait for a GPU.
    right, every = loss.new_zeros(2, classes).scatter_add_(
        1, labels.expand(2, -1), torch.stack([top5[:, 0], torch.ones_like(labels)]).double()
    )
    return torch.cat([torch.stack([loss, top5.sum()]), right, every])


class Predictions:
    """The five most probable classes of every image of a dataset.

    Args:
        share: whether each process has seen only its share of the images.
        labelled: whether the dataset's labels are to be written, too.
    """

    def __init__(self, dataset: Dataset, classes: list[str], share: bool, labelled: bool = True):
        self.dataset, self.classes, self.share, self.labelled = dataset, classes, share, labelled
        self._labels = labels_of(dataset) if labelled else None
        self._top = min(TOP, len(classes))
        self._rows = [torch.zeros(0, 2 * self._top)]

    def add(self, logits: Tensor, replaced: list[bool]) -> None:
        """A batch, [N, K]; nothing is said of images that others stood in for."""
        best = logits.float().softmax(dim=1).topk(self._top)
        rows = torch.cat([best.values, best.indices.float()], dim=1).cpu()
        rows[torch.tensor(replaced, dtype=torch.bool)] = torch.nan
        self._rows.append(rows)

    def write(self, path: str) -> None:
        """Writes them on rank 0, as a CSV; every rank calls it."""
        rows = torch.cat(self._rows)
        rows = gather_rows(rows, len(self.dataset)) if self.share else rows
        values, numbers = rows.chunk(2, dim=1)
        header = ["file", *["label"] * self.labelled]
        for place in range(1, values.shape[1] + 1):
            header += [f"class_{place}", f"probability_{place}"]
        found = zip(values.tolist(), numbers.nan_to_num(-1).int().tolist(), strict=True)
        from_rank_zero(lambda: write_csv(path, header, map(self._row, range(len(rows)), found)))

    def _row(self, index: int, found: tuple[list[float], list[int]]) -> list[str]:
        label = [self.classes[self._labels[index]]] if self.labelled else []
        best = zip(*found, strict=True)
        words = [word for p, number in best for word in self._words(p, number)]
        return [name_of(self.dataset, index), *label, *words]

    def _words(self, probability: float, number: int) -> tuple[str, str]:
        return ("", "") if number < 0 else (self.classes[number], f"{probability:.4f}")


def write_csv(path: str, header: list[str], rows: Iterable[list]) -> None:
    """Writes a table, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with (
            written_whole(path) as temporary,
            open(temporary, "w", newline="", errors="surrogateescape") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def balanced_weights(labels: np.ndarray, classes: int) -> Tensor:
    """[K] weights with which each class counts as much as any other; 1 on average over images."""
    counts = np.bincount(labels, minlength=classes)
    return torch.from_numpy(counts.sum() / (classes * np.maximum(counts, 1))).float()
