"""The kernel's network by rtnetlink (rtnetlink(7)): what there is, and single changes to it.

pyroute2 makes and reads the messages. Its package imports all of its parts, 23 MiB in 0.18 s; here
only the modules of the five kinds of messages are imported, 5 MiB in 0.03 s. What was there is kept
as the kernel told it, and is put back by the same bytes.

Imported by the child alone (``guestagent.net.child``).
"""

import errno
import importlib.machinery
import os
import socket
import struct
import sys
import types
from collections.abc import Iterator, Mapping

from guestagent.api.net import (
    DEFAULT_ROUTE,
    FAMILIES,
    Neighbour,
    Route,
    Rule,
    packed_address,
    split_prefix,
)
from vsock.closeable import Closeable
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record
from vsock.retry import has_errno, retry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ("Item", "Kernel", "Link", "State")


def _without_all_of_pyroute2() -> None:
    """Let modules of pyroute2 be imported without its ``__init__``, which imports every other."""
    if "pyroute2" in sys.modules:
        return
    spec = importlib.machinery.PathFinder.find_spec("pyroute2")
    if spec is None or spec.submodule_search_locations is None:
        raise CallError(
            "unsupported",
            "this guest has no pyroute2",
            step="import pyroute2",
            hint="build the boot image with the feature net",
        )
    package = types.ModuleType("pyroute2")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["pyroute2"] = package


_without_all_of_pyroute2()

from pyroute2.netlink.rtnl.fibmsg import fibmsg  # noqa: E402
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg  # noqa: E402
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg  # noqa: E402
from pyroute2.netlink.rtnl.ndmsg import ndmsg  # noqa: E402
from pyroute2.netlink.rtnl.rtmsg import rtmsg  # noqa: E402

# linux/netlink.h
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP, _EXCL, _CREATE, _REPLACE = 0x1, 0x4, 0x300, 0x200, 0x400, 0x100
_DUMP_INTERRUPTED, _ACK_TLVS = 0x10, 0x200
_SOL_NETLINK, _CAP_ACK, _EXT_ACK = 270, 10, 11
_ATTRIBUTE_MESSAGE = 1
_HEADER = struct.Struct("=IHHII")
# linux/rtnetlink.h
_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_GROUPS = 0x1 | 0x100  # RTMGRP_LINK, RTMGRP_IPV6_IFADDR
_RTN_UNICAST, _SCOPE_LINK = 1, 253
_PROTO_KERNEL, _PROTO_BOOT, _PROTO_STATIC, _PROTO_RA = 2, 3, 4, 9
_PROTOCOLS = {2: "kernel", 3: "boot", 4: "static", 9: "ra", 16: "dhcp"}
_TABLE_LOCAL, _TABLE_COMPAT = 255, 252
_CLONED, _ON_LINK = 0x200, 0x4
_IPV6_METRIC = 1024  # linux/ipv6_route.h: IP6_RT_PRIO_USER
# linux/if.h, linux/if_addr.h, linux/neighbour.h, linux/fib_rules.h
_UP, _LOWER_UP = 0x1, 0x10000
_NO_DAD, _DAD_FAILED, _TENTATIVE, _PERMANENT = 0x02, 0x08, 0x40, 0x80
_NUD_PERMANENT, _IFA_LABEL = 0x80, 3
_TO_TABLE, _RULE_STATES = 1, 0x18
_RECEIVE_BYTES = 64 * 1024
#: Beyond these the kernel's tables are not ours to keep a copy of.
_MAX_ITEMS = 20_000
_MAX_INTERFACES = 4096
#: Reasons that pass: a device that is being changed, or is on its way up, a dump that was cut.
_PASSING = has_errno(errno.EBUSY, errno.ENETDOWN, errno.EAGAIN)
_PASSING_SECONDS = 1.0
_INVALID = (
    errno.EINVAL, errno.ERANGE, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL,
)  # fmt: skip
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)


