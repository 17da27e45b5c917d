"""One process of the reserve: what is said to it, seen from both ends.

A member is given errands, one after the other, and answers each with what its work returned. Then
it is told whether to keep that or to undo it. It ends with its connection, in the midst of whatever
it does.
"""

# pickle without the pure Python beside it, which would cost a guest time and memory
import _pickle
import errno
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Sequence

from guestagent.engine.transaction import Operation, Terms
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log
from vsock.owner import Owner
from vsock.threads import start_thread

__all__ = ("Errand", "Member", "Undone", "Verdict", "Work", "serve")

_LENGTH_BYTES = 4
_READ_BYTES = 64 * 1024
_MOST_FDS = 1
#: A member that is told to go has nothing to do but that.
_GOING_SECONDS = 2.0

#: Does a part of a batch, which is pickled on its way in, under an operation of its own whose
#: deadline is cancelled when it is to stop early. Whatever it returns is pickled, too. Between them
#: are the descriptors that came with the job, which are closed after it.
Work = Callable[[object, Sequence[int], Operation], object]


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

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._inbox = bytearray()
        #: What came with the last message; they are the receiver's to close.
        self.fds: Sequence[int] = ()

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, message: object) -> None:
        """Send a message, however long the other end takes to read it."""
        self._end.sendall(_packed(message))

    def send_until(
        self, deadline: Deadline, step: str, message: object, fds: Sequence[int] = ()
    ) -> None:
        """Send a message, and descriptors with it, at most ``_MOST_FDS``; they stay ours, too.

        Raises:
            CallError: ``timeout`` or ``cancelled`` while ``step``, and the line is of no more use.
        """
        rest = memoryview(_packed(message))
        # not by socket.send_fds, which forgets the flags
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _fd_array(fds))] if fds else []
        while rest:
            try:
                sent = self._end.sendmsg([rest], rights, socket.MSG_DONTWAIT)
            except BlockingIOError:
                deadline.wait((), step, writable=(self.fileno(),))
            else:
                rest, rights = rest[sent:], []

    def receive(self, deadline: Deadline | None = None) -> object:
        """Return the next message; EOFError if there will be none.

        Reads nothing of the one after that: who polls has to see that it came.
        """
        while missing_bytes := self._missing_bytes():
            if deadline is not None:
                deadline.wait([self.fileno()], "wait for a process of the batch")
            try:
                chunk = self._read(min(missing_bytes, _READ_BYTES))
            except ConnectionResetError:  # the other end went before it had read what we said
                chunk = b""
            if not chunk:
                raise EOFError
            self._inbox += chunk
        message = self._inbox[_LENGTH_BYTES:]
        self._inbox.clear()
        return _pickle.loads(message)

    def _read(self, at_most_bytes: int) -> bytes:
        if self._inbox:
            return self._end.recv(at_most_bytes)
        # descriptors come with the first byte of a message
        chunk, self.fds, _, _ = socket.recv_fds(self._end, at_most_bytes, _MOST_FDS)
        return chunk

    def _missing_bytes(self) -> int:
        """Return how much is still to be read, as far as is known, of the next message."""
        missing_bytes = _LENGTH_BYTES - len(self._inbox)
        if missing_bytes <= 0:
            missing_bytes += int.from_bytes(self._inbox[:_LENGTH_BYTES], "little")
        return missing_bytes

    def is_over(self) -> bool:
        """Say whether the other end is gone, without waiting for it."""
        poller = select.poll()
        poller.register(self.fileno(), 0)
        return bool(poller.poll(0))

    def close(self) -> None:
        self._end.close()


def _packed(message: object) -> bytes:
    packed = _pickle.dumps(message, 5)
    return len(packed).to_bytes(_LENGTH_BYTES, "little") + packed


def _fd_array(fds: Sequence[int]) -> bytes:
    return struct.pack(f"@{len(fds)}i", *fds)


class Member:
    """One process of the reserve, seen from the one that forked it."""

    def __init__(self, pid: int, end: socket.socket) -> None:
        """``end`` becomes its own."""
        self.pid = pid
        self.idle_since = 0.0
        self._line = _Line(end)

    def lives(self) -> bool:
        return not self._line.is_over()

    def send(self, message: "Errand | str", deadline: Deadline, fds: Sequence[int] = ()) -> None:
        """Give it an errand, and descriptors for it, or the verdict of the one that it has; one
        that is dead does not hear it, which is seen by who waits for its answer.

        Raises:
            CallError: ``timeout`` or ``cancelled``; it does not read, and all there is to do is
                ``kill``.
        """
        try:
            self._line.send_until(deadline, f"give word to process {self.pid}", message, fds)
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
        self._line.close()
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


# --- in the forked process


def serve(end: socket.socket, work: Work) -> None:
    """Run errands until the connection ends, which is the only bound of the wait for the next."""
    line = _Line(end)
    while True:
        errand, fds = line.receive(), line.fds
        assert isinstance(errand, Errand)
        op = errand.terms.operation()
        with op.deadline as deadline:  # and not ``with op``: without a verdict nothing is undone
            with _Watch(end.fileno(), deadline):
                result = work(errand.job, fds, op)
                for fd in fds:
                    os.close(fd)
                line.send(result)
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
