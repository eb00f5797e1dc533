"""Which images are seen, in which order, and what their augmentation depends on."""

import pickle
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

from util.data.loader import TrainLoader, train_loader
from util.data.order import EpochSampler, SeededDataset
from util.data.source import Part, match_classes
from util.data.transforms import eval_transform
from util.datasets import NAMED, open_dataset
from util.errors import UserError
from util.visualize import preview_images
from util_contrastive import GaussianBlur, TwoCrops, TwoCropTransform


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits", train=True)


def seeded(dataset, seed: int = 0) -> SeededDataset:
    return SeededDataset(dataset, TwoCrops(16), seed)


def test_views_depend_on_seed_epoch_and_index_alone(digits):
    views = seeded(digits)[3, 5][0]
    torch.manual_seed(99)  # the global state does not matter
    assert all(map(torch.equal, views, seeded(digits)[3, 5][0]))
    assert not torch.equal(*views)
    for other in (seeded(digits, seed=1)[3, 5], seeded(digits)[4, 5], seeded(digits)[3, 6]):
        assert not torch.equal(views[0], other[0][0])


def test_drawing_views_leaves_the_global_random_state_alone(digits):
    before = torch.get_rng_state()
    seeded(digits)[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_do_not_change_the_views(digits):
    def batches(workers: int) -> list:
        sampler = EpochSampler(digits, per_step=16, seed=0)
        sampler.set_epoch(2)
        loader = DataLoader(seeded(digits), 16, sampler=sampler, num_workers=workers)
        return [views for _, (views, *_) in zip(range(3), loader, strict=False)]

    for a, b in zip(batches(0), batches(2), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


class Asked(Dataset):
    """Notes in a folder which keys it was asked for, in whatever process."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __len__(self) -> int:
        return 20

    def __getitem__(self, key: tuple[int, int]):
        with open(self.folder / str(key[0]), "a") as file:
            print(key[1], file=file)
        return torch.tensor(key), 0, ("", "")

    def of(self, epoch: int) -> list[str]:
        """The images that it was asked for in an epoch, as often as it was."""
        path = self.folder / str(epoch)
        return path.read_text().splitlines() if path.exists() else []


def asked(folder: Path, workers: int) -> tuple[Asked, TrainLoader]:
    """Six epochs of three steps of three batches of two."""
    args = SimpleNamespace(
        batch_size=2, accum_iter=3, epochs=6, seed=5, num_workers=workers, pin_mem=False,
        output_dir="", shuffle_window=0,
    )  # fmt: skip
    data = Asked(folder)
    return data, train_loader(data, args, torch.device("cpu"))


LITTLE = SimpleNamespace(free=5 * 2 * 2 * 24 - 1)  # 5 times two batches of two, of 24 bytes each


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("little", [False, True])
def test_a_loader_gives_each_epoch_as_its_sampler_does(workers, little, tmp_path, monkeypatch):
    """From any step on, whether or not its processes go on into the next epoch."""
    if little:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: LITTLE)
    data, loader = asked(tmp_path, workers)
    reference = EpochSampler(data, 6, seed=5)
    for epoch, done in ((1, 3), (2, 0), (3, 1), (4, 0), (5, 0), (5, 2), (3, 0), (5, 0), (8, 0)):
        reference.set_epoch(epoch, done)
        expected = list(reference)
        assert len(expected) == 18 - 6 * done
        found = [key for keys, _ in loader.epoch(epoch, done) for key in keys.tolist()]
        assert list(map(tuple, found)) == expected
    for _ in range(2):  # the second time after one that was left
        assert next(loader.epoch(2))[0][0, 0] == 2
    loader.sampler.set_epoch(1)
    assert [key[0] for keys, _ in loader for key in keys.tolist()] == [1] * 18
    assert not data.of(6)


@pytest.mark.parametrize("little", [False, True])
def test_loader_processes_go_on_into_the_next_epoch(little, tmp_path, monkeypatch):
    if little:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: LITTLE)
    data, loader = asked(tmp_path, 1)
    assert len(list(loader.epoch(4))) == 9
    end = time.monotonic() + (2 if little else 60)
    while not data.of(5) and time.monotonic() < end:
        time.sleep(0.02)
    assert bool(data.of(5)) == (not little)
    assert len(list(loader.epoch(5))) == 9
    for epoch in (4, 5):
        assert len(set(data.of(epoch))) == len(data.of(epoch)) == 18


def test_views_are_normalised_images(digits):
    views = torch.stack([v for i in range(64) for v in seeded(digits)[0, i][0]])
    assert views.shape == (128, 3, 16, 16)
    assert views.min() >= -2.2  # (0 - mean) / std and (1 - mean) / std of ImageNet
    assert views.max() <= 2.7


def epoch_of(dataset, per_step: int, ranks: int, epoch: int = 0) -> list[list[int]]:
    """Each rank's indices of an epoch."""
    shares = []
    for rank in range(ranks):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("util.data.order.get_world_size", lambda: ranks)
            patch.setattr("util.data.order.get_rank", lambda rank=rank: rank)
            sampler = EpochSampler(dataset, per_step, seed=0)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert {key[0] for key in keys} == {epoch}
        assert len(sampler) == len(keys)
        shares.append([index for _, index in keys])
    return shares


def test_ranks_share_an_epoch_and_leave_out_what_fills_no_step():
    shares = epoch_of(range(103), per_step=8, ranks=3)
    assert [len(share) for share in shares] == [32, 32, 32]  # 4 steps of 24; 7 images left out
    counts = Counter(index for share in shares for index in share)
    assert set(counts.values()) == {1}
    assert set(counts) <= set(range(103))


def test_a_step_sees_the_same_images_however_many_processes_share_it():
    one = epoch_of(range(64), per_step=16, ranks=1)[0]
    two = epoch_of(range(64), per_step=8, ranks=2)
    for step in range(4):
        together = two[0][8 * step :][:8] + two[1][8 * step :][:8]
        assert sorted(together) == sorted(one[16 * step :][:16])


def test_epochs_are_shuffled_anew():
    first, second = (epoch_of(range(64), 16, 1, epoch)[0] for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(64))


def test_too_few_images_for_a_step():
    with pytest.raises(UserError, match="7 images do not fill one step of 8"):
        epoch_of(range(7), per_step=8, ranks=1)


def test_digits_are_split_into_training_and_validation(digits):
    val = open_dataset("digits", train=False)
    assert (len(digits), len(val)) == (1437, 360)
    image, label = digits[0]
    assert image.size == (8, 8)
    assert label == digits.targets[0]
    assert set(digits.targets) == set(val.targets) == set(range(10))
    seen = {image.tobytes() for image, _ in (digits[i] for i in range(len(digits)))}
    assert all(val[i][0].tobytes() not in seen for i in range(len(val)))


def test_folder_with_train_and_classes(photos):
    dataset = open_dataset(str(photos), train=True)
    assert dataset.classes == ["china", "flower"]
    assert len(dataset) == 48
    assert len(open_dataset(str(photos), train=False)) == 16


def test_folder_of_images_without_classes(tmp_path):
    for name in ("b.png", "a.jpg", "sub/c.png", "sub/deeper/d.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = open_dataset(str(tmp_path), train=True)
    assert len(dataset) == 4
    assert {dataset[i][1] for i in range(4)} == {0}


def test_a_stray_file_beside_class_folders_does_not_hide_the_classes(tmp_path):
    for name in ("cat/1.png", "dog/2.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "README.txt").touch()
    assert open_dataset(str(tmp_path), train=True).classes == ["cat", "dog"]


def test_torchvision_s_data_sets_by_name(tmp_path, monkeypatch):
    """CIFAR-10 as torchvision unpacks it, with two images a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "data" / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    pixels = np.arange(2 * 3072).reshape(2, 3072) % 256
    for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        batch = {"data": pixels.astype(np.uint8), "labels": [3, 4]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [str(i) for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))

    train, val = (open_dataset("cifar10", train) for train in (True, False))
    assert (len(train), len(val)) == (10, 2)
    image, label = train[1]
    assert (image.size, label) == ((32, 32), 4)


def test_every_name_is_constructed_as_torchvision_wants_it(tmp_path, monkeypatch):
    """Each gets as far as its download, which is refused here."""
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise OSError("no network")

    for module in ("cifar", "mnist", "svhn", "stl10", "food101", "flowers102", "oxford_iiit_pet"):
        for name in ("download_url", "download_and_extract_archive"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.{name}", refuse, raising=False)
    for name in set(NAMED) - {"digits"}:
        for train in (True, False):
            with pytest.raises(UserError, match=f"cannot get the dataset {name}"):
                open_dataset(name, train)


def test_greyscale_and_palette_images_become_rgb(tmp_path):
    Image.new("L", (20, 20), 100).save(tmp_path / "grey.png")
    Image.new("P", (20, 20), 5).save(tmp_path / "palette.png")
    dataset = seeded(open_dataset(str(tmp_path), train=True))
    assert [dataset[0, i][0][0].shape for i in range(2)] == [(3, 16, 16)] * 2


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not a jpeg")
    dataset = seeded(open_dataset(str(tmp_path), train=True))
    with pytest.raises(UserError, match=r"broken\.jpg is not a readable image"):
        dataset[0, 0]


def test_two_crops_are_two_draws():
    draws = iter(range(10))
    assert TwoCropTransform(lambda image: (image, next(draws)))("x") == [("x", 0), ("x", 1)]


@pytest.mark.parametrize("size", [(40, 30), (2, 5), (1, 1)])
def test_blur_keeps_size_and_mean(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    blurred = GaussianBlur((2.0, 2.0))(image)
    assert blurred.size == image.size
    assert np.array(blurred).mean() == pytest.approx(np.array(image).mean(), abs=12)
    if size == (40, 30):
        assert np.array(blurred).std() < 0.4 * np.array(image).std()


def test_preview_shows_images_of_all_classes(digits):
    imgs = preview_images(digits, 8, eval_transform(16))
    assert imgs.shape == (8, 3, 16, 16)
    assert len({img.numpy().tobytes() for img in imgs}) == 8


def test_nothing_downloaded_is_tracked():
    assert "/data/" in (ROOT / ".gitignore").read_text().splitlines()


def labelled(photos: Path, tmp_path: Path) -> Dataset:
    images = open_dataset(str(photos), train=False)
    rows = (f"{name},{i % 2}\n" for i, name in enumerate(images.relative_names()))
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(rows))
    return open_dataset(str(photos), False, labels=str(tmp_path / "labels.csv"))


@pytest.mark.parametrize("kind", ["photos", "shards", "table", "zip", "csv"])
@pytest.mark.parametrize("part", [False, True])
def test_renumbered_classes_go_to_other_processes(kind, part, request, photos, tmp_path):
    """Twice: a checkpoint's classes may come after those of the training images."""
    if kind == "csv":
        data = labelled(photos, tmp_path)
    else:
        if kind == "zip":
            path = shutil.make_archive(str(tmp_path / "photos"), "zip", photos)
        data = open_dataset(str(path if kind == "zip" else request.getfixturevalue(kind)), False)
    first, second = data.classes
    names = [data.classes[label] for label in data.targets]
    if part:
        data = Part(data, np.arange(len(data)) % 3 > 0)
        names = [names[i] for i in data.indices]
    for classes in ([second, first], [first, second], [second, first]):
        match_classes(data, classes, data.classes, "x")
        again = pickle.loads(pickle.dumps(data))
        for found in (data, again):
            assert found.classes == classes
            assert [found.classes[label] for label in found.targets] == names
            assert [found[i][1] for i in range(len(found))] == found.targets.tolist()
