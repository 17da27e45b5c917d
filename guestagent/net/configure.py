"""A request for the network, done by rtnetlink: all of it, or what was there before.

What the request may change is written down before the first change, and struck out after the last.
Undoing is going there from whatever there is, so that it also undoes what a killed child has left.
"""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from guestagent.api.net import (
    Interface,
    InterfaceReport,
    Neighbour,
    NetConfigure,
    NetConfigureReply,
    NetListReply,
    RouteReport,
    RuleReport,
    Vlan,
)
from guestagent.engine.transaction import Transaction
from guestagent.net.names import (
    HOSTS,
    RESOLV_CONF,
    NameFile,
    hosts_text,
    open_etc,
    resolv_conf_text,
)
from guestagent.net.rtnetlink import (
    Item,
    Kernel,
    Link,
    State,
    address_item,
    neighbour_item,
    route_item,
    route_protocol,
    rule_item,
)
from guestagent.net.undofile import UndoFile
from guestagent.storage import syscalls
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("configure", "list_network", "restore")

#: Taking an interface down takes its routes away, whose return may take another round.
_ROUNDS = 4
#: Dependent things last: the order in which items are made; they are removed in reverse.
_ORDER = ("address", "neighbour", "route", "rule")
#: What the kernel takes to see that no other machine has an address, and the most that we wait.
_DAD_SECONDS = 10.0

Key = tuple[str, int, str]


class Before(Record):
    """What is to be there again when a request fails: of what it may change, and no more."""

    state: State
    vlans: tuple[str, ...]
    files: tuple[NameFile, ...]
    hostname: str | None
    root: str


class Change(Record):
    """One change to the kernel; ``step`` and ``object`` are those of its error."""

    step: str
    object: str
    make: Callable[[Deadline], None]


class Wanted(Record):
    """What is to be there: names, MTUs and states by index, and items in the order they are made.

    ``removed`` are the keys to remove; ``origins`` say which field of the request an item is from.
    """

    links: Mapping[int, Link]
    items: Mapping[Key, Item]
    removed: frozenset[Key]
    origins: Mapping[Key, str]


def configure(
    request: NetConfigure, op: Transaction, undo_file: UndoFile, *, root: str = "/"
) -> NetConfigureReply:
    """Do what the request says. The files are those of ``root``.

    Raises:
        CallError: the field and the object that the kernel refused; everything is as it was.
    """
    with Kernel() as kernel, op:
        with op.step("lock", "network"):
            undo_file.lock(op.deadline)
        with op.step("restore", "network"):
            _restore_unfinished(kernel, undo_file, op.deadline)
        work = _Work(kernel, op, request, root)
        is_changed = work.begin(undo_file)
        if is_changed:
            work.do()
        with op.step("read back", "network"):
            state = kernel.read(op.deadline)
            reply = NetConfigureReply(
                interfaces=tuple(_report(state, index) for index in work.indexes),
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


def restore(undo_file: UndoFile, deadline: Deadline) -> bool:
    """Undo what a child that was killed has left unfinished; return whether there was anything.

    Raises:
        CallError: something could not be restored; the next request tries it again.
    """
    with Kernel() as kernel:
        undo_file.lock(deadline)
        return _restore_unfinished(kernel, undo_file, deadline)


def list_network(deadline: Deadline) -> NetListReply:
    """Return what there is."""
    with Kernel() as kernel:
        state = kernel.read(deadline)
    etc_fd = open_etc("/")
    try:
        texts = []
        for name in (RESOLV_CONF, HOSTS):
            try:
                with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=etc_fd), "rb") as file:
                    texts.append(file.read(64 * 1024).decode("ascii", "backslashreplace"))
            except FileNotFoundError:
                texts.append("")
    finally:
        os.close(etc_fd)
    return NetListReply(
        interfaces=tuple(_report(state, link.index) for link in state.links),
        rules=_rule_reports(state),
        hostname=os.uname().nodename,
        resolv_conf=texts[0],
        hosts=texts[1],
    )


