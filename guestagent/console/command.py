"""What a command of the console is, and what it is given when it runs."""

from collections.abc import Callable, Mapping, Sequence

from guestagent.console.channel import Channel
from guestagent.console.screen import Screen
from guestagent.policy.gate import Gate
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("Access", "Command", "Group", "Guest", "Leave", "Run", "Usage", "not_found", "number")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol, TypeVar

    from guestagent.api.inspect import StreamRequest
    from guestagent.api.layers import Holder, LayerSpec
    from guestagent.api.request import Request
    from vsock.record import Record

    R = TypeVar("R", bound=Record)
    Item = TypeVar("Item")

    class Answers(Protocol):
        """Answers requests in this process, as ``guestagent.service.dispatch.Service`` does."""

        def call(self, request: Request[R], *, deadline: Deadline) -> R: ...

        def stream(
            self,
            request: StreamRequest[R, Item],
            take: Callable[[Item], object],
            *,
            deadline: Deadline,
        ) -> R: ...

    class Debug(Protocol):
        """What no method offers; see ``guestagent.engine.debugview.DebugView``."""

        def plan_of(self, layer_id: str) -> Sequence[str] | None: ...

        def plan(self, spec: LayerSpec, deadline: Deadline) -> Sequence[str]: ...

        def reconcile(
            self, deadline: Deadline, *, dry_run: bool
        ) -> Iterator[tuple[str, str, bool]]: ...

        def holders(self, dev: str, deadline: Deadline) -> Sequence[Holder]: ...

        def listen(self, listener: Callable[[object], None]) -> Callable[[], None]: ...


#: The most words that a usage ending in ``...`` takes.
MAX_WORDS = 500


class Usage(Exception):
    """A command was not used as it must be; the text says how not."""


class Leave(Exception):
    """The session is to end."""


class Guest:
    """What the console may look at and do.

    ``service`` answers the agent's methods. ``root`` answers those ``fs.`` requests that are about
    a place, whichever they name, for the guest's own file tree.
    """

    def __init__(
        self, service: "Answers", root: "Answers", debug: "Debug", gate: Gate, *, shell: bool
    ) -> None:
        """``shell`` is the permission for a shell; ``gate`` judges each command."""
        self.gate = gate
        self.service = service
        self.root = root
        self.debug = debug
        self.shell = shell


class Access:
    """The guest, for as long as ``deadline`` allows."""

    def __init__(self, guest: Guest, deadline: Deadline) -> None:
        self.guest = guest
        self.deadline = deadline

    def ask(self, kind: "Callable[..., Request[R]]", /, **fields: object) -> "R":
        """Make a request and return the reply.

        Raises:
            Usage: a field is not valid.
            CallError: the request failed.
        """
        return self.guest.service.call(checked(kind, **fields), deadline=self.deadline)


class Run(Access):
    """One run of a command: ``words`` are its arguments, ``options`` those with a dash."""

    def __init__(
        self,
        guest: Guest,
        channel: Channel,
        screen: Screen,
        deadline: Deadline,
        *,
        words: tuple[str, ...],
        options: Mapping[str, str],
        early_input: bytearray,
    ) -> None:
        """``early_input`` was typed already; a program that the command starts reads it first."""
        super().__init__(guest, deadline)
        self.channel = channel
        self.screen = screen
        self.words = words
        self.options = options
        self.early_input = early_input
        #: Name of the signal that ended the program which was run, if one did.
        self.signal: str | None = None

    def number(self, option: str, default: int, *, low: int = 1, high: int = 1 << 62) -> int:
        """Return an option's value as a number.

        Raises:
            Usage: it is no number, or out of range.
        """
        text = self.options.get(option)
        return default if text is None else number(text, option, low=low, high=high)


#: What a command does; returns its exit status, None for 0.
Function = Callable[[Run], int | None]
#: Returns the words that could stand for an unfinished one.
Completer = Callable[[Access, str], Sequence[str]]


class Command:
    """One command, as its usage states it: ``name [-l] [-n COUNT] [--long] WORD [WORD...]``.

    ``options`` are the names of those with a dash, with ``=`` where there is a value. ``least``
    and ``most`` bound the number of the other words. What brackets enclose may be left out.
    """

    def __init__(
        self,
        usage: str,
        summary: str,
        function: Function,
        *,
        completers: Mapping[str, Completer],
        is_paged: bool,
    ) -> None:
        self.usage = usage
        self.summary = summary
        self.function = function
        self.is_paged = is_paged
        self.name, *rest = usage.split()
        options, words = [], []
        tokens = iter(rest)
        for token in tokens:
            if token.startswith("[-"):
                options.append(token.strip("[-]") + ("" if token.endswith("]") else "="))
                if not token.endswith("]"):
                    next(tokens)
            else:
                words.append(token)
        self.options = tuple(options)
        self.least = sum(not word.startswith("[") for word in words)
        self.most = MAX_WORDS if "..." in usage else len(words)
        self.complete = next(
            (completers[w] for w in (word.strip("[].") for word in words) if w in completers), None
        )

    def parse(self, words: list[str]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Return the plain words and the options.

        Raises:
            Usage: an option is unknown or lacks its value, or there are too many or too few words.
        """
        plain: list[str] = []
        options: dict[str, str] = {}
        rest = list(words)
        while rest:
            word = rest.pop(0)
            name = word.lstrip("-")
            if word == "--":
                plain += rest
                break
            if len(word) < 2 or not word.startswith("-") or word[1].isdigit():
                plain.append(word)
            elif name in self.options:
                options[name] = ""
            elif f"{name}=" not in self.options:
                raise Usage(f"there is no option {word}")
            elif not rest:
                raise Usage(f"{word} needs a value")
            else:
                options[name] = rest.pop(0)
        if len(plain) < self.least:
            raise Usage("something is missing")
        if len(plain) > self.most:
            raise Usage(f"{plain[self.most]!r} is too much")
        return tuple(plain), options


class Group:
    """Commands under one title. ``completers`` has a function for a word of their usages."""

    def __init__(self, title: str, completers: Mapping[str, Completer] | None = None) -> None:
        self.title = title
        self.commands: dict[str, Command] = {}
        self._completers = completers or {}

    def command(
        self, usage: str, summary: str, *, is_paged: bool = True
    ) -> Callable[[Function], Function]:
        """Make a command of a function."""

        def add(function: Function) -> Function:
            command = Command(
                usage, summary, function, completers=self._completers, is_paged=is_paged
            )
            self.commands[command.name] = command
            return function

        return add


def checked(kind: "Callable[..., Item]", /, **fields: object) -> "Item":
    """Return a record of what was typed.

    Raises:
        Usage: a field is not valid.
    """
    try:
        return kind(**fields)
    except ValueError as error:
        raise Usage(str(error)) from None


def number(text: str, name: str, *, low: int = 0, high: int = 1 << 62) -> int:
    """Read a number, decimal or with 0x.

    Raises:
        Usage: it is no number, or out of range.
    """
    try:
        value = int(text, 16) if text.startswith("0x") else int(text, 10)
    except ValueError:
        raise Usage(f"{name} takes a number, not {text!r}") from None
    if not low <= value <= high:
        raise Usage(f"{name} must be in {low}..{high}, not {value}")
    return value


def not_found(what: str, hint: str) -> CallError:
    """Return the error for a name that nothing has."""
    return CallError("not_found", what, hint=hint)
