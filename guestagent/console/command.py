"""What a command of the console is, and what it is given when it runs."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence

from guestagent.api.agent import StatusReply
from guestagent.console.channel import Channel
from guestagent.console.screen import Screen
from guestagent.engine.engine import Engine
from guestagent.engine.transaction import Transaction
from vsock.deadline import Deadline
from vsock.errors import CallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guestagent.console.debugview import DebugView
    from guestagent.inspect.methods import Inspection

__all__ = ("Command", "Group", "Guest", "Leave", "Run", "Usage", "not_found", "number")

#: The most words that a usage ending in ``...`` takes.
MAX_WORDS = 500


class Usage(Exception):
    """A command was not used as it must be; the text says how not."""


class Leave(Exception):
    """The session is to end."""


class Guest:
    """What the console may look at and do: the agent around it."""

    def __init__(
        self,
        engine: Engine,
        *,
        boot: Mapping[str, object],
        shell: bool,
        status: Callable[[], StatusReply],
        end: Callable[[str], None],
        metrics: Callable[[], str] | None = None,
    ) -> None:
        """``shell`` is the permission for one; ``end`` ends the agent with a mode; ``metrics``
        returns them as text."""
        self.engine = engine
        self.boot = boot
        self.shell = shell
        self.status = status
        self.end = end
        self.metrics = metrics
        self.started = time.monotonic()

    @functools.cached_property
    def debug(self) -> "DebugView":
        from guestagent.console.debugview import DebugView

        return DebugView(self.engine)

    @functools.cached_property
    def inspection(self) -> "Inspection":
        from guestagent.inspect.methods import Inspection

        return Inspection(self.engine.state)


class Run:
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
        self.guest = guest
        self.engine = guest.engine
        self.channel = channel
        self.screen = screen
        self.deadline = deadline
        self.words = words
        self.options = options
        self.early_input = early_input
        #: Name of the signal that ended the program which was run, if one did.
        self.signal: str | None = None

    def operation(self) -> Transaction:
        """Begin a request to the engine, which an interrupt cancels."""
        return self.engine.operation(self.deadline)

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
Completer = Callable[[Guest, str, Deadline], Sequence[str]]


class Command:
    """One command, as its usage states it: ``name [-l] [-n COUNT] [--long] WORD [WORD...]``.

    ``options`` are the names of those with a dash, with ``=`` after one that has a value. ``least``
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