class _Work:
    """One request on its way."""

    def __init__(self, kernel: Kernel, op: Transaction, request: NetConfigure, root: str) -> None:
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
        is_same = not any(_changes(self._kernel, self._before, wanted)) and 0 not in self.indexes
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
        op.on_rollback("the network", partial(_undo, self._kernel, before, undo_file))
        return True

    def do(self) -> None:
        """Make the changes."""
        op, kernel = self._op, self._kernel
        if 0 in self.indexes:
            self._make_vlans()
        for _ in range(_ROUNDS):
            now = kernel.read(op.deadline)
            wanted = self._wanted(now)
            changes = list(_changes(kernel, now, wanted))
            if not changes:
                break
            self._make(changes)
        else:
            left = changes[0]
            raise CallError(
                "device", f"the kernel does not keep it: {left.object}", step=left.step,
                object=left.object,
            )  # fmt: skip
        if self._hostname is not None:
            with op.step("hostname", self._hostname):
                syscalls.sethostname(self._hostname)
        if self._files:
            etc_fd = open_etc(self._root)
            try:
                for file in self._files:
                    with op.step("write", f"/etc/{file.name}", code="resource"):
                        file.write(etc_fd)
            finally:
                os.close(etc_fd)

    def _make(self, changes: "list[Change]") -> None:
        for change in changes:
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

    def _is_vlan(self, link: Link, vlan: Vlan, links: tuple[Link, ...]) -> bool:
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
        self._make(list(_renames(kernel, now, self._wanted(now))))
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
        with self._op.step("read files", "/etc"):
            etc_fd = open_etc(self._root)
            try:
                found = [NameFile.read(etc_fd, name) for name in contents]
            finally:
                os.close(etc_fd)
        changed = [file for file in found if not file.says(contents[file.name])]
        self._files = [NameFile(name=file.name, content=contents[file.name]) for file in changed]
        return changed

    def _wanted(self, now: State) -> Wanted:
        """Return what is to be there: what was there, and what the request changes of it."""
        links: dict[int, Link] = {}
        given: dict[Key, Item] = {}
        origins: dict[Key, str] = {}
        lists: set[tuple[str, int]] = set()
        for position, (one, index) in enumerate(
            zip(self._request.interfaces, self.indexes, strict=True)
        ):
            link = now.link(index)
            if link is None:
                if index:
                    raise CallError("not_found", "the interface has gone", errno=errno.ENODEV,
                                    object=f"interfaces[{position}]")  # fmt: skip
                continue
            name = one.name or link.name
            links[index] = link.replace(name=name, mtu=one.mtu or link.mtu, up=one.up)
            place = f"interfaces[{position}]"
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


def _items_of(one: Interface, index: int) -> Iterator[tuple[str, list[Item]]]:
    """Yield the lists that a request gives for an interface, by the kind of their items."""
    if one.addresses is not None:
        yield "address", [address_item(index, text, dad=one.dad) for text in one.addresses]
    if one.neighbours is not None:
        yield "neighbour", [neighbour_item(index, neighbour) for neighbour in one.neighbours]
    if one.routes is not None:
        yield "route", [route_item(index, route) for route in one.routes]


def _matches(link: Link, one: Interface, links: tuple[Link, ...]) -> bool:
    assert one.match is not None
    if one.match.mac is not None:  # a VLAN has the MAC address of its interface
        return link.mac == one.match.mac.lower() and link.kind != "vlan"
    names = [other.name for other in links]
    if one.match.name not in names and one.name is not None:  # renamed by the same request before
        return link.name == one.name
    return link.name == one.match.name


def _missing(one: Interface, place: str) -> CallError:
    assert one.match is not None
    what = one.match.mac or one.match.name
    text = f"{place}.match: no interface of the guest is {what}"
    return CallError("not_found", text, errno=errno.ENODEV, object=f"{place}.match")


# --- from what there is to what is to be


def _changes(kernel: Kernel, now: State, wanted: Wanted) -> Iterator[Change]:
    """Yield the changes that lead from ``now`` to ``wanted``, in an order that the kernel takes."""
    yield from _renames(kernel, now, wanted)
    links = {link.index: link for link in now.links}
    there = {index: link for index, link in wanted.links.items() if index in links}
    parents_first = sorted(there.values(), key=lambda link: (link.parent != 0, link.index))
    for link in parents_first:
        if links[link.index].mtu != link.mtu:
            yield Change(
                step="mtu",
                object=wanted.origins.get(("link", link.index, "mtu"), f"{link.name}: {link.mtu}"),
                make=partial(_set_link, kernel, link.index, mtu=link.mtu),
            )
    for item in sorted(now.items, key=lambda item: -_ORDER.index(item.kind)):
        if item.key in wanted.removed:
            yield Change(step="remove", object=item.text, make=partial(kernel.remove, item))
    for link in parents_first:
        is_up = links[link.index].up and links[link.index].name == link.name
        if is_up != link.up:
            yield Change(
                step="up" if link.up else "down",
                object=wanted.origins.get(("link", link.index, "up"), link.name),
                make=partial(_set_link, kernel, link.index, up=link.up),
            )
    found = {item.key: item for item in now.items}
    missing = [item for key, item in wanted.items.items() if key not in found]
    # a gateway must be reachable by a route that is there before
    missing.sort(key=lambda item: (_ORDER.index(item.kind), " via " in item.text))
    for item in missing:
        if item.kind != "address":
            continue
        yield _addition(kernel, item, wanted)
    fresh = [
        item
        for key, item in wanted.items.items()
        if item.kind == "address" and ":" in item.text
        if key not in found or key in wanted.origins
    ]
    is_new = any(item.key not in found or found[item.key].dad_failed for item in fresh)
    if is_new or _is_tentative(now, fresh):
        yield Change(
            step="duplicates",
            object=", ".join(wanted.origins.get(item.key, item.text) for item in fresh[:4]),
            make=partial(_settle, kernel, frozenset(item.key for item in fresh)),
        )
    for item in missing:
        if item.kind != "address":
            yield _addition(kernel, item, wanted)