class Link(Record):
    """An interface. ``parent`` is the index of a VLAN's interface, 0 for others."""

    index: int
    name: str
    mac: str
    mtu: int
    up: bool
    carrier: bool
    kind: str
    parent: int
    vlan_id: int


class Item(Record):
    """An address, a neighbour, a route or a rule.

    ``kind`` and ``text`` and ``index``, the interface's (0: of none), say which; ``raw`` is the
    kernel's message without its header. ``managed``: a request that gives the list may remove it.
    ``label`` is an IPv4 address's where it is not the interface's name.
    """

    kind: str
    index: int
    text: str
    raw: bytes
    managed: bool
    tentative: bool = False
    dad_failed: bool = False
    label: str = ""

    @property
    def key(self) -> tuple[str, int, str]:
        return self.kind, self.index, self.text


class State(Record):
    """All that there is; nothing of what the kernel or a router makes by itself."""

    links: tuple[Link, ...]
    items: tuple[Item, ...]

    def link(self, index: int) -> Link | None:
        return next((link for link in self.links if link.index == index), None)


class _Kind(Record):
    """How a kind of item is asked for, made and removed: the numbers of its messages."""

    message: object
    new: int


_KINDS: Mapping[str, _Kind] = {
    "address": _Kind(message=ifaddrmsg, new=20),
    "neighbour": _Kind(message=ndmsg, new=28),
    "route": _Kind(message=rtmsg, new=24),
    "rule": _Kind(message=fibmsg, new=32),
}


