"""Forked processes that wait for work: what the crew of a batch is taken from, and goes back to.

A member is this process as it was when it was forked, with a connection to it. It is given errands,
one after the other, and answers each with what its work returned. Then it is told whether to keep
that or to undo it. To fork is cheap, but not what follows: each page that either of the two then
writes to is copied for it, and Python writes to most of what it reads. So a member waits for more
to do until nobody has had anything for it for a while.

Members end with the agent, however that ends: the connection does, and they kill themselves, in the
midst of whatever they do. The journal says what that is worth, and the next life acts on it.

A member is forked while other threads may hold locks that nobody is left to release there. Its work
makes system calls and computes. It takes no lock that was made before, logs and publishes nothing;
and what it knows of the agent is what was so when it was forked, but for what an errand tells it.
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
import time
from collections.abc import Callable, Iterable

from guestagent.engine.operation import Operation, Terms
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log
from vsock.owner import FdOwner, Owner
from vsock.threads import block_signals, start_thread

__all__ = ("Errand", "Member", "Reserve", "Undone", "Verdict", "await_earlier_members")

_SIGN_OF_LIFE = ".members"
_LENGTH_BYTES = 4
_READ_BYTES = 64 * 1024
#: A member that is told to go has nothing to do but that.
_GOING_SECONDS = 2.0
#: How long a member waits for more to do, at least; at most twice as long.
_IDLE_SECONDS = 30.0

#: Does a part of a batch, which is pickled on its way in, under an operation of its own whose
#: deadline is cancelled when it is to stop early. Whatever it returns is pickled, too.
Work = Callable[[object, Operation], object]


class Errand:
    """What a member is to do, and under which terms."""

    def __init__(self, job: object, terms: Terms) -> None:
        self.job = job
        self.terms = terms


class Verdict:
    """What becomes of what an errand has made."""

    KEEP, UNDO = "keep", "undo"


class Undone:
    """What a member says when it has undone an errand, as far as that could be."""

    def __init__(self, failures: tuple[str, ...]) -> None:
        self.failures = failures


class _Line:
    """One end of a connection that carries pickled objects. Not thread-safe."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._inbox = bytearray()

    def send(self, message: object) -> None:
        packed = _pickle.dumps(message, 5)
        data = memoryview(len(packed).to_bytes(_LENGTH_BYTES, "little") + packed)
        while data:
            data = data[os.write(self.fd, data) :]

    def receive(self, deadline: Deadline | None = None) -> object:
        """Return the next message; EOFError if there will be none.

        Reads nothing of the one after that: who polls has to see that it came.
        """
        while missing_bytes := self._missing_bytes():
            if deadline is not None:
                deadline.wait([self.fd], "wait for a process of the batch")
            try:
                chunk = os.read(self.fd, min(missing_bytes, _READ_BYTES))
            except ConnectionResetError:  # the other end went before it had read what we said
                chunk = b""
            if not chunk:
                raise EOFError
            self._inbox += chunk
        message = self._inbox[_LENGTH_BYTES:]
        self._inbox.clear()
        return _pickle.loads(message)

    def _missing_bytes(self) -> int:
        """Return how much is still to be read, as far as is known, of the next message."""
        missing_bytes = _LENGTH_BYTES - len(self._inbox)
        if missing_bytes <= 0:
            missing_bytes += int.from_bytes(self._inbox[:_LENGTH_BYTES], "little")
        return missing_bytes

    def is_over(self) -> bool:
        """Say whether the other end is gone, without waiting for it."""
        poller = select.poll()
        poller.register(self.fd, 0)
        return bool(poller.poll(0))


