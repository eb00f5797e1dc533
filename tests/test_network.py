"""Processes of several machines: one network that all reach, and machines that are alike."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from conftest import ROOT

from util import network
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
    with pytest.raises(UserError, match=said):
        settle_network(places, 0, 2, "cpu", None)
    with pytest.raises(UserError, match=said):  # rank 1, told what rank 0 has gathered
        settle_network(places, 1, 2, "cuda", None)


def test_addresses_and_interfaces_are_the_systems():
    assert address_towards("127.0.0.1") == address_towards("no.such.host.invalid") == ""
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") == ""


@contextlib.contextmanager
def machines() -> Iterator[None]:
    """Two network namespaces, can0 and can1, linked; each name leads to its own loopback there."""
    script = """
        for i in 0 1; do ip netns add can$i; done
        ip link add v0 netns can0 type veth peer name v1 netns can1
        for i in 0 1; do
            ip -n can$i addr add 10.9.0.$((i + 1))/24 dev v$i
            ip -n can$i link set lo up; ip -n can$i link set v$i up
            mkdir -p /etc/netns/can$i
            printf "127.0.0.1 localhost\n127.0.1.1 can$i\n10.9.0.$((2 - i)) can$((1 - i))\n" \
                > /etc/netns/can$i/hosts
        done"""
    try:
        subprocess.run(["bash", "-ec", script], check=True)
        yield
    finally:
        for name in ("can0", "can1"):
            subprocess.run(["ip", "netns", "del", name])
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip")
def test_two_machines_whose_names_lead_to_themselves_train_together():
    """As Debian and Ubuntu write /etc/hosts; gloo alone would wait ten minutes and fail."""
    train = [
        sys.executable, "main_pretrain.py", "--data_path", "digits", "--input_size", "16",
        "--model", "mae_vit_nano_patch4", "--batch_size", "64", "--epochs", "1",
        "--warmup_epochs", "0", "--num_workers", "0", "--output_dir", "",
    ]  # fmt: skip
    env = os.environ | {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "can0"}
    with machines():
        named = ["unshare", "--uts", "bash", "-c", 'hostname "$0" && exec "$@"']
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", f"can{rank}", *named, f"can{rank}", *train],
                cwd=ROOT, env=env | {"RANK": str(rank), "MASTER_PORT": "29500"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        try:
            said = [rank.communicate(timeout=180)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "GLOO_SOCKET_IFNAME=v0, since can0 leads to a loopback" in said[0]
    assert "64 x 1 accumulated x 2 processes" in said[0]
