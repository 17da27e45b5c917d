"""What could be meant by a word that is not finished."""

import os

from guestagent.console.command import Command, Guest
from guestagent.console.commands import COMMANDS
from guestagent.console.places import resolve
from guestagent.console.words import Partial
from guestagent.inspect.walk import walk
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("complete",)

#: Looking at a directory stops here.
_MAX_ENTRIES = 2000
_SECONDS = 2.0


def complete(guest: Guest, partial: Partial, life: Deadline) -> list[str]:
    """Return the words that begin as the unfinished one does; what cannot be looked at has none."""
    candidates = _candidates(guest, partial, life)
    return [word for word in candidates if word.startswith(partial.word)]


def _candidates(guest: Guest, partial: Partial, life: Deadline) -> list[str]:
    if not partial.before:
        return [*COMMANDS, "exit"]
    command = COMMANDS.get(partial.before[0])
    if command is None:
        return []
    if partial.word.startswith("-"):
        return _options(command)
    try:
        with life.part(_SECONDS) as deadline:
            return _of_kind(guest, command.completes, partial.word, deadline)
    except (CallError, OSError):
        return []


def _options(command: Command) -> list[str]:
    names = (name.rstrip("=") for name in command.options)
    return [f"--{name}" if len(name) > 1 else f"-{name}" for name in names]


def _of_kind(guest: Guest, kind: str, word: str, deadline: Deadline) -> list[str]:
    view = guest.engine.debug
    if kind == "command":
        return list(COMMANDS)
    if kind == "layer":
        return list(view.layer_ids())
    if kind == "overlay":
        return list(view.overlay_ids())
    if kind == "dm":
        return [name for name, _ in view.dm_devices()]
    if kind == "device":
        devices = [info.node for info in guest.engine.inspection.devices.list_devices().devices]
        devices += [info.node for info in guest.engine.inspection.devices.list_partitions().devices]
        return [*devices, *view.layer_ids()]
    if kind == "path":
        return _paths(guest, word, deadline)
    return []


def _paths(guest: Guest, word: str, deadline: Deadline) -> list[str]:
    if "/" not in word:
        ids = (*guest.engine.debug.layer_ids(), *guest.engine.debug.overlay_ids())
        return ["/", *(f"{name}:/" for name in ids)]
    head = word[: word.rindex("/") + 1]
    name = resolve(guest.engine, head)
    found = []
    with name.open() as place, place.errors(name.path):
        for entry in walk(place.root.open_directory(name.path), max_depth=1):
            deadline.check("complete a path")
            is_directory = entry.entry.is_dir(follow_symlinks=False)
            found.append(head + os.fsdecode(entry.path) + ("/" if is_directory else ""))
            if len(found) >= _MAX_ENTRIES:
                break
    return found