def _addition(kernel: Kernel, item: Item, wanted: Wanted) -> Change:
    origin = wanted.origins.get(item.key)
    make = partial(_add, kernel, item, again=origin is None)
    return Change(step=item.kind, object=origin or item.text, make=make)


def _add(kernel: Kernel, item: Item, deadline: Deadline, *, again: bool) -> None:
    kernel.add(item, deadline, again=again)


def _set_link(
    kernel: Kernel,
    index: int,
    deadline: Deadline,
    *,
    name: str | None = None,
    mtu: int | None = None,
    up: bool | None = None,
) -> None:
    kernel.set_link(index, deadline, name=name, mtu=mtu, up=up)


def _renames(kernel: Kernel, now: State, wanted: Wanted) -> Iterator[Change]:
    """Yield the changes of names. Interfaces that change names with each other take a third one."""
    links = {link.index: link for link in now.links}
    names = {
        index: link.name
        for index, link in wanted.links.items()
        if index in links and links[index].name != link.name
    }
    for index in names:
        if links[index].up:  # before Linux 6.2 only what is down is renamed
            yield Change(
                step="down",
                object=links[index].name,
                make=partial(_set_link, kernel, index, up=False),
            )
    held = {links[index].name for index in names}
    if held & set(names.values()):
        for index in names:
            make = partial(_set_link, kernel, index, name=f"rename{index}")
            yield Change(step="rename", object=links[index].name, make=make)
    for index, name in names.items():
        origin = wanted.origins.get(("link", index, "name"), name)
        make = partial(_set_link, kernel, index, name=name)
        yield Change(step="rename", object=f"{origin} (was {links[index].name})", make=make)


def _is_tentative(state: State, items: list[Item]) -> bool:
    """Say whether the kernel is still looking for duplicates of an address."""
    carriers = {link.index for link in state.links if link.carrier and link.up}
    keys = {item.key for item in items if item.index in carriers}
    return any(item.tentative and not item.dad_failed for item in state.items if item.key in keys)


def _settle(kernel: Kernel, keys: frozenset[Key], deadline: Deadline) -> None:
    """Wait until no other machine has claimed the IPv6 addresses; not where there is no carrier.

    Raises:
        CallError: ``conflict``, another machine has one.
    """
    with deadline.part(_DAD_SECONDS) as part:
        while True:
            state = kernel.read(part)
            items = [item for item in state.items if item.key in keys]
            for item in items:
                if item.dad_failed:
                    link = state.link(item.index)
                    where = f" on {link.name}" if link else ""
                    raise CallError(
                        "conflict",
                        f"another machine has the address {item.text}{where}",
                        errno=errno.EADDRINUSE,
                    )
            if not _is_tentative(state, items):
                return
            kernel.wait(part, "wait for duplicates", _DAD_SECONDS)


# --- undo


def _restore_unfinished(kernel: Kernel, undo_file: UndoFile, deadline: Deadline) -> bool:
    before = undo_file.read(Before)
    if before is None:
        return False
    _restore(kernel, before, deadline)
    undo_file.clear()
    return True


#: For a rollback beyond the deadline of its request.
UNDO_SECONDS = 15.0


def _undo(kernel: Kernel, before: Before, undo_file: UndoFile) -> None:
    with Deadline(UNDO_SECONDS) as deadline:
        _restore(kernel, before, deadline)
    undo_file.clear()


