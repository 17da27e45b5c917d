"""What a command is, and what it is given when it runs."""

import time
from collections.abc import Callable, Mapping

from guestagent.api import StatusReply
from guestagent.console.channel import Channel
from guestagent.console.screen import Screen
from guestagent.engine.engine import Engine
from guestagent.engine.transaction import Operation
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("Command", "Guest", "Run", "Usage")


class Usage(Exception):
    """A command was not used as it must be; the text says how not."""


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
        """``early_input`` is what was typed already and belongs to whoever reads next."""
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

    def operation(self) -> Operation:
        """Begin a request to the engine, which an interrupt cancels."""
        return self.engine.operation(self.deadline)

    def number(self, option: str, default: int, *, low: int = 1, high: int = 1 << 62) -> int:
        """Return an option's value as a number.

        Raises:
            Usage: it is none, or out of range.
        """
        text = self.options.get(option)
        return default if text is None else number(text, option, low=low, high=high)


def number(text: str, name: str, *, low: int = 0, high: int = 1 << 62) -> int:
    """Read a number, decimal or with 0x.

    Raises:
        Usage: it is none, or out of range.
    """
    try:
        value = int(text, 16) if text.startswith("0x") else int(text, 10)
    except ValueError:
        raise Usage(f"{name} takes a number, not {text!r}") from None
    if not low <= value <= high:
        raise Usage(f"{name} must be in {low}..{high}, not {value}")
    return value


class Command(Record):
    """One command. ``usage`` is what follows the name; ``function`` returns an exit status or None
    for 0.

    ``options`` are the letters that it takes, with ``=`` after one that has a value; an option of
    several letters has two dashes. ``least`` and ``most`` bound the number of its other words.
    ``completes`` says what these are: layer, overlay, device, dm, path or command; ``rest`` hands
    everything to the function as it is.
    """

    name: str
    summary: str
    function: Callable[[Run], int | None]
    usage: str = ""
    options: tuple[str, ...] = ()
    least: int = 0
    most: int = 0
    completes: str = ""
    is_paged: bool = True
    group: str = "guest"

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
            if word == "--":
                plain += rest
                break
            if len(word) < 2 or not word.startswith("-") or word[1].isdigit():
                plain.append(word)
                continue
            name = word.lstrip("-")
            if f"{name}=" in self.options:
                if not rest:
                    raise Usage(f"{word} needs a value")
                options[name] = rest.pop(0)
            elif name in self.options:
                options[name] = ""
            else:
                raise Usage(f"there is no option {word}")
        if len(plain) < self.least:
            raise Usage("something is missing")
        if len(plain) > self.most:
            raise Usage(f"{plain[self.most]!r} is too much")
        return tuple(plain), options

    @property
    def synopsis(self) -> str:
        return f"{self.name} {self.usage}".rstrip()


def not_found(what: str, hint: str) -> CallError:
    """Return the error for a name that nothing has."""
    return CallError("not_found", what, hint=hint)
