"""Messages of rtnetlink (rtnetlink(7)): what the kernel tells of the network, and what is to be.

pyroute2 makes and reads them. Its package imports all of its parts, 23 MiB in 0.18 s; here only the
modules of the five kinds of messages are imported, 5 MiB in 0.03 s. An item is kept as the kernel
told it, and is put back by the same bytes.

Imported by the child alone (``guestagent.net.child``).
"""

import importlib.machinery
import socket
import struct
import sys
import types
from collections.abc import Mapping

from guestagent.api.net import (
    DEFAULT_ROUTE,
    Neighbour,
    Route,
    Rule,
    packed_address,
    split_prefix,
)
from vsock.errors import CallError
from vsock.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = (
    "KINDS",
    "LINK_MESSAGE",
    "PROTOCOLS",
    "Item",
    "Key",
    "Link",
    "State",
    "address_item",
    "item_of",
    "link_message",
    "link_of",
    "neighbour_item",
    "payload_of",
    "read_message",
    "route_item",
    "rule_item",
)


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

from pyroute2.netlink import rtnl  # noqa: E402
from pyroute2.netlink.rtnl import fibmsg, ifaddrmsg, ifinfmsg, ndmsg, rtmsg  # noqa: E402

_HEADER_BYTES = 16  # linux/netlink.h: struct nlmsghdr
_STATIC, _LINK_SCOPE = rtnl.rt_proto["static"], rtnl.rt_scope["link"]
_UNICAST = rtnl.rt_type["unicast"]
_OF_OTHERS = (rtnl.rt_proto["kernel"], rtnl.rt_proto["ra"])
_MANAGED = (rtnl.rt_proto["boot"], _STATIC)
#: The names of routes' protocols in replies; pyroute2 has more, and clients know these.
PROTOCOLS = {2: "kernel", 3: "boot", 4: "static", 9: "ra", 16: "dhcp"}
# linux/rtnetlink.h, linux/ipv6_route.h, linux/fib_rules.h, linux/if.h, linux/if_addr.h
_TABLE_LOCAL, _TABLE_COMPAT = 255, 252
_CLONED = 0x200
_IPV6_METRIC = 1024
_RULE_STATES = 0x18
_LOWER_UP = 0x10000
_IFA_LABEL = 3

Key = tuple[str, int, str]


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

    ``kind``, ``index`` (of the interface, 0: of none) and ``text`` identify it; ``raw`` is the
    kernel's message without its header. ``managed``: a request that gives the list may remove it.
    ``label`` is that of an IPv4 address where it is not the interface's name.
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
    def key(self) -> Key:
        return self.kind, self.index, self.text


class State(Record):
    """All that there is, but for what the kernel or a router makes by itself."""

    links: tuple[Link, ...]
    items: tuple[Item, ...]

    def link(self, index: int) -> Link | None:
        return next((link for link in self.links if link.index == index), None)


#: Of each kind of item: the class of its messages, and the number of the message that makes one;
#: the next two numbers remove one and list all.
KINDS: "Mapping[str, tuple[Any, int]]" = {
    "address": (ifaddrmsg.ifaddrmsg, rtnl.RTM_NEWADDR),
    "neighbour": (ndmsg.ndmsg, rtnl.RTM_NEWNEIGH),
    "route": (rtmsg.rtmsg, rtnl.RTM_NEWROUTE),
    "rule": (fibmsg.fibmsg, rtnl.RTM_NEWRULE),
}
LINK_MESSAGE = ifinfmsg.ifinfmsg


def payload_of(message: "Any") -> bytes:
    """Return a message without its header."""
    message.encode()
    return bytes(message.data[_HEADER_BYTES:])


def read_message(kind: "Any", raw: bytes) -> "Any":
    message = kind(raw)
    message.decode()
    return message


def link_message(
    index: int, attributes: Mapping[str, object] = {}, *, up: bool | None = None
) -> "Any":
    """Return a message about an interface; index 0 is one that is to be made."""
    message = LINK_MESSAGE()
    message["index"] = index
    if up is not None:
        message["change"] = ifinfmsg.IFF_UP
        message["flags"] = ifinfmsg.IFF_UP if up else 0
    message["attrs"] = [[name, value] for name, value in attributes.items()]
    return message


# --- of the kernel


