"""A request for the network, done by rtnetlink: all of it, or what was there before.

What the request may change is written down before the first change, and struck out after the last.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from guestagent.api import net as api
from guestagent.engine.transaction import Transaction
from guestagent.net.changes import (
    ROUNDS,
    Before,
    Change,
    Wanted,
    changes,
    renames,
    restore_unfinished,
    undo,
)
from guestagent.net.messages import (
    PROTOCOLS,
    Item,
    Key,
    Link,
    State,
    address_item,
    neighbour_item,
    route_item,
    rule_item,
)
from guestagent.net.names import (
    HOSTS,
    RESOLV_CONF,
    Etc,
    NameFile,
    hosts_text,
    resolv_conf_text,
)
from guestagent.net.rtnetlink import Kernel
from guestagent.net.undofile import UndoFile
from guestagent.storage import syscalls
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("configure", "list_network")

_TEXT_BYTES = 64 * 1024


def configure(
    request: api.NetConfigure, op: Transaction, undo_file: UndoFile, *, root: str = "/"
) -> api.NetConfigureReply:
    """Do what the request says. The files are those of ``root``.

    Raises:
        CallError: the field and the object that the kernel refused; everything is as it was.
    """
    with Kernel() as kernel, op:
        with op.step("lock", "network"):
            undo_file.lock(op.deadline)
        with op.step("restore", "network"):
            restore_unfinished(kernel, undo_file, op.deadline)
        work = _Work(kernel, op, request, root)
        is_changed = work.begin(undo_file)
        if is_changed:
            work.do()
        with op.step("read back", "network"):
            state = kernel.read(op.deadline)
            reply = api.NetConfigureReply(
                interfaces=tuple(_interface_report(state, index) for index in work.indexes),
                rules=_rule_reports(state),
                hostname=os.uname().nodename,
                timings_ms={},
                already=not is_changed,
            )
        if is_changed:
            with op.step("commit", "network"):
                undo_file.clear()
        op.commit()
    return reply.replace(timings_ms=op.timings_ms)


class _Work:
    """One request on its way."""

    def __init__(
        self, kernel: Kernel, op: Transaction, request: api.NetConfigure, root: str
    ) -> None:
        self._kernel = kernel
        self._op = op
        self._request = request
        self._root = root
        #: Of each interface of the request: its index, 0 for a VLAN that is to be made.
        self.indexes: list[int] = []
        self._before: State = State(links=(), items=())
        self._files: list[NameFile] = []
        self._hostname: str | None = None

    def begin(self, undo_file: UndoFile) -> bool:
        """Find out whether anything is to be changed; if so, write down what there is."""
        op, request = self._op, self._request
        with op.step("find", "interfaces"):
            self._find()
        with op.step("read", "network"):
            self._before = self._kernel.read(op.deadline)
        old_files = self._changed_files()
        if request.hostname not in (None, os.uname().nodename):
            self._hostname = request.hostname
        wanted = self._wanted(self._before)
        is_same = not any(changes(self._kernel, self._before, wanted)) and 0 not in self.indexes
        if is_same and not self._files and self._hostname is None:
            return False
        before = Before(
            state=self._scope(self._before),
            vlans=tuple(
                one.name or ""
                for one, index in zip(request.interfaces, self.indexes, strict=True)
                if index == 0
            ),
            files=tuple(old_files),
            hostname=None if self._hostname is None else os.uname().nodename,
            root=self._root,
        )
        with op.step("journal", "network", code="resource"):
            undo_file.write(before)
        op.on_rollback("the network", partial(undo, self._kernel, before, undo_file))
        return True

    def do(self) -> None:
        op, kernel = self._op, self._kernel
        if 0 in self.indexes:
            self._make_vlans()
        for _ in range(ROUNDS):
            now = kernel.read(op.deadline)
            wanted = self._wanted(now)
            left = list(changes(kernel, now, wanted))
            if not left:
                break
            self._make(left)
        else:
            step, what = left[0].step, left[0].object
            text = f"the kernel does not keep it: {what}"
            raise CallError("device", text, step=step, object=what)
        if self._hostname is not None:
            with op.step("hostname", self._hostname):
                syscalls.sethostname(self._hostname)
        if self._files:
            with Etc(self._root) as etc:
                for file in self._files:
                    with op.step("write", f"/etc/{file.name}", code="resource"):
                        file.write(etc.fd)

    def _make(self, some: Iterable[Change]) -> None:
        for change in some:
            with self._op.step(change.step, change.object):
                try:
                    change.make(self._op.deadline)
                except CallError as error:
                    error.message = f"{change.object}: {error.message}"
                    raise

    def _find(self) -> None:
        """Find the interfaces, or wait for them as long as the request says."""
        with self._op.deadline.part(self._request.wait_ms / 1000) as waiting:
            while True:
                links = self._kernel.links(self._op.deadline)
                missing = self._look(links)
                if missing is None:
                    return
                left = waiting.remaining() or 0.0
                if not left or not self._kernel.wait(self._op.deadline, "find", left):
                    raise missing

    def _look(self, links: tuple[Link, ...]) -> CallError | None:
        interfaces = self._request.interfaces
        self.indexes = [0] * len(interfaces)
        # VLANs last: their interfaces may get other names
        order = sorted(range(len(interfaces)), key=lambda n: interfaces[n].vlan is not None)
        for position in order:
            one, place = interfaces[position], f"interfaces[{position}]"
            if one.vlan is not None:
                made = [link.index for link in links if self._is_vlan(link, one.vlan, links)]
                found = made or [0]
            else:
                found = [link.index for link in links if _matches(link, one, links)]
            if not found:
                return _missing(one, place)
            if len(found) > 1:
                text = f"{place}.match: {len(found)} interfaces have the MAC address"
                raise CallError("conflict", text, object=f"{place}.match")
            if found[0] and found[0] in self.indexes:
                text = f"{place} is the interface of interfaces[{self.indexes.index(found[0])}]"
                raise CallError("invalid", text, object=place)
            self.indexes[position] = found[0]
        return None

    def _is_vlan(self, link: Link, vlan: api.Vlan, links: tuple[Link, ...]) -> bool:
        if link.kind != "vlan" or link.vlan_id != vlan.id:
            return False
        parent = next((one for one in links if one.index == link.parent), None)
        return parent is not None and self._final_name(parent) == vlan.parent

    def _final_name(self, link: Link) -> str:
        """Return the name that an interface has after the request."""
        if link.index in self.indexes:
            one = self._request.interfaces[self.indexes.index(link.index)]
            return one.name or link.name
        return link.name

    def _make_vlans(self) -> None:
        """Rename what is to be renamed, which frees names, and make the VLANs."""
        kernel, op = self._kernel, self._op
        now = kernel.read(op.deadline)
        self._make(renames(kernel, now, self._wanted(now)))
        for position, one in enumerate(self._request.interfaces):
            if one.vlan is None or self.indexes[position]:
                continue
            name, place = one.name or "", f"interfaces[{position}].vlan"
            with op.step("vlan", f"{place}: {name}, {one.vlan.id} on {one.vlan.parent}"):
                by_name = {link.name: link.index for link in kernel.links(op.deadline)}
                parent = by_name.get(one.vlan.parent)
                if parent is None:
                    text = f"{place}.parent: no interface is named {one.vlan.parent!r}"
                    raise CallError("not_found", text, errno=errno.ENODEV, object=f"{place}.parent")
                kernel.add_vlan(name, parent, one.vlan.id, op.deadline)
                made = {link.name: link.index for link in kernel.links(op.deadline)}
                self.indexes[position] = made[name]

    def _changed_files(self) -> list[NameFile]:
        """Note the files that are to be written; return what they are now."""
        contents = {}
        if self._request.dns is not None:
            contents[RESOLV_CONF] = resolv_conf_text(self._request.dns)
        if self._request.hosts is not None:
            contents[HOSTS] = hosts_text(self._request.hosts)
        if not contents:
            return []
        with self._op.step("read files", "/etc"), Etc(self._root) as etc:
            found = [NameFile.read(etc.fd, name) for name in contents]
        changed = [file for file in found if not file.says(contents[file.name])]
        self._files = [NameFile(name=file.name, content=contents[file.name]) for file in changed]
        return changed

    def _wanted(self, now: State) -> Wanted:
        """Return what is to be there: what was there, and what the request changes of it."""
        links: dict[int, Link] = {}
        given: dict[Key, Item] = {}
        origins: dict[Key, str] = {}
        lists: set[tuple[str, int]] = set()
        for position, one in enumerate(self._request.interfaces):
            index, place = self.indexes[position], f"interfaces[{position}]"
            if not index:
                continue
            link = now.link(index)
            if link is None:
                raise _gone(place)
            name = one.name or link.name
            links[index] = link.replace(name=name, mtu=one.mtu or link.mtu, up=one.up)
            origins["link", index, "name"] = f"{place}.name: {name}"
            origins["link", index, "mtu"] = f"{place}.mtu: {one.mtu} of {name}"
            origins["link", index, "up"] = f"{place}.up: {name}"
            for field, items in _items_of(one, index):
                lists.add((field, index))
                for number, item in enumerate(items):
                    given[item.key] = item
                    plural = f"{field}es" if field == "address" else f"{field}s"
                    origins[item.key] = f"{place}.{plural}[{number}]: {item.text} on {name}"
        if self._request.rules is not None:
            lists.add(("rule", 0))
            for number, rule in enumerate(self._request.rules):
                item = rule_item(rule)
                given[item.key] = item
                origins[item.key] = f"rules[{number}]: {item.text}"
        kept = self._scope(self._before)
        for child in kept.links:  # VLANs go down with their interface, and fit into its packets
            parent = links.get(child.parent)
            mtu = min(child.mtu, parent.mtu) if parent else child.mtu
            links.setdefault(child.index, child.replace(mtu=mtu))
        removed = frozenset(
            item.key
            for item in self._before.items
            if item.managed and (item.kind, item.index) in lists and item.key not in given
        )
        stay = {
            item.key: item
            for item in kept.items
            if item.key not in removed and _can_stay(item, links)
        }
        return Wanted(links=links, items={**stay, **given}, removed=removed, origins=origins)

    def _scope(self, state: State) -> State:
        """Return of a state what this request may change."""
        touched = set(self.indexes) - {0}
        touched |= {link.index for link in state.links if link.parent in touched}
        has_rules = self._request.rules is not None
        items = (
            item
            for item in state.items
            if (has_rules if item.kind == "rule" else item.index in touched or not item.index)
        )
        links = tuple(link for link in state.links if link.index in touched)
        return State(links=links, items=tuple(items))


def _can_stay(item: Item, links: Mapping[int, Link]) -> bool:
    """Say whether the kernel keeps an item: an interface that goes down keeps IPv4 addresses."""
    link = links.get(item.index)
    return link is None or link.up or (item.kind == "address" and ":" not in item.text)


def _items_of(one: api.Interface, index: int) -> Iterator[tuple[str, list[Item]]]:
    """Yield the lists that a request gives for an interface, by the kind of their items."""
    if one.addresses is not None:
        yield "address", [address_item(index, text, dad=one.dad) for text in one.addresses]
    if one.neighbours is not None:
        yield "neighbour", [neighbour_item(index, neighbour) for neighbour in one.neighbours]
    if one.routes is not None:
        yield "route", [route_item(index, route) for route in one.routes]


def _matches(link: Link, one: api.Interface, links: tuple[Link, ...]) -> bool:
    assert one.match is not None
    if one.match.mac is not None:  # a VLAN has the MAC address of its interface
        return link.mac == one.match.mac.lower() and link.kind != "vlan"
    names = [other.name for other in links]
    if one.match.name not in names and one.name is not None:  # renamed by the same request before
        return link.name == one.name
    return link.name == one.match.name


def _gone(place: str | None) -> CallError:
    return CallError("not_found", "the interface has gone", errno=errno.ENODEV, object=place)


def _missing(one: api.Interface, place: str) -> CallError:
    assert one.match is not None
    what = one.match.mac or one.match.name
    text = f"{place}.match: no interface of the guest is {what}"
    return CallError("not_found", text, errno=errno.ENODEV, object=f"{place}.match")


# --- reports


def list_network(deadline: Deadline) -> api.NetListReply:
    with Kernel() as kernel:
        state = kernel.read(deadline)
    with Etc("/") as etc:
        texts = {name: _text(etc.fd, name) for name in (RESOLV_CONF, HOSTS)}
    return api.NetListReply(
        interfaces=tuple(_interface_report(state, link.index) for link in state.links),
        rules=_rule_reports(state),
        hostname=os.uname().nodename,
        resolv_conf=texts[RESOLV_CONF],
        hosts=texts[HOSTS],
    )


def _text(etc_fd: int, name: str) -> str:
    try:
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=etc_fd), "rb") as file:
            return file.read(_TEXT_BYTES).decode("ascii", "backslashreplace")
    except FileNotFoundError:
        return ""


def _interface_report(state: State, index: int) -> api.InterfaceReport:
    """Describe an interface.

    Raises:
        CallError: ``not_found``, it has gone.
    """
    link = state.link(index)
    if link is None:
        raise _gone(None)
    items = [item for item in state.items if item.index == index]
    parent = state.link(link.parent)
    neighbours = (item.text.split(" ") for item in items if item.kind == "neighbour")
    return api.InterfaceReport(
        index=index,
        name=link.name,
        mac=link.mac,
        mtu=link.mtu,
        up=link.up,
        carrier=link.carrier,
        vlan=api.Vlan(parent=parent.name, id=link.vlan_id) if parent and link.vlan_id else None,
        addresses=tuple(item.text for item in items if item.kind == "address"),
        tentative=tuple(item.text for item in items if item.tentative),
        routes=tuple(_route_report(item.text) for item in items if item.kind == "route"),
        neighbours=tuple(
            api.Neighbour(address=address, mac=mac)
            for address, mac in neighbours
            if mac.count(":") == 5
        ),
    )


def _route_report(text: str) -> api.RouteReport:
    destination, *words = text.split(" ")
    on_link = "on_link" in words
    if on_link:
        words.remove("on_link")
    values = dict(zip(words[::2], words[1::2], strict=False))
    return api.RouteReport(
        destination=destination,
        gateway=values.get("via"),
        metric=int(values["metric"]),
        table=int(values["table"]),
        source=values.get("source"),
        on_link=on_link,
        protocol=PROTOCOLS.get(int(values["protocol"]), values["protocol"]),
    )


def _rule_reports(state: State) -> tuple[api.RuleReport, ...]:
    split = (item.text.partition(" ") for item in state.items if item.kind == "rule")
    return tuple(api.RuleReport(family=family, text=text) for family, _, text in split)
