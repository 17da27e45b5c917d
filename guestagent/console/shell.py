"""A program of the guest at the console: on a pseudo-terminal, or on pipes for a script.

Nothing is forked in this process, which has threads: ``posix_spawn`` makes the child the leader of
a new session, whose first opened terminal becomes its controlling one.
"""

import errno
import fcntl
import os
import signal
import struct
import termios
import threading
from contextlib import ExitStack

from guestagent.api.console import Size
from guestagent.console.channel import RAW, RUNNING
from guestagent.console.chroot import find_shell, shell_in
from guestagent.console.command import Run
from guestagent.console.processes import session_members
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log

__all__ = ("run_shell",)

_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/",
    "PS1": "guest# ",
    "LANG": "C.UTF-8",
}
_READ_BYTES = 16 * 1024
_MAX_PENDING_BYTES = 64 * 1024
_KILL_SECONDS = 5.0
#: The capacity of a pipe: a program cannot leave more unread output than that.
_MAX_LEFT_BYTES = 64 * 1024


def run_shell(run: Run, command: str | None, root: str | None) -> int:
    """Run a shell, in the directory ``root`` if one is given, until it ends.

    Returns its exit status, or 128 and the number of the signal that ended it.

    When the peer goes, or the agent ends, everything in the shell's session is killed.
    """
    arguments = find_shell() if root is None else shell_in(root)
    if command is not None:
        arguments += ("-c", command)
    run.screen.flush()
    with _Program(run, arguments) as program:
        return program.serve()


