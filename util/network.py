"""Which network the processes of several machines use, and whether their machines are alike."""

import contextlib
import fcntl
import ipaddress
import json
import os
import socket
import struct
import sys
import time
from typing import NamedTuple

import torch.distributed as dist

from util.errors import UserError

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
LOOPBACK = "127."
LEAVE, POLL = 10.0, 0.05  # seconds
RANK_ZERO_FIRST = 1.0  # seconds: most errors are met by all ranks, and one line is enough


class Place(NamedTuple):
    """Where a process runs: "cuda" or "cpu", its machine's name, and its address there."""

    device: str
    host: str
    address: str


def settle_network(
    store: dist.Store, rank: int, world_size: int, device: str, master: str | None
) -> None:
    """Sets GLOO_SOCKET_IFNAME where gloo would listen at an address that others do not reach.

    It listens where the machine's own name leads, which is 127.0.1.1 on Debian and Ubuntu.

    Args:
        device: "cuda" or "cpu".
        master: name or address of rank 0's machine; None if unknown.
    Raises:
        UserError: on every rank, if some have a GPU and others have none.
    """
    own = Place(device, socket.gethostname(), address_towards(master) if master else "")
    places = _exchange(store, rank, world_size, own)
    without = [(number, p.host) for number, p in enumerate(places) if p.device == "cpu"]
    if 0 < len(without) < world_size:
        number, host = without[0]
        _take_leave(store, rank, world_size)
        raise UserError(
            f"{len(without)} of {world_size} processes have no usable GPU, first process {number} "
            f"on {host}; --device cpu trains without any"
        )
    others = [p.address for p in places if p[1:] != own[1:]]  # names may be alike
    if name := gloo_interface(os.environ.get("NCCL_SOCKET_IFNAME", "")):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    elif others and "GLOO_SOCKET_IFNAME" not in os.environ and _leads_to_loopback(own.host):
        addresses = [*(a for a in others if a), *([master] if master else [])]
        found = (interface_of(address_towards(address)) for address in addresses)
        if name := next(filter(None, found), ""):
            os.environ["GLOO_SOCKET_IFNAME"] = name
        if rank == 0 or not name:
            value = f"={name}" if name else " must name the interface to the other machines"
            why = f"since {own.host} leads to a loopback"
            print(f"GLOO_SOCKET_IFNAME{value}, {why}", file=sys.stderr, flush=True)


def _exchange(store: dist.Store, rank: int, world_size: int, own: Place) -> list[Place]:
    """Every rank's, by rank."""
    store.set(f"place/{rank}", json.dumps(own))
    if rank == 0:
        found = [json.loads(store.get(f"place/{number}")) for number in range(world_size)]
        store.set("places", json.dumps(found))
    places = [Place(*place) for place in json.loads(store.get("places"))]
    store.add("read", 1)
    return places


def _take_leave(store: dist.Store, rank: int, world_size: int) -> None:
    """Before all end: rank 0, whose the store may be, waits for the others to read, they for it."""
    end = time.monotonic() + LEAVE
    if rank == 0:
        while store.add("read", 0) < world_size and time.monotonic() < end:
            time.sleep(POLL)
        store.set("left", "")
        return
    with contextlib.suppress(RuntimeError):  # the store has ended with rank 0
        while not store.check(["left"]) and time.monotonic() < end:
            time.sleep(POLL)
    time.sleep(RANK_ZERO_FIRST)  # the launcher ends this process when rank 0 has said why


def _leads_to_loopback(host: str) -> bool:
    """Whether gloo, which listens at the first of a name's addresses that is this machine's."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as listener:
                listener.bind(address)
                return ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
    return True  # it takes that if there is none


def address_towards(host: str) -> str:
    """This machine's IPv4 address on the way to another; '' for a loopback, or if there is none."""
    some = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.suppress(OSError, UnicodeError), some as route:
        route.connect((host, 9))  # sends nothing
        address = route.getsockname()[0]
        return "" if address.startswith(LOOPBACK) else address
    return ""


def interface_of(address: str) -> str:
    """The network interface with an IPv4 address; '' if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as some:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                request = struct.pack("256s", name.encode())
                found = fcntl.ioctl(some.fileno(), SIOCGIFADDR, request)[20:24]
                if socket.inet_ntoa(found) == address:
                    return name
    return ""


def gloo_interface(nccl: str) -> str:
    """The network interface that NCCL_SOCKET_IFNAME means, for gloo; '' if it is not just one.

    nccl takes beginnings of names, and whole ones after `=`; after `^`, those to leave out.
    """
    words, here = nccl.lstrip("=").split(","), [name for _, name in socket.if_nameindex()]
    whole = nccl.startswith("=")
    meant = [n for n in here if (n in words if whole else n.startswith(tuple(words)))]
    return meant[0] if nccl and len(meant) == 1 else ""
