"""Work shared out to forked processes, each of which can undo its share until all is decided.

Python runs one thread at a time: a batch of layers on threads takes one processor, however many
there are. A member of a crew is this process as it is when it is forked, so that its work needs no
packing on the way in; what it made is sent back. It then waits for the word to undo that, or for
the end of its connection, which comes when all is decided, and also when we are killed. Then it
leaves everything as it is: the journal says what that is worth, and the next life acts on it.

A member is forked while other threads may hold locks that nobody is left to release there. Its work
makes system calls and computes. It takes no lock that was made here, logs and publishes nothing.
"""

# pickle without the pure Python beside it, which would cost a guest time and memory
import _pickle
import contextlib
import errno
import gc
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Sequence

from guestagent.engine.operation import Operation
from guestagent.storage import syscalls
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log
from vsock.owner import Owner
from vsock.threads import start_thread

__all__ = ("Crew", "await_earlier_crews")

_SIGN_OF_LIFE = ".crew"
_UNDO = b"u"
_LENGTH_BYTES = 4
_READ_BYTES = 64 * 1024
#: A member that is told to go has nothing to do but that.
_GOING_SECONDS = 2.0

#: Does a share under the operation given, which is the member's own, and whose deadline is
#: cancelled when it is to stop early. Whatever it returns is pickled.
Work = Callable[[Operation], object]


class Crew(Owner):
    """The processes of one request. ``close`` lets them go, and leaves what they made.

    Not thread-safe; to be used by the thread that made it, with whose end the members end too.
    """

    def __init__(
        self, directory: str, name: str, *, keep_fds: Sequence[int], undo_seconds: float
    ) -> None:
        """``directory`` is the agent's own, ``name`` used by no other crew. Members get no open
        file but ``keep_fds``. ``undo_seconds`` bounds what they take to undo."""
        self._path = f"{directory}/{name}{_SIGN_OF_LIFE}"
        self._keep_fds = keep_fds
        self._undo_seconds = undo_seconds
        self._life_fd = -1
        self._members: list[_Member] = []

    def hire(self, work: Work, op: Operation, *, undo_instead: Callable[[], None]) -> None:
        """Fork a process that does ``work``; ``undo_instead`` undoes it should that process die.

        Raises:
            OSError: EAGAIN or ENOMEM, no process can be had.
        """
        self._show_life()
        ours, theirs = (end.detach() for end in socket.socketpair())
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            os.close(ours)
            os.close(theirs)
            raise
        if pid == 0:
            with _LastFrame():
                _end_with(parent)
                _close_all_but((*self._keep_fds, self._life_fd, theirs))
                _serve(theirs, work, op.forked())
        os.close(theirs)
        self._members.append(_Member(pid, ours, undo_instead))

    def _show_life(self) -> None:
        """Open the pipe that every member has, and by which a next life sees whether one lives."""
        if self._life_fd >= 0:
            return
        os.mkfifo(self._path, 0o600)
        try:
            self._life_fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            os.unlink(self._path)
            raise

    def results(self, deadline: Deadline) -> list[object]:
        """Return what each member's work returned, in the order of hiring.

        Raises:
            CallError: ``timeout`` or ``cancelled``; ``internal``, a member died.
        """
        return [member.receive(deadline) for member in self._members]

    def call_off(self) -> None:
        """Have all members stop and undo, without waiting for it. Idempotent."""
        for member in self._members:
            member.call_off()

    def undo(self) -> None:
        """Have all members undo what they made, and wait until they have. Idempotent.

        Raises:
            CallError: ``internal``, naming what could not be undone.
        """
        self.call_off()
        with Deadline(self._undo_seconds) as deadline:
            failures = [text for member in self._members for text in member.undone(deadline)]
        if failures:
            raise CallError("internal", "; ".join(failures))

    def let_go(self) -> None:
        """Let the members end, and leave what they made. Idempotent."""
        for member in self._members:
            member.let_go()

    def close(self) -> None:
        """Let the members go and see them gone. Idempotent."""
        self.let_go()
        members, self._members = self._members, []
        for member in members:
            member.reap()
        if self._life_fd >= 0:
            os.close(self._life_fd)
            self._life_fd = -1
            os.unlink(self._path)


