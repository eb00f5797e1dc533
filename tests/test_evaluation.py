"""Accuracy and kNN against slow oracles, and the same on two processes as on one."""

import argparse
import gc
import os

import numpy as np
import pytest
import torch
from conftest import in_processes
from PIL import Image
from torch.utils.data import Dataset

from engine_finetune import evaluate
from util.data.loader import eval_loader
from util.errors import UserError
from util.features import Features, encode, knn_accuracy
from util.precision import Precision

FLAGS = argparse.Namespace(
    resize="crop", batch_size=3, num_workers=0, pin_mem=False, seed=0, input_size=4, output_dir=""
)
FP32 = Precision("fp32", torch.device("cpu"))


def features(count: int, classes: int, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return Features(torch.randn(count, classes, generator=generator), labels)


class Classifier(torch.nn.Module):
    """Takes its inputs for logits; its BatchNorm-like buffer differs between processes."""

    def __init__(self, rank: int = 0):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0 + rank))

    def forward(self, x):
        return x * self.scale


def scores(data: Features, share: bool = False, rank: int = 0) -> dict[str, float]:
    loader = eval_loader(data, FLAGS, torch.device("cpu"), share=share)
    return evaluate(Classifier(rank), loader, FP32)


def test_accuracies_and_loss_equal_an_oracle():
    data = features(20, 8)
    order = np.argsort(-data.features.numpy(), axis=1)
    hits = order == data.labels.numpy()[:, None]
    probabilities = data.features.double().softmax(dim=1)[range(20), data.labels]
    result = scores(data)
    assert result["acc1"] == pytest.approx(100 * hits[:, :1].sum() / 20)
    assert result["acc5"] == pytest.approx(100 * hits[:, :5].sum() / 20)
    assert result["loss"] == pytest.approx(-probabilities.log().mean().item(), rel=1e-6)
    assert 0 < result["acc1"] < result["acc5"] < 100
    labels, top1 = data.labels.numpy(), hits[:, 0]
    recalls = [top1[labels == label].mean() for label in np.unique(labels)]
    assert result["balanced"] == pytest.approx(100 * np.mean(recalls))


@pytest.mark.parametrize(("classes", "has_top5"), [(2, False), (5, False), (6, True)])
def test_top5_is_left_out_under_six_classes(classes, has_top5):
    assert ("acc5" in scores(features(9, classes))) == has_top5


class Images(Dataset):
    """PIL images whose pixels are their number."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Image.new("RGB", (8, 8), (index, 0, 0)), index


def _compare_with_one_process(rank: int, expected: list[tuple[dict, dict, float]]) -> None:
    for count, (alone, knn) in zip((1, 7, 8, 9), expected, strict=True):
        for share in (True, False):
            result = scores(features(count, 6), share, rank)
            assert result.pop("loss") == pytest.approx(alone["loss"], rel=1e-12)
            assert result == {name: alone[name] for name in ("acc1", "balanced", "acc5")}
        assert knn_accuracy(features(30, 6, seed=1), features(count, 6)) == knn
        if count == 1:
            with pytest.raises(UserError, match="1 images are too few to share among 2"):
                encode(torch.flatten, Images(1), FLAGS, FP32)
            continue
        encoded = encode(lambda x: x.mean(dim=(2, 3)), Images(count), FLAGS, FP32)
        assert encoded.labels.tolist() == list(range(count))
        assert encoded.features[:, 0].argsort().tolist() == list(range(count))


def test_two_processes_count_every_image_once():
    """For 1, 7, 8 and 9 images, shared and not; rank 0's buffers are everybody's."""
    expected = [
        (scores(features(count, 6)), knn_accuracy(features(30, 6, seed=1), features(count, 6)))
        for count in (1, 7, 8, 9)
    ]
    in_processes(_compare_with_one_process, 2, expected)


def test_knn_equals_an_oracle(monkeypatch):
    monkeypatch.setattr("util.features.CHUNK", 4)
    train, val = features(40, 5, seed=1), features(11, 5, seed=2)
    correct = 0
    for query, answer in zip(val.features.numpy(), val.labels.tolist(), strict=True):
        votes = np.zeros(5)
        similarities = [q @ query / np.linalg.norm(q) / np.linalg.norm(query)
                        for q in train.features.numpy()]  # fmt: skip
        for i in np.argsort(similarities)[-7:]:
            votes[train.labels[i]] += np.exp(similarities[i] / 0.07)
        correct += votes.argmax() == answer
    assert 0 < correct < 11
    assert knn_accuracy(train, val, k=7) == pytest.approx(100 * correct / 11)


def test_knn_with_fewer_images_than_neighbours():
    train = Features(torch.eye(3), torch.arange(3))
    assert knn_accuracy(train, train) == 100


def test_loaders_that_have_ended_keep_no_files_open():
    """Each evaluation has two new ones."""

    def open_files() -> int:
        data = [(torch.zeros(2), i % 2, ("", "")) for i in range(12)]
        keyed = {(0, i): row for i, row in enumerate(data)}
        loader = eval_loader(Keyed(keyed), FLAGS, torch.device("cpu"), share=False, num_workers=2)
        assert len(list(loader)) == 4
        del loader
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    counts = [open_files() for _ in range(8)]
    assert max(counts) < counts[0] + 8  # four more each, if they stayed open


class Keyed(Dataset):
    """By (epoch, index), as `SeededDataset`."""

    def __init__(self, rows: dict):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return self.rows[key]
