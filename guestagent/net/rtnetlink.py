"""The kernel's network by rtnetlink: what there is, and single changes to it.

The sockets are our own: importing those of pyroute2 takes twice the memory and time of its
messages, and they know no deadline that can be cancelled. Imported by the child alone
(``guestagent.net.child``).
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sized

from guestagent.api.net import FAMILIES
from guestagent.net.messages import (
    KINDS,
    LINK_MESSAGE,
    Item,
    Link,
    State,
    item_of,
    link_message,
    link_of,
    payload_of,
    read_message,
)
from vsock.closeable import Closeable
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.retry import has_errno, retry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ("Kernel",)

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
_RECEIVE_BYTES = 64 * 1024
#: A network of more entries is not copied, and so not changed.
_MAX_ITEMS = 20_000
_MAX_INTERFACES = 4096
#: Reasons that pass: a device that is being changed, or is on its way up, a dump that was cut.
_PASSING = has_errno(errno.EBUSY, errno.ENETDOWN, errno.EAGAIN)
_PASSING_SECONDS = 1.0
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)
_CODES = {
    **dict.fromkeys(_UNSUPPORTED, "unsupported"),
    **dict.fromkeys((errno.EINVAL, errno.ERANGE, errno.EADDRNOTAVAIL), "invalid"),
    **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH), "invalid"),
    **dict.fromkeys((errno.EEXIST, errno.EADDRINUSE), "conflict"),
    **dict.fromkeys((errno.ENODEV, errno.ENOENT), "not_found"),
    **dict.fromkeys((errno.ENOMEM, errno.ENOBUFS), "resource"),
    errno.EBUSY: "busy",
    errno.EPERM: "denied",
}


class Kernel(Closeable):
    """A socket for requests, and a socket on which the kernel tells changes."""

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
        found = self._dump(LINK_MESSAGE, _GETLINK, socket.AF_UNSPEC, deadline)
        _bound(found, _MAX_INTERFACES)
        return tuple(map(link_of, found))

    def read(self, deadline: Deadline) -> State:
        """Return everything there is.

        Raises:
            CallError: ``resource``, more than is kept; ``timeout`` or ``cancelled``.
            OSError: the kernel refused.
        """
        items: list[Item] = []
        for name, (kind, new) in KINDS.items():
            is_by_family = name in ("route", "rule")
            for family in FAMILIES.values() if is_by_family else (socket.AF_UNSPEC,):
                found = self._dump(kind, new + 2, family, deadline)
                items += filter(None, (item_of(name, message) for message in found))
                _bound(items, _MAX_ITEMS)
        # a module of VLANs or tunnels may list a rule twice while it comes and goes
        unique = {item.key: item for item in items}
        return State(links=self.links(deadline), items=tuple(unique.values()))

    def wait(self, deadline: Deadline, step: str, seconds: float) -> bool:
        """Wait until interfaces or addresses have changed; return False when ``seconds`` pass."""
        if not deadline.wait([self._events.fileno()], step, at_most=seconds):
            return False
        while True:  # the changes are read by ``links`` or ``read``
            try:
                self._events.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    # --- changes: each raises a CallError with the kernel's errno where the kernel refuses

    def add(self, item: Item, may_exist: bool, deadline: Deadline) -> None:
        flags = _CREATE | (_REPLACE if item.kind == "neighbour" else _EXCL)
        try:
            self._change(KINDS[item.kind][1], flags, item.raw, deadline)
        except CallError as error:
            if not (may_exist and error.errno == errno.EEXIST):
                raise

    def remove(self, item: Item, deadline: Deadline) -> None:
        """Remove an item, which may be gone: the kernel removes routes with their address."""
        try:
            self._change(KINDS[item.kind][1] + 1, 0, item.raw, deadline)
        except CallError as error:
            if error.errno not in (errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL, errno.ENODEV):
                raise

    def rename(self, index: int, name: str, deadline: Deadline) -> None:
        self._change_link(link_message(index, {"IFLA_IFNAME": name}), deadline)

    def set_mtu(self, index: int, mtu: int, deadline: Deadline) -> None:
        self._change_link(link_message(index, {"IFLA_MTU": mtu}), deadline)

    def set_up(self, index: int, up: bool, deadline: Deadline) -> None:
        self._change_link(link_message(index, up=up), deadline)

    def add_vlan(self, name: str, parent: int, vlan_id: int, deadline: Deadline) -> None:
        data = {"attrs": [["IFLA_VLAN_ID", vlan_id]]}
        info = {"attrs": [["IFLA_INFO_KIND", "vlan"], ["IFLA_INFO_DATA", data]]}
        attributes = {"IFLA_IFNAME": name, "IFLA_LINK": parent, "IFLA_LINKINFO": info}
        self._change_link(link_message(0, attributes), deadline, _CREATE | _EXCL)

    def remove_link(self, index: int, deadline: Deadline) -> None:
        """Remove an interface that was made."""
        self._change(_DELLINK, 0, payload_of(link_message(index)), deadline)

    def _change_link(self, message: "Any", deadline: Deadline, flags: int = 0) -> None:
        self._change(_NEWLINK, flags, payload_of(message), deadline)

    def _change(self, kind: int, flags: int, payload: bytes, deadline: Deadline) -> None:
        def attempt() -> None:
            for _ in self._request(kind, flags | _ACK, payload, deadline):
                pass

        with deadline.part(_PASSING_SECONDS) as part:
            try:
                retry(attempt, part, when=_PASSING, step="ask the kernel")
            except OSError as error:
                code = _CODES.get(error.errno or 0, "device")
                raise CallError(code, error.strerror or str(error), errno=error.errno) from None

    # --- netlink

    def _dump(self, kind: "Any", number: int, family: int, deadline: Deadline) -> "list[Any]":
        asked = kind()
        asked["family"] = family
        payload = payload_of(asked)

        def attempt() -> "list[Any]":
            found = self._request(number, _DUMP, payload, deadline)
            return [read_message(kind, raw) for raw in found]

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
    """Raise what an acknowledgement says (struct nlmsgerr, NETLINK_EXT_ACK).

    pyroute2's nlmsgerr takes the header of the request, which the kernel repeats, for attributes.
    """
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


def _bound(found: Sized, most: int) -> None:
    if len(found) > most:
        raise CallError(
            "resource", f"the guest's network has more than {most} entries", step="read the network"
        )