class _Program:
    """A program and its descriptors. A context manager, which ends the program's whole session."""

    def __init__(self, run: Run, arguments: tuple[str, ...]) -> None:
        self._run = run
        self._channel = run.channel
        self._is_terminal = run.screen.is_terminal
        #: Descriptor of its input, -1 once that is closed.
        self._input = -1
        #: Descriptors of its output, and whether that is about errors.
        self._outputs: dict[int, bool] = {}
        self._to_write = bytearray()
        self._status: int | None = None
        # guards the pid and descriptors, which another thread uses, against being closed and reused
        self._lock = threading.Lock()
        self._is_over = False
        try:
            self._pid = self._spawn(arguments)
        except BaseException:
            self._close()
            raise
        self._pid_fd = os.pidfd_open(self._pid)
        log.info("shell", pid=self._pid, command=" ".join(arguments)[:200])

    def __enter__(self) -> "_Program":
        self._channel.on_signal = self.send_signal
        self._channel.on_size = self.resize
        self._channel.enter(RAW)
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.on_signal = self._channel.interrupt_on
        self._channel.on_size = lambda size: None
        with self._lock:
            self._is_over = True
        self._end()
        os.close(self._pid_fd)
        self._close()
        self._channel.enter(RUNNING, self._run.deadline)

    def _spawn(self, arguments: tuple[str, ...]) -> int:
        """Start the program on a terminal of the peer's size, or on three pipes."""
        actions: list[tuple[object, ...]] = []
        with ExitStack() as ends:  # those of the program, which are closed here
            if self._is_terminal:
                self._input, end = os.openpty()
                ends.callback(os.close, end)
                self._outputs[self._input] = False
                self._set_size(self._channel.size)
                # opened by the leader of a session without a terminal, it becomes the session's
                actions += [(os.POSIX_SPAWN_OPEN, 0, os.ttyname(end), os.O_RDWR, 0)]
                actions += [(os.POSIX_SPAWN_DUP2, 0, number) for number in (1, 2)]
            else:
                end, self._input = os.pipe()
                ends.callback(os.close, end)
                actions += [(os.POSIX_SPAWN_DUP2, end, 0)]
                for number in (1, 2):
                    output, end = os.pipe()
                    self._outputs[output] = number == 2
                    ends.callback(os.close, end)
                    actions += [(os.POSIX_SPAWN_DUP2, end, number)]
            for fd in self._fds():
                os.set_blocking(fd, False)
            return os.posix_spawn(
                arguments[0],
                arguments,
                {**_ENVIRONMENT, "TERM": self._channel.hello.term or "dumb"},
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP},
            )

    def _fds(self) -> set[int]:
        # a terminal's input and output are one descriptor
        return {*self._outputs, self._input} - {-1}

    def _close(self) -> None:
        for fd in self._fds():
            os.close(fd)
        self._outputs.clear()
        self._input = -1

    def send_signal(self, name: str) -> None:
        """Signal the process group in the foreground. Called by the console's thread."""
        with self._lock:
            if not self._is_over:
                _kill_group(self._foreground(), signal.Signals[f"SIG{name}"])

    def resize(self, size: Size) -> None:
        """Take note of the window's size. Called by the console's thread."""
        with self._lock:
            if not self._is_over and self._is_terminal:
                self._set_size(size)

    def _foreground(self) -> int:
        if not self._is_terminal:
            return self._pid
        try:
            return os.tcgetpgrp(self._input) or self._pid
        except OSError:  # no process has the terminal open
            return self._pid

    def _set_size(self, size: Size) -> None:
        window = struct.pack("4H", size.rows, size.columns, 0, 0)
        fcntl.ioctl(self._input, termios.TIOCSWINSZ, window)

    def _end_input(self) -> None:
        """Tell the program that the peer has no more input."""
        if self._is_terminal:
            self._to_write += b"\x04"
        else:
            os.close(self._input)
            self._input = -1

    def serve(self) -> int:
        """Carry bytes both ways until the program ends; return its exit status."""
        life = self._channel.life
        self._to_write += self._run.early_input
        self._run.early_input.clear()
        while self._status is None:
            self._turn(life)
        self._drain(life)
        return self._status

    def _turn(self, life: Deadline) -> None:
        readable = [self._pid_fd, *self._outputs]
        if len(self._to_write) < _MAX_PENDING_BYTES and self._input >= 0:
            readable.append(self._channel.input_fd)
        writable = [self._input] if self._to_write and self._input >= 0 else []
        ready = life.wait(readable, "run the shell", writable=writable)
        if self._channel.input_fd in ready:
            self._to_write += self._channel.poll_input()
        if self._input >= 0 and self._input in ready and self._to_write:
            self._write_some()
        if self._channel.has_ended and not self._to_write and self._input >= 0:
            # what came before the end may have come since it was looked for
            self._to_write += self._channel.poll_input()
            if not self._to_write:
                self._end_input()
        for fd in list(self._outputs):
            if fd in ready:
                self._carry(fd, life)
        if self._pid_fd in ready:
            self._note_end()

    def _write_some(self) -> None:
        try:
            del self._to_write[: os.write(self._input, bytes(self._to_write[:_READ_BYTES]))]
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self._to_write.clear()  # the program has closed its input

    def _carry(self, fd: int, deadline: Deadline) -> int:
        """Pass on what there is of the output; return how many bytes that was."""
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno != errno.EIO:  # how a terminal says that its last user has gone
                raise
            data = b""
        if not data:
            del self._outputs[fd]
            if fd != self._input:
                os.close(fd)
            return 0
        write = self._channel.write_error if self._outputs[fd] else self._channel.write
        write(data, deadline)
        return len(data)

    def _drain(self, deadline: Deadline) -> None:
        """Pass on what the program wrote before it ended, however slow the peer is.

        Other processes of its session may have the same output, and write on: their output is
        passed on up to a bound.
        """
        for fd in list(self._outputs):
            left_bytes = _MAX_LEFT_BYTES
            while left_bytes > 0 and fd in self._outputs:
                passed_bytes = self._carry(fd, deadline)
                if not passed_bytes:
                    break
                left_bytes -= passed_bytes

    def _note_end(self) -> None:
        """Learn how the child ended. It is not reaped yet, so that its session keeps its number."""
        end = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        assert end is not None
        self._status = end.si_status
        if end.si_code != os.CLD_EXITED:
            self._status += 128
            self._run.signal = _signal_name(end.si_status)

    def _end(self) -> None:
        """Kill what is left of the session, then reap the child."""
        if self._status is None:
            for number in (signal.SIGHUP, signal.SIGCONT):
                _kill_group(self._pid, number)
        with Deadline(_KILL_SECONDS) as deadline:
            try:
                while self._kill_session():
                    deadline.wait((), "kill the shell's session", at_most=0.02)
                deadline.wait((self._pid_fd,), "reap the shell")
                os.waitpid(self._pid, 0)
            except CallError as error:
                log.error("processes of a shell do not die", pid=self._pid, error=str(error))

    def _kill_session(self) -> bool:
        members = session_members(self._pid)
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return bool(members)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name.removeprefix("SIG")
    except ValueError:  # most of the real-time ones have none
        return str(number)


def _kill_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return