def _restore(kernel: Kernel, before: Before, deadline: Deadline) -> None:
    """Bring back what was there, each thing by itself.

    Raises:
        CallError: something could not be restored.
    """
    failures: list[str] = []
    for make in _file_undos(before):
        try:
            make()
        except OSError as error:
            failures.append(f"{error.strerror or error}")
    old = {link.index for link in before.state.links}
    for link in kernel.links(deadline):
        if link.kind == "vlan" and link.name in before.vlans and link.index not in old:
            _try("vlan", link.name, partial(kernel.remove_link, link.index, deadline), failures)
    for _ in range(_ROUNDS):
        now = kernel.read(deadline)
        changes = list(_changes(kernel, now, _as_before(before.state, now)))
        if not changes:
            break
        last: list[str] = []
        for change in changes:
            _try(change.step, change.object, partial(change.make, deadline), last)
    else:
        failures += last or [f"{change.step} of {change.object}" for change in changes]
    if failures:
        text = f"the network is not as it was: {'; '.join(failures[:8])}"
        raise CallError("device", text, step="restore", object="network")


def _try(step: str, object: str, make: Callable[[], None], failures: list[str]) -> None:
    try:
        make()
    except (OSError, CallError) as error:
        if isinstance(error, CallError) and error.code in ("timeout", "cancelled"):
            raise
        failures.append(f"{step} of {object}: {error}")


def _file_undos(before: Before) -> Iterator[Callable[[], None]]:
    if before.hostname is not None:
        yield partial(syscalls.sethostname, before.hostname)
    for file in before.files:
        yield partial(_put_back, file, before.root)


def _put_back(file: NameFile, root: str) -> None:
    etc_fd = open_etc(root)
    try:
        file.write(etc_fd)
    finally:
        os.close(etc_fd)


def _as_before(before: State, now: State) -> Wanted:
    """Return the state of before as one to go to: what is there besides is to be removed."""
    links = {link.index: link for link in before.links}
    items = {item.key: item for item in before.items}
    has_rules = any(item.kind == "rule" for item in before.items)
    removed = {
        item.key
        for item in now.items
        if (has_rules if item.kind == "rule" else item.index in links)
        and item.key not in items
    }  # fmt: skip
    # the first IPv4 address of a network is its primary one; renaming its interface labels others
    for index in links:
        was, is_now = (_ipv4_addresses(state, index) for state in (before, now))
        pairs = zip(was, is_now, strict=False)
        same = next((n for n, (old, new) in enumerate(pairs) if old != new), len(was))
        if is_now != was:
            removed |= {key for key, _ in is_now[same:]}
    # those of an interface that has gone cannot come back
    present = {link.index for link in now.links}
    items = {key: item for key, item in items.items() if not item.index or item.index in present}
    return Wanted(links=links, items=items, removed=frozenset(removed), origins={})


def _ipv4_addresses(state: State, index: int) -> list[tuple[Key, str]]:
    return [
        (item.key, item.label)
        for item in state.items
        if item.kind == "address" and item.index == index and ":" not in item.text
    ]


# --- reports


def _report(state: State, index: int) -> InterfaceReport:
    link = state.link(index)
    if link is None:
        raise CallError("not_found", "the interface has gone", errno=errno.ENODEV)
    items = [item for item in state.items if item.index == index]
    parent = state.link(link.parent)
    vlan = Vlan(parent=parent.name, id=link.vlan_id) if parent and link.vlan_id else None
    return InterfaceReport(
        index=index,
        name=link.name,
        mac=link.mac,
        mtu=link.mtu,
        up=link.up,
        carrier=link.carrier,
        vlan=vlan,
        addresses=tuple(item.text for item in items if item.kind == "address"),
        tentative=tuple(item.text for item in items if item.tentative),
        routes=tuple(_route_report(item.text) for item in items if item.kind == "route"),
        neighbours=tuple(
            Neighbour(address=address, mac=mac)
            for address, _, mac in (
                item.text.partition(" ") for item in items if item.kind == "neighbour"
            )
            if mac.count(":") == 5
        ),
    )


def _route_report(text: str) -> RouteReport:
    destination, *words = text.split(" ")
    on_link = "on_link" in words
    if on_link:
        words.remove("on_link")
    values = dict(zip(words[::2], words[1::2], strict=False))
    return RouteReport(
        destination=destination,
        gateway=values.get("via"),
        metric=int(values["metric"]),
        table=int(values["table"]),
        source=values.get("source"),
        on_link=on_link,
        protocol=route_protocol(int(values["protocol"])),
    )


def _rule_reports(state: State) -> tuple[RuleReport, ...]:
    split = (item.text.partition(" ") for item in state.items if item.kind == "rule")
    return tuple(RuleReport(family=family, text=text) for family, _, text in split)
