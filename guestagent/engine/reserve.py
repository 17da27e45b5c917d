"""Forked processes that wait for work: what the crew of a batch is taken from, and goes back to.

A member is this process as it was when it was forked, with a connection to it. To fork is cheap,
but not what follows: each page that either of the two then writes to is copied for it, and Python
writes to most of what it reads. So a member waits for more to do until nobody has had anything for
it for a while.

Members end with the agent, however that ends: the connection does, and they kill themselves, in the
midst of whatever they do. The journal says what that is worth, and the next life acts on it.

A member is forked while other threads may hold locks that nobody is left to release there. Its work
makes system calls and computes. It takes no lock that was made before, logs and publishes nothing;
and what it knows of the agent is what was so when it was forked, but for what an errand tells it.
"""

import contextlib
import errno
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable

from guestagent.engine.member import Member, Work, serve
from vsock.deadline import Deadline
from vsock.owner import FdOwner, Owner
from vsock.threads import block_signals, start_thread

__all__ = ("Reserve", "await_earlier_members")

_SIGN_OF_LIFE = ".members"
#: How long a member waits for more to do, at least; at most twice as long.
_IDLE_SECONDS = 30.0


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
        ours, theirs = socket.socketpair()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            with _LastFrame():
                block_signals()  # those of a terminal or a shutdown are the agent's to act on
                _close_all_but((*self._keep_fds(), self._life_fd, theirs.fileno()))
                serve(theirs, self._work)
        theirs.close()
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