class Kernel(Closeable):
    """A socket for requests, and one that the kernel's changes wake."""

    def __init__(self) -> None:
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self._events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        for option in (_CAP_ACK, _EXT_ACK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._events.bind((0, _GROUPS))
        self._events.setblocking(False)

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()
        self._events.close()

    # --- what there is

    def links(self, deadline: Deadline) -> tuple[Link, ...]:
        """Return every interface."""
        found = tuple(map(_link, self._dump(ifinfmsg, _GETLINK, socket.AF_UNSPEC, deadline)))
        _bound(found, _MAX_INTERFACES)
        return found

    def read(self, deadline: Deadline) -> State:
        """Return everything there is.

        Raises:
            CallError: ``resource``, more than is kept; ``timeout`` or ``cancelled``.
            OSError: the kernel refused.
        """
        items: list[Item] = []
        for name, kind in _KINDS.items():
            is_by_family = name in ("route", "rule")
            for family in FAMILIES.values() if is_by_family else (socket.AF_UNSPEC,):
                for message in self._dump(kind.message, kind.new + 2, family, deadline):
                    items += _item(name, message)
                    _bound(items, _MAX_ITEMS)
        # a module of VLANs or tunnels may list a rule twice while it comes and goes
        unique = {item.key: item for item in items}
        return State(links=self.links(deadline), items=tuple(unique.values()))

    def wait(self, deadline: Deadline, step: str, seconds: float) -> bool:
        """Wait until interfaces or addresses have changed; return False when ``seconds`` pass."""
        if not deadline.wait([self._events.fileno()], step, at_most=seconds):
            return False
        while True:  # what they say is asked for anyway
            try:
                self._events.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    # --- changes

    def add(self, item: Item, deadline: Deadline, *, again: bool = False) -> None:
        """Make an item; with ``again`` it may be there already.

        Raises:
            CallError: the kernel refused, with its errno.
        """
        kind = _KINDS[item.kind].new
        flags = _CREATE | (_REPLACE if item.kind == "neighbour" else _EXCL)
        try:
            self._change(kind, flags, item.raw, deadline)
        except CallError as error:
            if not (again and error.errno == errno.EEXIST):
                raise

    def remove(self, item: Item, deadline: Deadline) -> None:
        """Remove an item, which may be gone: the kernel removes routes with their address."""
        try:
            self._change(_KINDS[item.kind].new + 1, 0, item.raw, deadline)
        except CallError as error:
            if error.errno not in (errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL, errno.ENODEV):
                raise

    def set_link(
        self,
        index: int,
        deadline: Deadline,
        *,
        name: str | None = None,
        mtu: int | None = None,
        up: bool | None = None,
    ) -> None:
        """Change an interface."""
        message = ifinfmsg()
        message["index"] = index
        if up is not None:
            message["change"] = _UP
            message["flags"] = _UP if up else 0
        if name is not None:
            message["attrs"].append(["IFLA_IFNAME", name])
        if mtu is not None:
            message["attrs"].append(["IFLA_MTU", mtu])
        self._change(_NEWLINK, 0, _payload(message), deadline)

    def add_vlan(self, name: str, parent: int, vlan_id: int, deadline: Deadline) -> None:
        """Make a VLAN interface."""
        message = ifinfmsg()
        data = {"attrs": [["IFLA_VLAN_ID", vlan_id]]}
        info = {"attrs": [["IFLA_INFO_KIND", "vlan"], ["IFLA_INFO_DATA", data]]}
        message["attrs"] = [["IFLA_IFNAME", name], ["IFLA_LINK", parent], ["IFLA_LINKINFO", info]]
        self._change(_NEWLINK, _CREATE | _EXCL, _payload(message), deadline)

    def remove_link(self, index: int, deadline: Deadline) -> None:
        """Remove an interface that was made."""
        message = ifinfmsg()
        message["index"] = index
        self._change(_DELLINK, 0, _payload(message), deadline)

    def _change(self, kind: int, flags: int, payload: bytes, deadline: Deadline) -> None:
        def attempt() -> None:
            for _ in self._request(kind, flags | _ACK, payload, deadline):
                pass

        with deadline.part(_PASSING_SECONDS) as part:
            try:
                retry(attempt, part, when=_PASSING, step="ask the kernel")
            except OSError as error:
                code = _code(error.errno)
                raise CallError(code, error.strerror or str(error), errno=error.errno) from None

    # --- netlink

    def _dump(self, message: "Any", kind: int, family: int, deadline: Deadline) -> "list[Any]":
        asked = message()
        asked["family"] = family

        def attempt() -> "list[Any]":
            found = []
            for raw in self._request(kind, _DUMP, _payload(asked), deadline):
                one = message(raw)
                one.decode()
                found.append(one)
            return found

        try:
            return retry(attempt, deadline, when=has_errno(errno.EAGAIN), step="read the network")
        except OSError as error:
            if error.errno in _UNSUPPORTED:  # a kernel without this family, or without rules
                return []
            raise

    def _request(
        self, kind: int, flags: int, payload: bytes, deadline: Deadline
    ) -> Iterator[bytes]:
        """Send a request; yield each message of the answer, until its end or acknowledgement.

        Raises:
            OSError: the kernel refused, with what it said of it; EAGAIN: the list has changed
                while it was read.
        """
        self._sequence += 1
        length = _HEADER.size + len(payload)
        header = _HEADER.pack(length, kind, flags | _REQUEST, self._sequence, 0)
        self._socket.send(header + payload)
        is_cut = False
        while True:
            deadline.wait([self._socket.fileno()], "wait for the kernel")
            data = self._socket.recv(_RECEIVE_BYTES)
            while len(data) >= _HEADER.size:
                length, kind, flags, sequence, _ = _HEADER.unpack_from(data)
                message, data = data[:length], data[(length + 3) & ~3 :]
                if sequence != self._sequence:  # of a request that was given up
                    continue
                is_cut = is_cut or bool(flags & _DUMP_INTERRUPTED)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    _raise_refusal(message, flags)
                    if is_cut:
                        raise OSError(errno.EAGAIN, "the list has changed while it was read")
                    return
                yield message


def _raise_refusal(message: bytes, flags: int) -> None:
    """Raise what an acknowledgement says (struct nlmsgerr, NETLINK_EXT_ACK)."""
    if len(message) < _HEADER.size + 4:
        return
    number = -struct.unpack_from("=i", message, _HEADER.size)[0]
    if number == 0:
        return
    said = ""
    offset = 2 * _HEADER.size + 4
    while flags & _ACK_TLVS and offset + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, offset)
        if kind == _ATTRIBUTE_MESSAGE:
            said = message[offset + 4 : offset + length].rstrip(b"\0").decode("ascii", "replace")
        offset += max(4, (length + 3) & ~3)
    raise OSError(number, f"{os.strerror(number)}: {said}" if said else os.strerror(number))