def link_of(message: "Any") -> Link:
    """Return the interface of a message."""
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
        up=bool(flags & ifinfmsg.IFF_UP),
        carrier=bool(flags & _LOWER_UP),
        kind=kind,
        parent=(message.get_attr("IFLA_LINK") or 0) if kind == "vlan" else 0,
        vlan_id=vlan_id,
    )


def item_of(kind: str, message: "Any") -> Item | None:
    """Return the item of a message, None for what the kernel or a router looks after."""
    raw = bytes(message.data[_HEADER_BYTES : message["header"]["length"]])
    read = {"address": _address, "neighbour": _neighbour, "route": _route, "rule": _rule}[kind]
    return read(message, raw)


def _address(message: "Any", raw: bytes) -> Item | None:
    flags = message.get_attr("IFA_FLAGS") or message["flags"]
    if not flags & ifaddrmsg.IFA_F_PERMANENT:
        return None
    peer = message.get_attr("IFA_ADDRESS")
    local = message.get_attr("IFA_LOCAL") or peer
    text = f"{local}/{message['prefixlen']}"
    if peer != local:
        text += f" peer {peer}"
    is_own = message["family"] == socket.AF_INET6 and message["scope"] == _LINK_SCOPE
    label = message.get_attr("IFA_LABEL") or ""
    if ":" not in label:  # the interface's name, which may change
        raw, label = _without_label(raw), ""
    return Item(
        kind="address",
        index=message["index"],
        text=text,
        raw=raw,
        managed=not is_own,
        tentative=bool(flags & ifaddrmsg.IFA_F_TENTATIVE),
        dad_failed=bool(flags & ifaddrmsg.IFA_F_DADFAILED),
        label=label,
    )


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


def _with_flags(raw: bytes, flags: int) -> bytes:
    """Return a route or rule with other flags: the kernel refuses those that only it sets."""
    return raw[:8] + struct.pack("=I", flags) + raw[12:]


def _neighbour(message: "Any", raw: bytes) -> Item | None:
    address, mac = message.get_attr("NDA_DST"), message.get_attr("NDA_LLADDR")
    if not message["state"] & ndmsg.NUD_PERMANENT or not address or not mac:
        return None
    text = f"{address} {mac}"
    return Item(kind="neighbour", index=message["ifindex"], text=text, raw=raw, managed=True)


def _route(message: "Any", raw: bytes) -> Item | None:
    table = message.get_attr("RTA_TABLE") or message["table"]
    protocol, flags = message["proto"], message["flags"]
    # a clone is what the kernel has learnt of a route
    if table == _TABLE_LOCAL or protocol in _OF_OTHERS or flags & _CLONED:
        return None
    return Item(
        kind="route",
        index=message.get_attr("RTA_OIF") or 0,
        text=_route_text(message, table, protocol),
        raw=_with_flags(raw, flags & rtmsg.RTNH_F_ONLINK),
        managed=protocol in _MANAGED,
    )


def _route_text(message: "Any", table: int, protocol: int) -> str:
    any_address = "::" if message["family"] == socket.AF_INET6 else "0.0.0.0"
    words = [f"{message.get_attr('RTA_DST') or any_address}/{message['dst_len']}"]
    for word, attribute in (("via", "RTA_GATEWAY"), ("source", "RTA_PREFSRC")):
        if message.get_attr(attribute):
            words += [word, message.get_attr(attribute)]
    words += ["table", str(table), "metric", str(message.get_attr("RTA_PRIORITY") or 0)]
    words += ["protocol", str(protocol)]
    if message["flags"] & rtmsg.RTNH_F_ONLINK:
        words.append("on_link")
    if message["type"] != _UNICAST or message["tos"] or message["src_len"]:
        source = message.get_attr("RTA_SRC") or any_address
        words += ["type", str(message["type"]), "tos", str(message["tos"])]
        words += ["from", f"{source}/{message['src_len']}"]
    for hop in message.get_attr("RTA_MULTIPATH") or ():
        words += ["hop", str(hop["oif"]), str(hop.get_attr("RTA_GATEWAY"))]
    return " ".join(words)


def _rule(message: "Any", raw: bytes) -> Item | None:
    protocol = message.get_attr("FRA_PROTOCOL") or 0
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
    if message["action"] == fibmsg.FR_ACT_TO_TBL:
        words += ["table", str(message.get_attr("FRA_TABLE") or message["table"])]
    else:
        words += ["action", str(message["action"])]
    words += ["protocol", str(protocol)]
    raw = _with_flags(raw, message["flags"] & ~_RULE_STATES)
    managed = protocol == _STATIC
    return Item(kind="rule", index=0, text=" ".join(words), raw=raw, managed=managed)


