"""The order of an epoch by windows of shards: near-sequential, and a function of (seed, epoch)."""

import itertools

import numpy as np
import pytest

from util.data.order import EpochSampler

GROUPS = np.array([7, 0, 20, 3, 30, 25, 15])  # 100 images of seven shards, one of them empty


def share(
    monkeypatch, rank: int = 0, ranks: int = 1, per_step: int = 4, epoch: int = 2, done: int = 0,
    **options,
) -> list[int]:  # fmt: skip
    monkeypatch.setattr("util.data.order.get_world_size", lambda: ranks)
    monkeypatch.setattr("util.data.order.get_rank", lambda: rank)
    monkeypatch.setattr("util.data.order.CHUNK", 5)
    sampler = EpochSampler(range(100), per_step, seed=3, **{"groups": GROUPS, **options})
    sampler.set_epoch(epoch, done)
    return [index for _, index in sampler]


@pytest.mark.parametrize("window", [0, 1, 10, 40, 1000])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_every_window_gives_every_image_once(window, groups, monkeypatch):
    order = share(monkeypatch, window=window, groups=groups)
    assert sorted(order) == list(range(100))
    assert order == share(monkeypatch, window=window, groups=groups)
    assert order != share(monkeypatch, window=window, groups=groups, epoch=3)


@pytest.mark.parametrize("window", [0, 10, 40])
@pytest.mark.parametrize("done", [0, 1, 3, 6])
def test_ranks_share_it_and_a_resume_goes_on_in_it(window, done, monkeypatch):
    whole = share(monkeypatch, per_step=16, window=window)
    for ranks, per_step in ((1, 16), (2, 8), (4, 4)):
        shares = [
            share(monkeypatch, rank, ranks, per_step, window=window, done=done)
            for rank in range(ranks)
        ]
        assert list(itertools.chain(*zip(*shares, strict=True))) == whole[16 * done :]


def test_a_window_holds_whole_shards_in_a_new_order(monkeypatch):
    shard = np.repeat(np.arange(7), GROUPS)
    order = shard[share(monkeypatch, window=1)]
    runs = [shard for shard, _ in itertools.groupby(order)]
    assert sorted(runs) == [0, 2, 3, 4, 5, 6]
    assert runs != sorted(runs)
    inside = [i for i in share(monkeypatch, window=1) if shard[i] == 4]
    assert inside != sorted(inside)


def test_a_window_mixes_shards_and_ends_with_them(monkeypatch):
    shard = np.repeat(np.arange(7), GROUPS)
    order = shard[share(monkeypatch, window=40)]
    assert len(list(itertools.groupby(order))) > 20
    places = {s: np.flatnonzero(order == s) for s in set(order.tolist())}
    assert max(p.max() - p.min() for p in places.values()) < 40 + GROUPS.max()


def test_files_of_one_image_each_are_taken_by_neighbours(monkeypatch):
    monkeypatch.setattr("util.data.order.NEIGHBOURS", 10)
    order = np.array(share(monkeypatch, window=10, groups=None)) // 10
    runs = order.reshape(10, 10)
    assert (runs == runs[:, :1]).all()
    assert runs[:, 0].tolist() != sorted(runs[:, 0])