class Member:
    """One process of the reserve, seen from the one that forked it."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.idle_since = 0.0
        self._line = _Line(fd)

    def lives(self) -> bool:
        return not self._line.is_over()

    def send(self, message: "Errand | str") -> None:
        """Give it an errand, or the verdict of the one that it has; one that is dead does not hear
        it, which is seen by who waits for its answer."""
        try:
            self._line.send(message)
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise

    def receive(self, deadline: Deadline) -> object:
        """Return the next thing that the member says.

        Raises:
            CallError: ``timeout`` or ``cancelled``; ``internal``, it is dead.
        """
        try:
            return self._line.receive(deadline)
        except EOFError:
            raise CallError(
                "internal",
                f"process {self.pid}, which worked on a part of the batch, ended",
                step="layers",
                hint="killed, or out of memory? the log of the agent and the kernel may tell",
            ) from None

    def kill(self) -> bool:
        """End it at once; return False if it does not, which only the kernel could keep it from."""
        os.kill(self.pid, signal.SIGKILL)
        return self._is_over()

    def dismiss(self) -> None:
        """Let it go, and see it gone."""
        os.close(self._line.fd)
        if not self._is_over():
            log.warning("a process of a batch does not go", pid=self.pid)
            if not self.kill():
                log.error("a process of a batch cannot be ended", pid=self.pid)
                return
        os.waitpid(self.pid, 0)

    def _is_over(self) -> bool:
        """Wait for its end, which is not collected: its number stays its own until ``dismiss``."""
        pidfd = os.pidfd_open(self.pid)
        try:
            with Deadline(_GOING_SECONDS) as deadline:
                deadline.wait([pidfd], "wait for a process to end")
        except CallError:
            return False
        finally:
            os.close(pidfd)
        return True


class Reserve(Owner):
    """All members, at work or idle. Thread-safe.

    Those at work when it is closed end when their crew gives them back, or with us.
    """

    def __init__(
        self,
        directory: str,
        work: Work,
        *,
        keep_fds: Callable[[], Iterable[int]] = tuple,
        idle_seconds: float = _IDLE_SECONDS,
    ) -> None:
        """``directory`` is the agent's own. Members get no open file but what ``keep_fds`` returns
        when they are forked."""
        # its own: a member of an earlier life may be stuck, and be waited for by a later one
        self._path = f"{directory}/{time.monotonic_ns()}{_SIGN_OF_LIFE}"
        self._work = work
        self._keep_fds = keep_fds
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._life_fd = -1
        self._idle: list[Member] = []
        self._closing = threading.Event()
        self._retirer: threading.Thread | None = None

    def take(self) -> Member:
        """Return a member that has nothing to do: an idle one, or a new one.

        Raises:
            OSError: EAGAIN or ENOMEM, no process can be had; ESHUTDOWN, the reserve is closed.
        """
        while True:
            with self._lock:
                if self._closing.is_set():
                    raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN), self._path)
                if not self._idle:
                    return self._fork()
                member = self._idle.pop()
            if member.lives():
                return member
            member.dismiss()  # somebody killed it

    def give_back(self, member: Member) -> None:
        """Take a member back that has nothing to do any more."""
        with self._lock:
            is_wanted = (
                not self._closing.is_set()
                and len(self._idle) < (os.cpu_count() or 1)
                and self._is_retiring()
            )
            if is_wanted:
                member.idle_since = time.monotonic()
                self._idle.append(member)
        if not is_wanted:
            member.dismiss()

    def close(self) -> None:
        """Let all idle members go and see them gone. Idempotent."""
        with self._lock:
            self._closing.set()
            idle, self._idle = self._idle, []
            retirer = self._retirer
        for member in idle:
            member.dismiss()
        if retirer is not None:
            retirer.join()
        if self._life_fd >= 0:
            os.close(self._life_fd)
            self._life_fd = -1
            with _SignOfLife(self._path) as sign:
                if not sign.is_shown():  # else a next life has to wait
                    os.unlink(self._path)

    # --- members come

    def _fork(self) -> Member:
        self._show_life()
        ours, theirs = (end.detach() for end in socket.socketpair())
        try:
            pid = os.fork()
        except OSError:
            os.close(ours)
            os.close(theirs)
            raise
        if pid == 0:
            with _LastFrame():
                block_signals()  # those of a terminal or a shutdown are the agent's to act on
                _close_all_but((*self._keep_fds(), self._life_fd, theirs))
                _serve(_Line(theirs), self._work)
        os.close(theirs)
        return Member(pid, ours)

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

    # --- members go

    def _is_retiring(self) -> bool:
        """Start to let members go, unless that has begun; return False if no thread can be had."""
        if self._retirer is None:
            retirer = threading.Thread(target=self._retire, name="reserve", daemon=True)
            try:
                start_thread(retirer)
            except RuntimeError:
                return False
            self._retirer = retirer
        return True

    def _retire(self) -> None:
        """Let go who was idle for too long, now and then; ends when nobody is idle."""
        while not self._closing.wait(self._idle_seconds):
            since = time.monotonic() - self._idle_seconds
            with self._lock:
                overdue = [member for member in self._idle if member.idle_since <= since]
                self._idle = [member for member in self._idle if member.idle_since > since]
            for member in overdue:
                member.dismiss()
            with self._lock:
                if not self._idle:
                    self._retirer = None
                    return


# --- in the forked process


class _LastFrame:
    """Nothing leaves the block: the frames around it are another process's."""

    def __enter__(self) -> None:
        # what could be collected now is the parent's as well, and must not be closed a second time
        gc.freeze()

    def __exit__(self, _type: object, error: BaseException | None, _trace: object) -> None:
        is_failed = error is not None and not isinstance(error, (EOFError, BrokenPipeError))
        if is_failed:
            import traceback

            os.write(2, "".join(traceback.format_exception(error)).encode())
        os._exit(1 if is_failed else 0)


