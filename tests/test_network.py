"""Processes of several machines: one network that all reach, and machines that are alike."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, free_port

from util import distributed, network
from util.args import pretrain_parser
from util.errors import UserError
from util.network import address_towards, gloo_interface, interface_of, settle_network


@pytest.mark.parametrize(
    ("nccl", "gloo"),
    [("", ""), ("ib", "ib0"), ("=eth1", "eth1"), ("eth", ""), ("^lo", ""), ("=ib", "")],
)
def test_gloo_takes_nccl_s_interface(nccl, gloo, monkeypatch):
    names = list(enumerate(("lo", "eth0", "eth1", "ib0")))
    monkeypatch.setattr(socket, "if_nameindex", lambda: names)
    assert gloo_interface(nccl) == gloo


@pytest.fixture
def places(monkeypatch) -> dist.Store:
    """Where rank 1 has said that it runs on another machine; this one's name leads to itself."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # and what the test sets goes with it
    monkeypatch.setattr(network, "_leads_to_loopback", lambda host: True)
    monkeypatch.setattr(network, "address_towards", lambda host: {"10.9.0.2": "10.9.0.1"}[host])
    monkeypatch.setattr(network, "interface_of", {"10.9.0.1": "ib0"}.get)
    store = dist.HashStore()
    store.set("place/1", json.dumps(["cuda", "elsewhere", "10.9.0.2"]))
    return store


def test_gloo_takes_the_interface_towards_other_machines(places, capfd):
    settle_network(places, 0, 2, "cuda", None)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    line = f"GLOO_SOCKET_IFNAME=ib0, since {socket.gethostname()} leads to a loopback\n"
    assert capfd.readouterr().err == line


def test_an_interface_that_is_not_found_is_asked_for(places, monkeypatch, capfd):
    monkeypatch.setattr(network, "interface_of", lambda address: "")
    settle_network(places, 0, 2, "cuda", None)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert "GLOO_SOCKET_IFNAME must name the interface to the other" in capfd.readouterr().err


def test_a_name_that_others_reach_is_left_alone(places, monkeypatch):
    monkeypatch.setattr(network, "_leads_to_loopback", lambda host: False)
    settle_network(places, 0, 2, "cuda", None)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_what_was_given_is_left_alone(places, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    settle_network(places, 0, 2, "cuda", None)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_one_machine_needs_no_network(places):
    places.set("place/1", json.dumps(["cuda", socket.gethostname(), ""]))
    settle_network(places, 0, 2, "cuda", None)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_a_machine_without_its_gpu_ends_all_ranks(places):
    """Else its process would take gloo, the others nccl, and both wait for each other."""
    said = "1 of 2 processes have no usable GPU, first process 0 on "
    places.add("read", 1)
    with pytest.raises(UserError, match=said):
        settle_network(places, 0, 2, "cpu", None)
    with pytest.raises(UserError, match=said):  # rank 1, told what rank 0 has gathered
        settle_network(places, 1, 2, "cuda", None)


def test_addresses_and_interfaces_are_the_systems():
    assert address_towards("127.0.0.1") == address_towards("no.such.host.invalid") == ""
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") == ""


@pytest.mark.parametrize(
    ("addresses", "loopback"),
    [
        (["127.0.1.1"], True),
        ([], True),
        (["192.0.2.1"], True),  # not this machine's: gloo falls back to the loopback
        (["OWN", "127.0.0.1"], False),
        (["192.0.2.1", "127.0.0.1"], True),
    ],
)
def test_where_gloo_listens(addresses, loopback, monkeypatch):
    """Any own address but a loopback will do; 0.0.0.0 can be had on every machine."""
    found = [a.replace("OWN", "0.0.0.0") for a in addresses]
    infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: infos)
    assert network._leads_to_loopback("name") == loopback


def test_a_name_that_leads_nowhere_is_no_accident():
    assert network._leads_to_loopback("no.such.host.invalid")
    assert network._leads_to_loopback("x" * 64)  # longer than a name may be
    assert address_towards("x" * 64) == ""