def _code(number: int | None) -> str:
    if number in _INVALID:
        return "invalid"
    if number in _UNSUPPORTED:
        return "unsupported"
    return {
        errno.EEXIST: "conflict",
        errno.EADDRINUSE: "conflict",
        errno.ENODEV: "not_found",
        errno.ENOENT: "not_found",
        errno.EBUSY: "busy",
        errno.EPERM: "denied",
        errno.ENOMEM: "resource",
        errno.ENOBUFS: "resource",
    }.get(number or 0, "device")


def _bound(found: "tuple[object, ...] | list[Item]", most: int) -> None:
    if len(found) > most:
        raise CallError(
            "resource", f"the guest's network has more than {most} entries", step="read the network"
        )


def _payload(message: "Any") -> bytes:
    message.encode()
    return bytes(message.data[_HEADER.size :])


# --- messages of the kernel


def _link(message: "Any") -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") if info else None) or ""
    vlan_id = 0
    if kind == "vlan" and info.get_attr("IFLA_INFO_DATA"):
        vlan_id = info.get_attr("IFLA_INFO_DATA").get_attr("IFLA_VLAN_ID") or 0
    flags = message["flags"]
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME") or "",
        mac=message.get_attr("IFLA_ADDRESS") or "",
        mtu=message.get_attr("IFLA_MTU") or 0,
        up=bool(flags & _UP),
        carrier=bool(flags & _LOWER_UP),
        kind=kind,
        parent=(message.get_attr("IFLA_LINK") or 0) if kind == "vlan" else 0,
        vlan_id=vlan_id,
    )


def _item(kind: str, message: "Any") -> list[Item]:
    """Return the item of a message, none for what the kernel or a router looks after."""
    raw = bytes(message.data[_HEADER.size : message["header"]["length"]])
    return {"address": _address, "neighbour": _neighbour, "route": _route, "rule": _rule}[kind](
        message, raw
    )


def _address(message: "Any", raw: bytes) -> list[Item]:
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    if not flags & _PERMANENT:
        return []
    peer = message.get_attr("IFA_ADDRESS")
    local = message.get_attr("IFA_LOCAL") or peer
    text = f"{local}/{message['prefixlen']}"
    if peer != local:
        text += f" peer {peer}"
    is_own = message["family"] == socket.AF_INET6 and message["scope"] == _SCOPE_LINK
    label = message.get_attr("IFA_LABEL") or ""
    if ":" not in label:  # the interface's name, which may change
        raw, label = _without_label(raw), ""
    return [
        Item(
            kind="address",
            index=message["index"],
            text=text,
            raw=raw,
            managed=not is_own,
            tentative=bool(flags & _TENTATIVE),
            dad_failed=bool(flags & _DAD_FAILED),
            label=label,
        )
    ]


def _without_label(raw: bytes) -> bytes:
    """Return the message of an address (struct ifaddrmsg and attributes) without IFA_LABEL."""
    kept, offset = raw[:8], 8
    while offset + 4 <= len(raw):
        length, kind = struct.unpack_from("=HH", raw, offset)
        end = offset + max(4, (length + 3) & ~3)
        if kind != _IFA_LABEL:
            kept += raw[offset:end]
        offset = end
    return kept


def _neighbour(message: "Any", raw: bytes) -> list[Item]:
    address, mac = message.get_attr("NDA_DST"), message.get_attr("NDA_LLADDR")
    if not message["state"] & _NUD_PERMANENT or not address or not mac:
        return []
    text = f"{address} {mac}"
    return [Item(kind="neighbour", index=message["ifindex"], text=text, raw=raw, managed=True)]