# --- of a request


def address_item(index: int, text: str, *, dad: bool) -> Item:
    """Return the item of an ADDRESS/PREFIX on an interface."""
    family, packed, length = split_prefix("address", text)
    address = socket.inet_ntop(family, packed)
    flags = ifaddrmsg.IFA_F_PERMANENT
    if family == socket.AF_INET6 and not dad:
        flags |= ifaddrmsg.IFA_F_NODAD
    fields = {"family": family, "prefixlen": length, "index": index, "flags": flags}
    attributes = {"IFA_LOCAL": address, "IFA_ADDRESS": address, "IFA_FLAGS": flags}
    if family == socket.AF_INET and length < 31:  # RFC 3021: a link of two has no broadcast
        host = (1 << (32 - length)) - 1
        broadcast = (int.from_bytes(packed, "big") | host).to_bytes(4, "big")
        attributes["IFA_BROADCAST"] = socket.inet_ntop(family, broadcast)
    return _made("address", fields, attributes)


def neighbour_item(index: int, neighbour: Neighbour) -> Item:
    """Return the item of a permanent neighbour of an interface."""
    family, packed = packed_address("address", neighbour.address)
    fields = {"family": family, "ifindex": index, "state": ndmsg.NUD_PERMANENT}
    address = socket.inet_ntop(family, packed)
    return _made("neighbour", fields, {"NDA_DST": address, "NDA_LLADDR": neighbour.mac.lower()})


def route_item(index: int, route: Route) -> Item:
    """Return the item of a route by an interface."""
    family = route.family
    fields = {
        "family": family,
        "proto": _STATIC,
        "type": _UNICAST,
        "table": route.table if route.table < 256 else _TABLE_COMPAT,
        "flags": rtmsg.RTNH_F_ONLINK if route.on_link else 0,
    }
    attributes: dict[str, object] = {"RTA_OIF": index, "RTA_TABLE": route.table}
    if route.destination != DEFAULT_ROUTE:
        fields["dst_len"] = _add_prefix(attributes, "RTA_DST", route.destination)
    if route.gateway is None and family == socket.AF_INET:
        fields["scope"] = _LINK_SCOPE
    for name, text in (("RTA_GATEWAY", route.gateway), ("RTA_PREFSRC", route.source)):
        if text is not None:
            attributes[name] = socket.inet_ntop(*packed_address("address", text))
    # a metric of 0 is none, for which IPv6 has a number of its own
    metric = route.metric or (_IPV6_METRIC if family == socket.AF_INET6 else 0)
    if metric:
        attributes["RTA_PRIORITY"] = metric
    return _made("route", fields, attributes)


def rule_item(rule: Rule) -> Item:
    """Return the item of a rule."""
    fields = {
        "family": rule.family_number,
        "action": fibmsg.FR_ACT_TO_TBL,
        "table": rule.table if rule.table < 256 else _TABLE_COMPAT,
    }
    attributes: dict[str, object] = {
        "FRA_TABLE": rule.table,
        "FRA_PRIORITY": rule.priority,
        "FRA_PROTOCOL": _STATIC,
    }
    if rule.source is not None:
        fields["src_len"] = _add_prefix(attributes, "FRA_SRC", rule.source)
    if rule.destination is not None:
        fields["dst_len"] = _add_prefix(attributes, "FRA_DST", rule.destination)
    if rule.interface is not None:
        attributes["FRA_IIFNAME"] = rule.interface
    if rule.mark is not None:
        attributes["FRA_FWMARK"] = rule.mark
    return _made("rule", fields, attributes)


def _add_prefix(attributes: dict[str, object], name: str, text: str) -> int:
    """Add the address of an ADDRESS/PREFIX; return the length of the prefix, 0: any address."""
    family, packed, length = split_prefix(name, text)
    if length:
        attributes[name] = socket.inet_ntop(family, packed)
    return length


def _made(kind: str, fields: Mapping[str, int], attributes: Mapping[str, object]) -> Item:
    """Return what the kernel would say of a message."""
    message = KINDS[kind][0]()
    for name, value in fields.items():
        message[name] = value
    message["attrs"] = [[name, value] for name, value in attributes.items()]
    message.encode()
    item = item_of(kind, read_message(type(message), bytes(message.data)))
    assert item is not None
    return item