class Late:
    """A store whose "places" are read late."""

    def __init__(self, store: dist.Store):
        self.set, self.add, self.check, self._get = store.set, store.add, store.check, store.get

    def get(self, key: str) -> bytes:
        time.sleep(1.5 * (key == "places"))
        return self._get(key)


def _late(rank: int, port: int, out: Path) -> None:
    """Rank 0's store ends with it; rank 2 comes to read when the others have."""
    store = dist.TCPStore("localhost", port, None, rank == 0, wait_for_workers=False)
    store = Late(store) if rank == 2 else store
    try:
        settle_network(store, rank, 3, "cpu" if rank == 1 else "cuda", None)
    except UserError as error:
        (out / str(rank)).write_text(str(error))


def test_all_ranks_hear_of_a_machine_without_its_gpu(tmp_path):
    context = torch.multiprocessing.get_context("forkserver")
    port = free_port()
    ranks = [
        context.Process(target=_late, args=(rank, port, tmp_path), daemon=True) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    said = {path.read_text() for path in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) == 3
    assert len(said) == 1


def test_a_network_that_gloo_cannot_use_is_one_line(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("Gloo connectFullMesh failed with [pair.cc:152] timed out\nframe 1")

    monkeypatch.setattr(dist, "init_process_group", fails)
    args = pretrain_parser().parse_args(["--data_path", "x", "--device", "cpu"])
    with pytest.raises(UserError, match=r"over gloo \(GLOO_SOCKET_IFNAME .*timed out$"):
        distributed.init_distributed_mode(args)


@contextlib.contextmanager
def machines() -> Iterator[list[str]]:
    """Two network namespaces, linked; each one's name leads to its own loopback there.

    Yields:
        Their names.
    """
    names = [f"can{os.getpid()}-{i}" for i in range(2)]
    script = """
        for name; do ip netns add $name; done
        ip link add v0 netns $1 type veth peer name v1 netns $2
        for i in 0 1; do
            n=$((i + 1)); own=${!n}
            ip -n $own addr add 10.9.0.$((i + 1))/24 dev v$i
            ip -n $own link set lo up; ip -n $own link set v$i up
        done"""
    try:
        for i, name in enumerate(names):
            folder = Path("/etc/netns", name)
            folder.mkdir(parents=True)
            lines = "127.0.0.1 localhost", f"127.0.1.1 {name}", f"10.9.0.{2 - i} {names[1 - i]}"
            (folder / "hosts").write_text("\n".join([*lines, ""]))
        if subprocess.run(["bash", "-ec", script, "-", *names]).returncode:
            pytest.skip("this root may not add networks")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name])
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))),
    reason="needs root, ip, unshare and hostname",
)
def test_two_machines_whose_names_lead_to_themselves_train_together():
    """As Debian and Ubuntu write /etc/hosts; gloo alone would fail after a long wait."""
    train = [
        sys.executable, "main_pretrain.py", "--data_path", "digits", "--input_size", "16",
        "--model", "mae_vit_nano_patch4", "--batch_size", "64", "--epochs", "1",
        "--warmup_epochs", "0", "--num_workers", "0", "--output_dir", "",
    ]  # fmt: skip
    given = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
    env = {name: value for name, value in os.environ.items() if name not in given}
    env |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    named = ["unshare", "--uts", "bash", "-c", 'hostname "$0" && exec "$@"']
    with machines() as names:
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *named, name, *train], cwd=ROOT,
                env=env | {"MASTER_ADDR": names[0], "RANK": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank, name in enumerate(names)
        ]  # fmt: skip
        try:
            said = [rank.communicate(timeout=600)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert f"GLOO_SOCKET_IFNAME=v0, since {names[0]} leads to a loopback" in said[0]
    assert "64 x 1 accumulated x 2 processes" in said[0]