class _Member:
    """One process of a crew, seen from the one that forked it."""

    def __init__(self, pid: int, fd: int, undo_instead: Callable[[], None]) -> None:
        self._pid = pid
        self._fd = fd
        self._undo_instead = undo_instead
        self._inbox = bytearray()
        self._is_called_off = False
        self._is_undone = False

    def receive(self, deadline: Deadline) -> object:
        """Return the next thing that the member says; CallError ``internal`` if it is dead."""
        while (message := self._next_message()) is None:
            deadline.wait([self._fd], "wait for a process of the batch")
            try:
                chunk = os.read(self._fd, _READ_BYTES)
            except ConnectionResetError:  # it ended before it had read what we said
                chunk = b""
            if not chunk:
                raise CallError(
                    "internal",
                    f"process {self._pid}, which worked on a part of the batch, ended",
                    step="layers",
                    hint="killed, or out of memory? the log of the agent and the kernel may tell",
                )
            self._inbox += chunk
        return _pickle.loads(message)

    def _next_message(self) -> bytes | None:
        end = _LENGTH_BYTES + int.from_bytes(self._inbox[:_LENGTH_BYTES], "little")
        if len(self._inbox) < max(end, _LENGTH_BYTES):
            return None
        message = bytes(self._inbox[_LENGTH_BYTES:end])
        del self._inbox[:end]
        return message

    def call_off(self) -> None:
        if self._is_called_off:
            return
        self._is_called_off = True
        try:
            os.write(self._fd, _UNDO)
        except OSError as error:
            if error.errno != errno.EPIPE:  # dead: seen by who waits for it
                raise

    def undone(self, deadline: Deadline) -> tuple[str, ...]:
        """Wait until the member has undone its share; return what could not be undone.

        Idempotent: whoever asks again is told nothing more.
        """
        if self._is_undone:
            return ()
        self._is_undone = True
        try:
            while not isinstance(said := self.receive(deadline), _Undone):
                pass
        except (OSError, CallError) as error:
            return self._undo_for_it(error)
        return said.failures

    def _undo_for_it(self, error: OSError | CallError) -> tuple[str, ...]:
        """The member is dead or stuck: end it, then undo its share from here."""
        os.kill(self._pid, signal.SIGKILL)
        if not self._is_over():
            return (f"the share of process {self._pid}: {error}",)
        try:
            self._undo_instead()
        except (OSError, CallError) as left:
            return (f"the share of process {self._pid}: {left}",)
        return ()

    def let_go(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def reap(self) -> None:
        if not self._is_over():
            log.warning("a process of a batch does not go", pid=self._pid)
            os.kill(self._pid, signal.SIGKILL)
            if not self._is_over():
                log.error("a process of a batch cannot be ended", pid=self._pid)
                return
        os.waitpid(self._pid, 0)

    def _is_over(self) -> bool:
        """Wait for its end, which is not collected: its number stays its own until ``reap``."""
        pidfd = os.pidfd_open(self._pid)
        try:
            with Deadline(_GOING_SECONDS) as deadline:
                deadline.wait([pidfd], "wait for a process to end")
        except CallError:
            return False
        finally:
            os.close(pidfd)
        return True


class _Undone:
    """What a member says last."""

    def __init__(self, failures: tuple[str, ...]) -> None:
        self.failures = failures


# --- in the forked process


class _LastFrame:
    """Nothing leaves the block: the frames around it are another process's."""

    def __enter__(self) -> None:
        # what is collected here is the parent's as well, and must not be closed a second time
        gc.disable()

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        if error is not None and not isinstance(error, ConnectionError):
            import traceback

            os.write(2, "".join(traceback.format_exception(error)).encode())
        os._exit(0 if error is None else 1)


def _end_with(parent: int) -> None:
    """Be killed when the thread that forked us ends, also when it has ended already."""
    syscalls.end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _close_all_but(keep_fds: Sequence[int]) -> None:
    """Close what else is open: a connection ends only when nobody has it any more."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep_fds:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(fd)


def _serve(fd: int, work: Work, op: Operation) -> None:
    watcher = threading.Thread(target=_cancel_at_word, args=(fd, op.deadline), daemon=True)
    start_thread(watcher)
    _send(fd, work(op))
    if os.read(fd, 1) == _UNDO:
        _send(fd, _Undone(op.roll_back()))


def _cancel_at_word(fd: int, deadline: Deadline) -> None:
    """Have whatever is under way end when there is a word from who forked us, or never will be."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    poller.poll()
    deadline.cancel()


def _send(fd: int, message: object) -> None:
    packed = _pickle.dumps(message, 5)
    data = memoryview(len(packed).to_bytes(_LENGTH_BYTES, "little") + packed)
    while data:
        data = data[os.write(fd, data) :]


# --- in the next life


def await_earlier_crews(directory: str, deadline: Deadline) -> None:
    """Wait until no process of a crew of an earlier life works on.

    Each holds a pipe open for as long as it lives, which nothing but a crew opens. They are killed
    with the life that forked them, but finish the system call that they are in.

    Raises:
        CallError: ``timeout``, one still lives.
    """
    for file in os.listdir(directory):
        if not file.endswith(_SIGN_OF_LIFE):
            continue
        path = f"{directory}/{file}"
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.read(fd, 1)  # nothing to read and nobody who could write
        except BlockingIOError:
            deadline.wait([fd], f"wait for the end of {path!r}")
        finally:
            os.close(fd)
        os.unlink(path)
