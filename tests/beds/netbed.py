"""Network namespaces with a pair of veth interfaces, and the network as iproute2 tells it."""

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guestagent.storage import syscalls

CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000
MODULES = ("ipv6", "veth", "8021q")
MAC = "52:54:00:00:00:01"
#: What changes by itself, or names a thing that a restored one has anew.
_VOLATILE = frozenset(
    [
        *("valid_life_time", "preferred_life_time", "link_index", "stats", "stats64"),
        *("operstate", "flags", "dynamic", "tentative", "mngtmpaddr"),
    ]
)


def ip(*words: str) -> str:
    """Run ip(8), which must succeed."""
    result = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"ip {' '.join(words)}: {result.stderr}"
    return result.stdout


def ask(*words: str) -> Any:
    """Return what ip(8) says, from its JSON."""
    return json.loads(ip("-j", *words) or "[]")


def batch(options: tuple[str, ...], *commands: str) -> list[Any]:
    """Return what ip(8) says to each of the commands, by one process."""
    command = ["ip", *options, "-j", "-batch", "-"]
    text = "".join(f"{line}\n" for line in commands)
    said = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    found, decoder = [], json.JSONDecoder()
    while said := said.lstrip():
        value, end = decoder.raw_decode(said)
        found.append(value)
        said = said[end:]
    assert len(found) == len(commands), found
    return found


@contextlib.contextmanager
def network_namespace() -> Iterator[None]:
    """Work in a network namespace of this thread's own, with the interfaces v0 and v1, and with a
    host name of its own."""
    for module in MODULES:
        subprocess.run(["modprobe", module], check=True)
    with contextlib.ExitStack() as stack:
        for kind, flag in (("net", CLONE_NEWNET), ("uts", CLONE_NEWUTS)):
            fd = os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            stack.callback(syscalls.setns, fd, flag)
        syscalls.unshare(CLONE_NEWNET | CLONE_NEWUTS)
        # tests of it turn it on: it takes two seconds for each interface
        set_duplicate_detection("default", False)
        ip("link", "set", "lo", "up")
        ip("link", "add", "v0", "address", MAC, "type", "veth", "peer", "name", "v1")
        ip("link", "set", "v1", "up")
        yield
        ip("link", "del", next(link["ifname"] for link in ask("link") if link["address"] == MAC))


def set_duplicate_detection(name: str, is_on: bool) -> None:
    """Let the kernel look for duplicates of IPv6 addresses on an interface, or not."""
    Path(f"/proc/sys/net/ipv6/conf/{name}/accept_dad").write_text(str(int(is_on)))


def world(etc: Path | None = None) -> dict[str, object]:
    """Return all that a request may change, as iproute2 and the files say it, to be compared."""
    links, addresses, neighbours = batch(("-d",), "link", "addr", "neigh show nud permanent")
    found: dict[str, object] = {
        "links": _sorted([{**link, "up": "UP" in link["flags"]} for link in links]),
        "addresses": [
            (link["ifname"], "UP" in link["flags"], _addresses(link)) for link in addresses
        ],
        "neighbours": _sorted(neighbours),
        "hostname": socket.gethostname(),
    }
    for family in ("-4", "-6"):
        routes, rules = batch((family,), "route show table all", "rule")
        found[f"routes {family}"], found[f"rules {family}"] = _sorted(routes), _sorted(rules)
    if etc is not None:
        found["files"] = {
            path.name: (os.readlink(path) if path.is_symlink() else path.read_text())
            for path in sorted(etc.iterdir())
        }
    return found


def _addresses(link: dict[str, Any]) -> list[object]:
    """IPv4 addresses in their order, of which the first is the primary one; then IPv6."""
    plain = [_plain(one) for one in link["addr_info"]]
    return [
        *(one for one in plain if one["family"] == "inet"),
        *_sorted([one for one in plain if one["family"] == "inet6"]),
    ]


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    kept = {name: item for name, item in value.items() if name not in _VOLATILE}
    return {**kept, "flags": _flags(value)} if "flags" in value else kept


def _flags(value: dict[str, Any]) -> list[str]:
    return [flag for flag in value["flags"] if flag not in ("linkdown", "dead")]


def _sorted(values: list[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(_plain(value), sort_keys=True) for value in values)