def _route(message: "Any", raw: bytes) -> list[Item]:
    table = message.get_attr("RTA_TABLE") or message["table"]
    protocol = message["proto"]
    if table == _TABLE_LOCAL or protocol in (_PROTO_KERNEL, _PROTO_RA):
        return []
    if message["flags"] & _CLONED:  # what the kernel has learnt of a route
        return []
    # read-only flags (RTNH_F_DEAD, RTNH_F_LINKDOWN) are refused when they come back
    flags = message["flags"] & _ON_LINK
    raw = raw[:8] + struct.pack("=I", flags) + raw[12:]
    index = message.get_attr("RTA_OIF") or 0
    text = _route_text(message, table, protocol)
    managed = protocol in (_PROTO_BOOT, _PROTO_STATIC)
    return [Item(kind="route", index=index, text=text, raw=raw, managed=managed)]


def _route_text(message: "Any", table: int, protocol: int) -> str:
    any_address = "::" if message["family"] == socket.AF_INET6 else "0.0.0.0"
    words = [f"{message.get_attr('RTA_DST') or any_address}/{message['dst_len']}"]
    for word, attribute in (("via", "RTA_GATEWAY"), ("source", "RTA_PREFSRC")):
        if message.get_attr(attribute):
            words += [word, message.get_attr(attribute)]
    words += ["table", str(table), "metric", str(message.get_attr("RTA_PRIORITY") or 0)]
    words += ["protocol", str(protocol)]
    if message["flags"] & _ON_LINK:
        words.append("on_link")
    if message["type"] != _RTN_UNICAST or message["tos"] or message["src_len"]:
        source = message.get_attr("RTA_SRC") or any_address
        words += ["type", str(message["type"]), "tos", str(message["tos"])]
        words += ["from", f"{source}/{message['src_len']}"]
    for hop in message.get_attr("RTA_MULTIPATH") or ():
        words += ["hop", str(hop["oif"]), str(hop.get_attr("RTA_GATEWAY"))]
    return " ".join(words)


def _rule(message: "Any", raw: bytes) -> list[Item]:
    table = message.get_attr("FRA_TABLE") or message["table"]
    protocol = message.get_attr("FRA_PROTOCOL") or 0
    raw = raw[:8] + struct.pack("=I", message["flags"] & ~_RULE_STATES) + raw[12:]
    family = "ipv6" if message["family"] == socket.AF_INET6 else "ipv4"
    words = [family, "priority", str(message.get_attr("FRA_PRIORITY") or 0)]
    for word, attribute, length in (("from", "FRA_SRC", "src_len"), ("to", "FRA_DST", "dst_len")):
        if message[length] or message.get_attr(attribute):
            words += [word, f"{message.get_attr(attribute)}/{message[length]}"]
    for word, attribute in (
        ("interface", "FRA_IIFNAME"), ("out", "FRA_OIFNAME"), ("mark", "FRA_FWMARK"),
        ("goto", "FRA_GOTO"), ("suppress", "FRA_SUPPRESS_PREFIXLEN"),
    ):  # fmt: skip
        value = message.get_attr(attribute)
        if value is not None and value != 0xFFFFFFFF:
            words += [word, str(value)]
    if message["action"] == _TO_TABLE:
        words += ["table", str(table)]
    else:
        words += ["action", str(message["action"])]
    words += ["protocol", str(protocol)]
    managed = protocol == _PROTO_STATIC
    return [Item(kind="rule", index=0, text=" ".join(words), raw=raw, managed=managed)]


# --- messages of a request


