"""A dataset's features under a frozen encoder, and k-nearest-neighbour classification of them.

Shapes: M images, D feature width, k neighbours.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from util.data.loader import eval_loader
from util.data.order import SeededDataset
from util.data.transforms import eval_transform_of
from util.distributed import gather_rows, get_rank, get_world_size, max_over_ranks, sum_over_ranks
from util.errors import UserError
from util.precision import Precision
from util.run.interrupt import Poll, polled

logger = logging.getLogger(__name__)

# Of the weighted vote (Wu et al. 2018), with the k of DINO (Caron et al. 2021).
NEIGHBOURS = 20
TEMPERATURE = 0.07
CHUNK, REFERENCES = 1024, 2**15  # images compared with others at once: bounds the memory for it
HALF_ABOVE = 10**9  # bytes of all features in float32: more are kept in float16
SHARE = 0.5  # of a GPU's free memory: features that need more are kept on the host


@dataclass
class Features(Dataset):
    """All images' `features` [M, D] and `labels` [M], the same on every process.

    The labels are on the device; the features too, unless they are too many (`encode`).
    """

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        _, index = key  # (epoch, index), as for `SeededDataset`
        return self.features[index].float(), self.labels[index]

    def cpu(self) -> "Features":
        return Features(self.features.cpu(), self.labels.cpu())

    def part(self, chosen: Tensor) -> "Features":
        """Those of some images, by a mask [M] on the host."""
        rows = chosen.nonzero()[:, 0]
        features, labels = self.features, self.labels
        return Features(features[rows.to(features.device)], labels[rows.to(labels.device)])


@torch.no_grad()
def encode(
    encoder: Callable[[Tensor], Tensor],
    dataset: Dataset,
    args: argparse.Namespace,
    precision: Precision,
    poll: Poll | None = None,
) -> Features:
    """The features of all images of a dataset, resized and centre-cropped.

    Args:
        encoder: from images [N, C, H, W] to features [N, D].
        dataset: of (PIL image, label) pairs; the processes share the work.
        args: input_size, resize, pixels, seed, batch_size, num_workers, pin_mem, output_dir.
        poll: called after each batch, equally often on every rank.
    Raises:
        UserError: fewer images than processes, or too many that are not readable.
    """
    total, device = len(dataset), precision.device
    if total < get_world_size():
        raise UserError(f"{total} images are too few to share among {get_world_size()} processes")
    images = SeededDataset(dataset, eval_transform_of(args), args.seed)
    loader = eval_loader(images, args, device, share=True, once=True)
    own = len(loader.sampler)
    features, labels, done = None, torch.empty(own, dtype=torch.int64, device=device), 0
    for batch, batch_labels in polled(loader, poll):
        with precision.autocast():
            rows = encoder(batch).float()
        if features is None:
            features = _room(own, total, rows.shape[1], device)
        place = slice(done, done := done + len(rows))
        features[place], labels[place] = rows, batch_labels.to(device, non_blocking=True)
    loader.report_bad()
    return Features(gather_rows(features, total), gather_rows(labels, total))


def _room(own: int, total: int, width: int, device: torch.device) -> Tensor:
    """Memory for this process's features, where all of them have room, too."""
    size, dtype = 4 * total * width, torch.float32
    if size > HALF_ABOVE:
        size, dtype = size // 2, torch.float16
        logger.info(f"{total:,} features are kept in float16: {size / 1e9:.1f} GB")
    on_gpu = device.type == "cuda"
    scarce = on_gpu and size * (1 + own / total) > SHARE * free_memory()
    if on_gpu and max_over_ranks(int(scarce)):  # all ranks alike: they gather over one backend
        logger.info(f"{total:,} features are in the host's memory: {size / 1e9:.1f} GB a process")
        device = torch.device("cpu")
    return torch.empty(own, width, dtype=dtype, device=device)


def free_memory() -> int:
    """Bytes of the GPU that nobody uses; torch's allocator may hold them already."""
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + held


def knn_accuracy(train: Features, val: Features, k: int = NEIGHBOURS) -> float:
    """Top-1 accuracy in percent; as `knn_accuracies`."""
    return knn_accuracies(train, val, (k,))[k]


def knn_accuracies(
    train: Features, val: Features, ks: Sequence[int] = (1, 5, NEIGHBOURS)
) -> dict[int, float]:
    """Top-1 accuracies in percent; each neighbour votes with exp(cosine similarity / 0.07).

    The processes share the images of `val`; k is lowered to the number of images in `train`.
    """
    share = slice(get_rank(), None, get_world_size())
    queries = val.features[share].split(CHUNK)
    found = [_Nearest(query.to(train.labels.device), max(ks)) for query in queries]
    tiles = train.features.split(REFERENCES), train.labels.split(REFERENCES)
    for tile, labels in zip(*tiles, strict=True):
        reference = F.normalize(tile.to(labels.device).float(), dim=1)
        for nearest in found:
            nearest.look_at(reference, labels)
    classes = int(train.labels.max()) + 1
    correct = torch.zeros(len(ks), dtype=torch.int64, device=train.labels.device)
    for nearest, answers in zip(found, val.labels[share].split(CHUNK), strict=True):
        weights = (nearest.similarities / TEMPERATURE).exp()
        for i, k in enumerate(ks):
            votes = weights.new_zeros(len(weights), classes)
            votes.scatter_add_(1, nearest.labels[:, :k], weights[:, :k])
            correct[i] += (votes.argmax(dim=1) == answers).sum()
    shares = (100 * sum_over_ranks(correct) / len(val)).tolist()
    return dict(zip(ks, shares, strict=True))


class _Nearest:
    """The k nearest, of those looked at so far, of each query [Q, D]: similarities and labels."""

    def __init__(self, queries: Tensor, k: int):
        self.queries, self.k = F.normalize(queries.float(), dim=1), k
        self.similarities = self.queries.new_zeros(len(queries), 0)
        self.labels = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)

    def look_at(self, reference: Tensor, labels: Tensor) -> None:
        found = (self.queries @ reference.T).topk(min(self.k, len(reference)))
        similarities = torch.cat([self.similarities, found.values], dim=1)
        labels = torch.cat([self.labels, labels[found.indices]], dim=1)
        best = similarities.topk(min(self.k, similarities.shape[1]))
        self.similarities, self.labels = best.values, labels.gather(1, best.indices)
