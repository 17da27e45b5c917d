"""What leads from the network as it is to the network that is wanted, or back to what it was.

The undo file holds what a request may change. Restoring leads there from whatever there is.
"""

import errno
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from guestagent.net.messages import Item, Key, Link, State
from guestagent.net.names import Etc, NameFile
from guestagent.net.rtnetlink import Kernel
from guestagent.net.undofile import UndoFile
from guestagent.storage import syscalls
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record

__all__ = (
    "ROUNDS",
    "Before",
    "Change",
    "Wanted",
    "changes",
    "renames",
    "restore",
    "restore_unfinished",
    "undo",
)

#: Taking an interface down takes its routes away, whose return may take another round.
ROUNDS = 4
#: The order in which items are made, dependent ones last; they are removed in reverse.
_ORDER = ("address", "neighbour", "route", "rule")
#: How long the kernel takes at most to see that no other machine has an address.
_DAD_SECONDS = 10.0
#: For a rollback beyond the deadline of its request.
_UNDO_SECONDS = 15.0


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


def changes(kernel: Kernel, now: State, wanted: Wanted) -> Iterator[Change]:
    """Yield the changes that lead from ``now`` to ``wanted``, in an order that the kernel takes."""
    yield from renames(kernel, now, wanted)
    links = {link.index: link for link in now.links}
    there = [link for index, link in wanted.links.items() if index in links]
    there.sort(key=lambda link: (link.parent != 0, link.index))  # parents first
    for link in there:
        if links[link.index].mtu != link.mtu:
            yield Change(
                step="mtu",
                object=wanted.origins.get(("link", link.index, "mtu"), f"{link.name}: {link.mtu}"),
                make=partial(kernel.set_mtu, link.index, link.mtu),
            )
    for item in sorted(now.items, key=lambda item: -_ORDER.index(item.kind)):
        if item.key in wanted.removed:
            yield Change(step="remove", object=item.text, make=partial(kernel.remove, item))
    for link in there:
        is_up = links[link.index].up and links[link.index].name == link.name
        if is_up != link.up:
            yield Change(
                step="up" if link.up else "down",
                object=wanted.origins.get(("link", link.index, "up"), link.name),
                make=partial(kernel.set_up, link.index, link.up),
            )
    found = {item.key: item for item in now.items}
    missing = [item for key, item in wanted.items.items() if key not in found]
    # a gateway must be reachable by a route that is there before
    missing.sort(key=lambda item: (_ORDER.index(item.kind), " via " in item.text))
    additions = [(item.kind, _addition(kernel, item, wanted)) for item in missing]
    yield from (change for kind, change in additions if kind == "address")
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
    yield from (change for kind, change in additions if kind != "address")


def _addition(kernel: Kernel, item: Item, wanted: Wanted) -> Change:
    origin = wanted.origins.get(item.key)
    make = partial(kernel.add, item, origin is None)  # what was there before may be there again
    return Change(step=item.kind, object=origin or item.text, make=make)


def renames(kernel: Kernel, now: State, wanted: Wanted) -> Iterator[Change]:
    """Yield the changes of names. Interfaces that exchange their names take a third one between."""
    links = {link.index: link for link in now.links}
    names = {
        index: link.name
        for index, link in wanted.links.items()
        if index in links and links[index].name != link.name
    }
    for index in names:
        if links[index].up:  # before Linux 6.2 only what is down is renamed
            make = partial(kernel.set_up, index, False)
            yield Change(step="down", object=links[index].name, make=make)
    held = {links[index].name for index in names}
    if held & set(names.values()):
        for index in names:
            make = partial(kernel.rename, index, f"rename{index}")
            yield Change(step="rename", object=links[index].name, make=make)
    for index, name in names.items():
        origin = wanted.origins.get(("link", index, "name"), name)
        make = partial(kernel.rename, index, name)
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
                    text = f"another machine has the address {item.text}{where}"
                    raise CallError("conflict", text, errno=errno.EADDRINUSE)
            if not _is_tentative(state, items):
                return
            kernel.wait(part, "wait for duplicates", _DAD_SECONDS)


# --- back to what was there


class Before(Record):
    """What is to be there again when a request fails: of what it may change, and no more."""

    state: State
    vlans: tuple[str, ...]
    files: tuple[NameFile, ...]
    hostname: str | None
    root: str


def restore(undo_file: UndoFile, deadline: Deadline) -> bool:
    """Undo what a child that was killed has left unfinished; return whether there was anything.

    Raises:
        CallError: something could not be restored; the next request tries it again.
    """
    with Kernel() as kernel:
        undo_file.lock(deadline)
        return restore_unfinished(kernel, undo_file, deadline)


def restore_unfinished(kernel: Kernel, undo_file: UndoFile, deadline: Deadline) -> bool:
    """As ``restore``, with the undo file locked already."""
    before = undo_file.read(Before)
    if before is None:
        return False
    _restore(kernel, before, deadline)
    undo_file.clear()
    return True


def undo(kernel: Kernel, before: Before, undo_file: UndoFile) -> None:
    """Undo a request that failed, perhaps at its deadline."""
    with Deadline(_UNDO_SECONDS) as deadline:
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
    for _ in range(ROUNDS):
        now = kernel.read(deadline)
        left = list(changes(kernel, now, _as_before(before.state, now)))
        if not left:
            break
        last: list[str] = []
        for change in left:
            _try(change.step, change.object, partial(change.make, deadline), last)
    else:
        failures += last or [f"{change.step} of {change.object}" for change in left]
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
    with Etc(root) as etc:
        file.write(etc.fd)


def _as_before(before: State, now: State) -> Wanted:
    """Return the former state as the wanted one: what is there besides is to be removed."""
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