def _close_all_but(keep_fds: Iterable[int]) -> None:
    """Close what else is open: a connection ends only when nobody has it any more."""
    kept = frozenset(keep_fds)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in kept:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(fd)


def _serve(line: _Line, work: Work) -> None:
    """Run errands until the connection ends, which is the only bound of the wait for the next."""
    while True:
        errand = line.receive()
        assert isinstance(errand, Errand)
        op = errand.terms.operation()
        with op.deadline as deadline:  # and not ``with op``: without a verdict nothing is undone
            with _Watch(line.fd, deadline):
                line.send(work(errand.job, op))
                verdict = line.receive()
            if verdict == Verdict.UNDO:
                line.send(Undone(op.roll_back()))


class _Watch(Owner):
    """Has an errand end early when there is a word from who forked us, and us with that process."""

    def __init__(self, fd: int, deadline: Deadline) -> None:
        self._over_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, args=(fd, deadline), daemon=True)
        start_thread(self._thread)

    def _watch(self, fd: int, deadline: Deadline) -> None:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.register(self._over_fd, select.POLLIN)
        if any(events & select.POLLHUP for _, events in poller.poll()):
            os.kill(os.getpid(), signal.SIGKILL)
        deadline.cancel()

    def close(self) -> None:
        """See the thread end: it need not wake in time to see the word before that is read."""
        os.eventfd_write(self._over_fd, 1)
        self._thread.join()
        os.close(self._over_fd)


# --- in the next life


def await_earlier_members(directory: str, deadline: Deadline) -> None:
    """Wait until no process that an earlier life has forked works on.

    Each holds a pipe open for as long as it lives, which nobody else opens. They end with the life
    that forked them, but finish the system call that they are in.

    Raises:
        CallError: ``timeout``, one still lives.
    """
    for file in os.listdir(directory):
        if not file.endswith(_SIGN_OF_LIFE):
            continue
        path = f"{directory}/{file}"
        with _SignOfLife(path) as sign:
            if sign.is_shown():
                deadline.wait([sign.fileno()], f"wait for the end of {path!r}")
        os.unlink(path)


class _SignOfLife(FdOwner):
    """The pipe that members hold open, from the other end."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """Return the descriptor, which hangs up when the last member ends; it stays ours."""
        return self._fd

    def is_shown(self) -> bool:
        try:
            os.read(self._fd, 1)  # nothing to read and nobody who could write
        except BlockingIOError:
            return True
        return False
