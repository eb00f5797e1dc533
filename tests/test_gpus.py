"""What GPUs alone bring, on a machine that has none: their errors, differences and waits."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from conftest import in_processes

from util import distributed, features, peers
from util.args import linprobe_parser
from util.data.survey import settle_pixels
from util.datasets import open_dataset
from util.distributed import gather_rows
from util.errors import STOP_SIGNALS, Stopped
from util.features import Features, encode, knn_accuracies
from util.peers import end_by, stop_watching, wait_for, watch_peers
from util.precision import Precision
from util.run.finite import FiniteCheck
from util.run.launch import PEER_LOST, _end_with_peer, _is_of_a_peer, launch, nccl_words

# As users report them to PyTorch; the beginnings are torch's and name its source lines.
DUPLICATE = """NCCL error in: torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1275, invalid usage
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000
"""
SHARED = """NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:268, unhandled system error
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
Error while creating shared memory segment /dev/shm/nccl-zPkWqo (size 9637888)
"""
DRIVER = """NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:219, unhandled cuda error
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure 'CUDA driver version is insufficient for CUDA runtime version'
"""
SOCKET = """NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:219, system error
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
"""
GONE = """NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:268, remote process exited
ncclRemoteError: A call failed possibly due to a network error or a remote process exiting.
Last error:
NET/IB: Got completion from peer 10.0.0.2 with status=12
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DUPLICATE, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device"),
        (SHARED, "Error while creating shared memory segment /dev/shm/nccl-zPkWqo (size 9637888)"),
        (DRIVER, "Cuda failure 'CUDA driver version is insufficient for CUDA runtime version'"),
        ("NCCL error in: x.cpp:1, internal error", "NCCL error in: x.cpp:1, internal error; "),
        (GONE, ""),
        ("NCCL communicator was aborted on rank 1.", ""),
        (f"{SOCKET}socketProgress: Connection closed by remote peer node1<40000>", ""),
        (f"{SOCKET}Call to recv from 10.0.0.2<40000> failed : Connection reset by peer", ""),
        (
            "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d "
            "key-value store by store->get('0'), but got error: wait timeout after 600000ms",
            "",
        ),
    ],
)
def test_nccl_s_own_words_are_shown_unless_a_peer_died(text, words, monkeypatch, capsys):
    words = words and f"nccl: {words}"
    assert nccl_words(dist.DistBackendError(text)).startswith(words)
    assert nccl_words(RuntimeError(text)) == ""

    def main(args):
        raise dist.DistBackendError(text)

    monkeypatch.setattr("util.run.launch.get_world_size", lambda: 2)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        launch(main, None)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f": error: {words or PEER_LOST}" in line


def _least_capable(rank: int) -> None:
    questions = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    for question in questions:
        setattr(torch.cpu, question, lambda: rank == 0)
    for name, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        assert Precision(name, torch.device("cpu")).dtype == dtype


def test_ranks_of_different_devices_compute_alike():
    in_processes(_least_capable, 2)


@pytest.mark.parametrize(
    ("name", "native", "warning"),
    [
        ("auto", False, ""),
        ("fp32", False, ""),
        ("fp16", False, "--precision fp16 is emulated, and slow: auto takes float32"),
        ("bf16", False, "--precision bf16 is emulated, and slow: auto takes float32"),
        ("bf16", True, ""),
        ("fp16", True, "--precision fp16 is slow on most CPUs: auto takes bfloat16"),
        ("fp32", True, ""),
    ],
)
def test_formats_that_a_device_emulates_are_warned_of(name, native, warning, monkeypatch, caplog):
    for question in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, question, lambda: native)
    Precision(name, torch.device("cpu"))
    assert [r.message for r in caplog.records] == [f"warning: {warning}"] * bool(warning)


class Event:
    """A GPU's, that comes after some looks at it; or never."""

    def __init__(self, looks: float):
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def _lose_a_peer(rank: int) -> None:
    watch_peers(dist.new_group())
    dist.barrier()
    if rank == 1:
        time.sleep(2)
        os._exit(0)
    begin = time.monotonic()
    wait_for(Event(3))
    with pytest.raises(RuntimeError) as error:
        wait_for(Event(float("inf")))
    assert _is_of_a_peer(error.value)
    assert 1 < time.monotonic() - begin < 20


def test_a_wait_for_the_device_ends_when_a_peer_does():
    in_processes(_lose_a_peer, 2)


