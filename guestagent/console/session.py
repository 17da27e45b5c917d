"""One person at the console: read a line, run it, again. A thread of its own."""

import os
from collections.abc import Callable, Sequence

from guestagent import __version__
from guestagent.api.console import CONSOLE_VERSIONS, Exit, Refusal, Welcome
from guestagent.console import words
from guestagent.console.channel import EDITING, INTERRUPT, RUNNING, Channel
from guestagent.console.command import Access, Command, Guest, Leave, Run, Usage
from guestagent.console.commands import COMMANDS, suggest
from guestagent.console.lineedit import History, LineEditor, decode_key
from guestagent.console.screen import Quit, Screen
from vsock.deadline import Deadline
from vsock.errors import CallError, ConnectionClosed
from vsock.log import log

__all__ = ("Session",)

OK, FAILED, WRONG_USAGE, NO_COMMAND, INTERRUPTED = 0, 1, 2, 127, 130
#: A command that was forgotten ends some day.
_COMMAND_SECONDS = 24 * 3600.0
_PROMPT = "guest> "
_ENTER_PROMPT = "Press Enter for the guest's console.\r\n"
_MAX_SCRIPT_LINE_BYTES = 4096
_COMPLETION_SECONDS = 2.0


class Session:
    """Talks to one peer until it leaves or has gone. ``run`` is the thread's function."""

    def __init__(
        self, number: int, channel: Channel, guest: Guest, on_end: Callable[[], None]
    ) -> None:
        self.number = number
        self.channel = channel
        self._guest = guest
        self._on_end = on_end
        self._history = History()
        self._pending = bytearray()
        self._after_return = False
        self._echo = Screen(channel, channel.life)
        self._status = OK
        self._signal: str | None = None

    def run(self) -> None:
        """Never raises but for a bug, which the thread's hook reports; the session ends then."""
        hint = "this is a bug; the log has more"
        last: Exit | Refusal | None
        last = Refusal(code="internal", message="the console failed", hint=hint)
        try:
            self._converse()
            last = Exit(status=self._status, signal=self._signal)
        except CallError as error:
            # not told to a peer that has gone, nor where the agent ends: a client connects again
            last = None if self.channel.life.cancelled else Refusal.of(error)
        except ConnectionClosed as error:
            last = None
            log.debug("console session cut off", session=self.number, why=str(error))
        finally:
            if last is not None:
                self._tell_last(last)
            self._on_end()

    def _tell_last(self, frame: Exit | Refusal) -> None:
        try:
            self.channel.tell(frame)
        except (ConnectionClosed, CallError) as error:
            log.debug("console client not told", session=self.number, why=str(error))

    def _converse(self) -> None:
        """Welcome the peer, and do what it asks for until it leaves or has gone.

        Raises:
            CallError: there is no session, or it was broken off.
        """
        hello = self.channel.hello
        version = next((v for v in CONSOLE_VERSIONS if v in hello.versions), None)
        if version is None:
            raise CallError(
                "unsupported",
                f"no common version: the client speaks {list(hello.versions)}",
                hint=f"this console speaks {list(CONSOLE_VERSIONS)}",
            )
        try:
            shell = self._guest.shell
            self.channel.tell(
                Welcome(version=version, agent=__version__, session=self.number, shell=shell)
            )
            if hello.command is not None:
                self._execute(hello.command)
            elif hello.terminal:
                self._edit_lines()
            else:
                self._read_script()
        except Leave:
            return

    # --- lines

    def _edit_lines(self) -> None:
        screen = Screen(self.channel, self.channel.life)
        if self.channel.is_line:
            screen.raw(_ENTER_PROMPT.encode())
            screen.flush()
            while self._key() != "enter":
                pass
        system = os.uname()
        screen.line(f"guestagent {__version__} on Linux {system.release}; help lists the commands")
        screen.flush()
        while True:
            line = self._edit_line()
            if line is None:
                return
            self._execute(line)

    def _edit_line(self) -> str | None:
        """Return a line; None when the person left."""
        channel = self.channel
        channel.enter(EDITING)
        channel.take_resize()  # what the size was before is of no interest
        self._echo = screen = Screen(channel, channel.life)
        editor = LineEditor(
            _PROMPT,
            columns=channel.size.columns,
            history=self._history,
            complete=self._complete,
            clears=screen.clears,
        )
        _print(screen, editor.start())
        while editor.outcome is None:
            if channel.take_resize():
                _print(screen, editor.resize(channel.size.columns))
            key = self._key_or_resize()
            if key is None:
                if channel.has_ended:
                    return None
                continue
            _print(screen, editor.press(key))
        screen.flush()
        if editor.outcome == "interrupt":
            self._status = INTERRUPTED
            return ""
        return editor.text if editor.outcome == "line" else None

    def _complete(self, partial: words.Partial) -> list[str]:
        """Return the words that could stand for the unfinished one; none after an error."""
        found: Sequence[str] = ()
        if not partial.before:
            found = (*COMMANDS, "exit")
        elif command := COMMANDS.get(partial.before[0]):
            if partial.word.startswith("-"):
                names = [name.rstrip("=") for name in command.options]
                found = [f"--{name}" if len(name) > 1 else f"-{name}" for name in names]
            elif command.complete is not None:
                try:
                    self._guest.gate.console(command.name)
                    with self.channel.life.part(_COMPLETION_SECONDS) as deadline:
                        found = command.complete(Access(self._guest, deadline), partial.word)
                except (CallError, OSError, Usage):
                    return []
        return [word for word in found if word.startswith(partial.word)]

    def _read_script(self) -> None:
        """Run the lines that the peer sends, up to its end of input."""
        channel = self.channel
        channel.enter(EDITING)
        while True:
            line, newline, _ = bytes(self._pending).partition(b"\n")
            if len(line) > _MAX_SCRIPT_LINE_BYTES:
                raise CallError("resource", f"a line of over {_MAX_SCRIPT_LINE_BYTES} bytes")
            if not newline and not channel.has_ended:
                self._more_input()
                continue
            # what came before the end of input may have come since the last look
            late = channel.poll_input()
            if late:
                self._pending += late
                continue
            if not newline and not line:
                return
            del self._pending[: len(line) + len(newline)]
            self._execute(os.fsdecode(line).rstrip("\r"))
            channel.enter(EDITING)

    def _more_input(self) -> None:
        """Wait for input, an end of it or a new size; what was typed is on the screen by then."""
        self._echo.flush()
        self.channel.life.wait((self.channel.input_fd,), "wait for input")
        self._pending += self.channel.poll_input()

    def _key_or_resize(self) -> str | None:
        """Return the next key; None for a new size, or an end of the input."""
        while True:
            decoded = decode_key(self._pending)
            if decoded is not None:
                key, length = decoded
                newline = self._pending[:1] == b"\n"
                self._after_return, after_return = self._pending[:1] == b"\r", self._after_return
                del self._pending[:length]
                if not (newline and after_return):  # CR LF is one enter
                    return key
                continue
            if self.channel.has_ended:
                self._pending += self.channel.poll_input()
                if decode_key(self._pending) is None:
                    return None
                continue
            before = len(self._pending)
            self._more_input()
            if len(self._pending) == before:
                return None

    def _key(self) -> str:
        """Return the next key, whatever the size of the window does."""
        while True:
            key = self._key_or_resize()
            if key is not None:
                return key
            if self.channel.has_ended:
                raise ConnectionClosed("the input ended")

    # --- commands

    def _execute(self, line: str) -> None:
        channel = self.channel
        with channel.life.part(_COMMAND_SECONDS) as deadline:
            channel.enter(RUNNING, deadline)
            typed_since = self._heed_early_interrupt(deadline)
            try:
                self._status = self._run_line(line, deadline)
            finally:
                channel.enter(RUNNING)
                self._pending += typed_since

    def _heed_early_interrupt(self, deadline: Deadline) -> bytes:
        """An interrupt that came after Enter but before the command began was input like any other.

        It counts as it does from now on: it ends the command, and what was typed before it is
        gone. Return what was typed since.
        """
        if not self.channel.hello.terminal:
            return b""
        self._pending += self.channel.poll_input()
        _, interrupt, since = bytes(self._pending).rpartition(INTERRUPT)
        if not interrupt:
            return b""
        self._pending.clear()
        deadline.cancel()
        return since

    def _run_line(self, line: str, deadline: Deadline) -> int:
        life = Screen(self.channel, self.channel.life)
        try:
            parts = words.split(line)
        except ValueError as error:
            life.error(f"{error}")
            return WRONG_USAGE
        if not parts:
            return self._status
        if parts[0] in ("exit", "quit", "logout"):
            raise Leave
        command = COMMANDS.get(parts[0])
        if command is None:
            life.error(f"there is no command {parts[0]!r}{suggest(parts[0])}")
            return NO_COMMAND
        log.info("console command", session=self.number, command=line[:200])
        return self._run_command(command, parts[1:], deadline, life)

    def _run_command(
        self, command: Command, arguments: list[str], deadline: Deadline, life: Screen
    ) -> int:
        paged = command.is_paged and self.channel.hello.command is None
        terminal = self.channel.hello.terminal
        screen = Screen(self.channel, deadline, next_key=self._key if paged and terminal else None)
        self._signal = None
        try:
            self._guest.gate.console(command.name)
            plain, options = command.parse(arguments)
            run = Run(
                self._guest,
                self.channel,
                screen,
                deadline,
                words=plain,
                options=options,
                early_input=self._pending,
            )
            status = command.function(run)
            self._signal = run.signal
            screen.flush()
            return status or OK
        except Quit:
            screen.flush()
            return OK
        except Usage as error:
            life.error(f"{command.name}: {error}; usage: {command.usage}")
            return WRONG_USAGE
        except CallError as error:
            return self._tell(command, error, screen, life)
        except OSError as error:
            about = f" {error.filename!r}" if error.filename else ""
            screen.flush()
            life.error(f"{command.name}:{about} {error.strerror or error}")
            return FAILED

    def _tell(self, command: Command, error: CallError, screen: Screen, life: Screen) -> int:
        if self.channel.life.cancelled:
            raise ConnectionClosed("the peer has gone")
        if error.code == "cancelled":
            self._pending.clear()
            life.error("^C")
            return INTERRUPTED
        screen.flush()
        life.error(f"{command.name}: {error.message}")
        if error.hint:
            life.error(f"  {error.hint}")
        for line in error.kernel_log:
            life.error(f"  kernel: {line}")
        return FAILED


def _print(screen: Screen, text: str) -> None:
    """Print what the editor wants printed, which is as it must be."""
    screen.raw(text.replace("\n", "\r\n").encode("utf-8", "backslashreplace"))