def address_item(index: int, text: str, *, dad: bool) -> Item:
    """Return the item of an ADDRESS/PREFIX on an interface."""
    family, packed, length = split_prefix("address", text)
    address = socket.inet_ntop(family, packed)
    message = ifaddrmsg()
    flags = _PERMANENT | (0 if dad or family == socket.AF_INET else _NO_DAD)
    message["family"], message["prefixlen"], message["index"] = family, length, index
    message["flags"] = flags
    attributes = [["IFA_LOCAL", address], ["IFA_ADDRESS", address], ["IFA_FLAGS", flags]]
    if family == socket.AF_INET and length < 31:  # RFC 3021: a link of two has no broadcast
        host = (1 << (32 - length)) - 1
        broadcast = (int.from_bytes(packed, "big") | host).to_bytes(4, "big")
        attributes.append(["IFA_BROADCAST", socket.inet_ntop(family, broadcast)])
    message["attrs"] = attributes
    return _made("address", message)


def neighbour_item(index: int, neighbour: Neighbour) -> Item:
    """Return the item of a permanent neighbour of an interface."""
    family, packed = packed_address("address", neighbour.address)
    message = ndmsg()
    message["family"], message["ifindex"], message["state"] = family, index, _NUD_PERMANENT
    message["attrs"] = [
        ["NDA_DST", socket.inet_ntop(family, packed)],
        ["NDA_LLADDR", neighbour.mac.lower()],
    ]
    return _made("neighbour", message)


def route_item(index: int, route: Route) -> Item:
    """Return the item of a route by an interface."""
    family = route.family
    message = rtmsg()
    message["family"], message["proto"], message["type"] = family, _PROTO_STATIC, _RTN_UNICAST
    attributes: list[list[object]] = [["RTA_OIF", index], ["RTA_TABLE", route.table]]
    message["table"] = route.table if route.table < 256 else _TABLE_COMPAT
    if route.destination != DEFAULT_ROUTE:
        _, packed, length = split_prefix("destination", route.destination)
        message["dst_len"] = length
        if length:
            attributes.append(["RTA_DST", socket.inet_ntop(family, packed)])
    if route.gateway is None and family == socket.AF_INET:
        message["scope"] = _SCOPE_LINK
    for name, text in (("RTA_GATEWAY", route.gateway), ("RTA_PREFSRC", route.source)):
        if text is not None:
            packed = packed_address("address", text)[1]
            attributes.append([name, socket.inet_ntop(family, packed)])
    metric = route.metric
    if not metric:  # 0 is none, for which IPv6 has a number of its own
        metric = _IPV6_METRIC if family == socket.AF_INET6 else 0
    if metric:
        attributes.append(["RTA_PRIORITY", metric])
    message["flags"] = _ON_LINK if route.on_link else 0
    message["attrs"] = attributes
    return _made("route", message)


def rule_item(rule: Rule) -> Item:
    """Return the item of a rule."""
    family = rule.family_number
    message = fibmsg()
    message["family"], message["action"] = family, _TO_TABLE
    message["table"] = rule.table if rule.table < 256 else _TABLE_COMPAT
    attributes: list[list[object]] = [
        ["FRA_TABLE", rule.table],
        ["FRA_PRIORITY", rule.priority],
        ["FRA_PROTOCOL", _PROTO_STATIC],
    ]
    for field, attribute, text in (
        ("src_len", "FRA_SRC", rule.source),
        ("dst_len", "FRA_DST", rule.destination),
    ):
        if text is not None:
            _, packed, length = split_prefix(field, text)
            message[field] = length
            if length:
                attributes.append([attribute, socket.inet_ntop(family, packed)])
    if rule.interface is not None:
        attributes.append(["FRA_IIFNAME", rule.interface])
    if rule.mark is not None:
        attributes.append(["FRA_FWMARK", rule.mark])
    message["attrs"] = attributes
    return _made("rule", message)


def _made(kind: str, message: "Any") -> Item:
    """Return what the kernel would say of a message."""
    message.encode()
    again = type(message)(bytes(message.data))
    again.decode()
    return _item(kind, again)[0]


def route_protocol(number: int) -> str:
    """Return the name of a route's protocol, its number where it has none."""
    return _PROTOCOLS.get(number, str(number))