def _lose_a_peer_in_the_driver(rank: int) -> None:
    statuses, ended = [], threading.Event()
    patch = pytest.MonkeyPatch()
    patch.setattr("util.peers.GRACE", 0.1)
    patch.setattr("util.run.launch._exit", lambda status: (statuses.append(status), ended.set()))
    end_by(_end_with_peer)
    watch_peers(dist.new_group())
    dist.barrier()
    if rank == 1:
        time.sleep(2)
        os._exit(len(statuses))  # nobody has died
    assert not ended.wait(1)
    assert ended.wait(20)
    assert statuses == [1]


def test_a_process_ends_when_a_peer_does_even_if_the_driver_holds_its_main_thread():
    in_processes(_lose_a_peer_in_the_driver, 2)


def _end_one_after_the_other(rank: int) -> None:
    alarms = []
    pytest.MonkeyPatch().setattr("util.peers.GRACE", 0)
    end_by(lambda: alarms.append(1))
    watch_peers(dist.new_group())
    watch = peers._watch
    dist.barrier()
    time.sleep(3 * rank)
    begin = time.monotonic()
    stop_watching(agreed=True)
    assert time.monotonic() - begin < 5
    assert (watch.lost, alarms) == (None, [])


def test_processes_that_have_done_their_work_need_not_end_at_once():
    in_processes(_end_one_after_the_other, 2)


@pytest.mark.parametrize(("agreed", "destroyed"), [(True, 1), (False, 0)])
def test_the_group_is_only_destroyed_where_all_ranks_stop_at_one_step(
    agreed, destroyed, monkeypatch
):
    """nccl's end waits for the others' part of what this rank has begun."""
    ends = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ends.append(1))
    monkeypatch.setattr("util.run.launch.get_world_size", lambda: 2)

    def main(args):
        raise Stopped(signal.SIGTERM, agreed=agreed)

    with pytest.raises(SystemExit):
        launch(main, None)
    assert len(ends) == destroyed


def _lose_a_peer_in_a_step(rank: int) -> None:
    check = FiniteCheck(skips=0, scaled=False)
    watch_peers(dist.new_group())
    dist.barrier()
    if rank == 1:
        time.sleep(1)
        os._exit(0)
    check._pending = "here", ["loss"], torch.ones(1), Event(float("inf"))
    with pytest.raises(RuntimeError, match=r"(?i)closed|reset"):
        check.settle()


def test_a_step_that_is_read_watches_for_its_peers():
    in_processes(_lose_a_peer_in_a_step, 2)


def test_a_wait_for_the_device_hears_signals():
    heard = []
    before = signal.signal(STOP_SIGNALS[0], lambda *_: heard.append(1))
    event = Event(300)
    threading.Timer(0.05, lambda: os.kill(os.getpid(), STOP_SIGNALS[0])).start()
    try:
        wait_for(event)
    finally:
        signal.signal(STOP_SIGNALS[0], before)
    assert heard == [1]


def _gathered(rank: int) -> None:
    distributed.GATHERED = 6
    for total in (2, 3, 6, 7, 13):
        rows = torch.arange(2 * total).view(total, 2)
        assert torch.equal(gather_rows(rows[rank::2], total), rows)


def test_rows_are_gathered_in_parts():
    in_processes(_gathered, 2)


def test_nearest_neighbours_are_found_part_by_part(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    train, val = (
        Features(torch.randn(100, 8, generator=generator), torch.arange(100) % 6) for _ in range(2)
    )
    whole = knn_accuracies(train, val)
    assert len(set(whole.values())) > 1
    for size in (1, 7, 33):
        monkeypatch.setattr(features, "REFERENCES", size)
        assert knn_accuracies(train, val) == whole


def test_many_features_take_half_the_memory(photos, monkeypatch, caplog):
    words = ["--data_path", photos, "--model", "vit_nano_patch4", "--input_size", 8]
    args = linprobe_parser().parse_args([*map(str, words), "--num_workers", "0"])
    images = open_dataset(str(photos), train=True)
    settle_pixels(args, train=images)
    precision = Precision("fp32", torch.device("cpu"))

    def encoder(imgs: torch.Tensor) -> torch.Tensor:
        return imgs.flatten(1)

    whole = encode(encoder, images, args, precision)
    monkeypatch.setattr(features, "HALF_ABOVE", 1000)
    caplog.set_level("INFO")
    half = encode(encoder, images, args, precision)
    assert "features are kept in float16" in caplog.text
    assert (whole.features.dtype, half.features.dtype) == (torch.float32, torch.float16)
    assert half[0, 3][0].dtype == torch.float32
    torch.testing.assert_close(half.features.float(), whole.features, rtol=1e-3, atol=1e-3)
    assert knn_accuracies(half, half, (1,)) == {1: 100}
