"""A dataset's features under a frozen encoder, and k-nearest-neighbour classification of them.

Shapes: M images, D feature width, k neighbours.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from util.data.loader import eval_loader
from util.data.order import SeededDataset
from util.data.transforms import eval_transform_of
from util.distributed import gather_rows, get_rank, get_world_size, sum_over_ranks
from util.errors import UserError
from util.precision import Precision
from util.run.interrupt import Poll, polled

# Of the weighted vote (Wu et al. 2018), with the k of DINO (Caron et al. 2021).
NEIGHBOURS = 20
TEMPERATURE = 0.07
CHUNK = 1024  # images classified at once: bounds the memory for their similarities


@dataclass
class Features(Dataset):
    """All images' `features` [M, D], float32, and `labels` [M], the same on every process."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        _, index = key  # (epoch, index), as for `SeededDataset`
        return self.features[index], self.labels[index]

    def cpu(self) -> "Features":
        return Features(self.features.cpu(), self.labels.cpu())


@torch.no_grad()
def encode(
    encoder: Callable[[Tensor], Tensor],
    dataset: Dataset,
    args: argparse.Namespace,
    precision: Precision,
    poll: Poll | None = None,
) -> Features:
    """The features of all images of a dataset, resized and centre-cropped; on the device.

    Args:
        encoder: from images [N, C, H, W] to features [N, D].
        dataset: of (PIL image, label) pairs; the processes share the work.
        args: input_size, resize, pixels, seed, batch_size, num_workers, pin_mem, output_dir.
        poll: called after each batch, equally often on every rank.
    Raises:
        UserError: fewer images than processes, or too many that are not readable.
    """
    total = len(dataset)
    if total < get_world_size():
        raise UserError(f"{total} images are too few to share among {get_world_size()} processes")
    images = SeededDataset(dataset, eval_transform_of(args), args.seed)
    features, labels = [], []
    loader = eval_loader(images, args, precision.device, share=True)
    for batch, batch_labels in polled(loader, poll):
        with precision.autocast():
            features.append(encoder(batch).float())
        labels.append(batch_labels.to(precision.device))
    loader.report_bad()
    return Features(gather_rows(torch.cat(features), total), gather_rows(torch.cat(labels), total))


def knn_accuracy(train: Features, val: Features, k: int = NEIGHBOURS) -> float:
    """Top-1 accuracy in percent; as `knn_accuracies`."""
    return knn_accuracies(train, val, (k,))[k]


def knn_accuracies(
    train: Features, val: Features, ks: Sequence[int] = (1, 5, NEIGHBOURS)
) -> dict[int, float]:
    """Top-1 accuracies in percent; each neighbour votes with exp(cosine similarity / 0.07).

    The processes share the images of `val`; k is lowered to the number of images in `train`.
    """
    reference = F.normalize(train.features, dim=1)
    share = slice(get_rank(), None, get_world_size())
    queries, answers = F.normalize(val.features[share], dim=1), val.labels[share]
    classes = int(train.labels.max()) + 1
    correct = torch.zeros(len(ks), dtype=torch.int64, device=reference.device)
    for query, answer in zip(queries.split(CHUNK), answers.split(CHUNK), strict=True):
        nearest = (query @ reference.T).topk(min(max(ks), len(reference)))
        labels, weights = train.labels[nearest.indices], (nearest.values / TEMPERATURE).exp()
        for i, k in enumerate(ks):
            votes = query.new_zeros(len(query), classes)
            votes.scatter_add_(1, labels[:, :k], weights[:, :k])
            correct[i] += (votes.argmax(dim=1) == answer).sum()
    shares = (100 * sum_over_ranks(correct) / len(val)).tolist()
    return dict(zip(ks, shares, strict=True))
