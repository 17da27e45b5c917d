"""The network from the agent's side: an order to a child of its own, and the child's answer.

What the child imports takes 16 MiB and a tenth of a second, and goes with it. A child that is lost
or late is killed, and another one restores what was there before.
"""

import importlib.machinery
import os
import signal
import sys

import msgpack

from guestagent.api.net import NetConfigure, NetConfigureReply, NetListReply
from guestagent.net.undofile import undo_path
from guestagent.storage.makefs import are_programs_forbidden
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record, wire_fields

__all__ = ("UNDO_FD", "Answer", "Order", "configure_network", "list_network", "restore_network")

#: The descriptor of the undo file in the child.
UNDO_FD = 3
_CHILD = "guestagent.net.child"
_START = "import sys; sys.path[:] = {path!r}; from {child} import main; main()"
_MAX_ANSWER_BYTES = 4 << 20
_PIECE_BYTES = 64 * 1024
#: What a child gets beyond its deadline to undo its work.
_UNDO_SECONDS = 16.0
#: What a restoring child gets, beyond the deadline of the request that it undoes.
_RESTORE_SECONDS = 20.0


class Order(Record):
    """What a child is to do: configure, list or restore. ``root`` is where /etc is; the child ends
    with the process ``agent_pid``."""

    command: str
    seconds: float
    agent_pid: int
    request: NetConfigure | None = None
    faults: str = ""
    root: str = "/"


class Answer(Record):
    """A reply's map, or an error's."""

    error: object = None
    result: object = None


def configure_network(
    request: NetConfigure,
    state_directory: str,
    deadline: Deadline,
    *,
    faults: str = "",
    root: str = "/",
) -> NetConfigureReply:
    """Set up the network.

    Raises:
        CallError: it is as it was; the hint says what could not be restored.
    """
    order = Order(
        command="configure",
        seconds=_seconds(deadline),
        agent_pid=os.getpid(),
        request=request,
        faults=faults,
        root=root,
    )
    try:
        return NetConfigureReply.from_wire(_run(order, state_directory, deadline), "answer")
    except _LostError as lost:
        try:
            restore_network(state_directory)
        except CallError as error:
            lost.error.hint = f"not undone: {error.message}"
        raise lost.error from None


def list_network(state_directory: str, deadline: Deadline) -> NetListReply:
    """Return what there is."""
    order = Order(command="list", seconds=_seconds(deadline), agent_pid=os.getpid())
    try:
        return NetListReply.from_wire(_run(order, state_directory, deadline), "answer")
    except _LostError as lost:
        raise lost.error from None


def restore_network(state_directory: str) -> None:
    """Undo what a child that was killed has left unfinished.

    Raises:
        CallError: something could not be restored; the next request tries it again.
    """
    with Deadline(_RESTORE_SECONDS) as deadline:
        seconds = _RESTORE_SECONDS * 0.9
        order = Order(command="restore", seconds=seconds, agent_pid=os.getpid())
        try:
            _run(order, state_directory, deadline)
        except _LostError as lost:
            raise lost.error from None


class _LostError(Exception):
    """A child was killed, or died, with its work unfinished perhaps."""

    def __init__(self, error: CallError) -> None:
        super().__init__(str(error))
        self.error = error


def _seconds(deadline: Deadline) -> float:
    seconds = deadline.remaining()
    return 60.0 if seconds is None else seconds


def _run(order: Order, state_directory: str, deadline: Deadline) -> object:
    """Have a child carry out an order; return the map of its reply.

    Raises:
        CallError: the child's error, or there can be no child.
        _LostError: the child was killed, at the deadline too, or has died.
    """
    _check_child()
    packed = msgpack.packb(order, default=wire_fields)
    child, order_fd, answer_fd = _start(state_directory)
    failure: CallError | None = None
    raw = b""
    try:
        _send(order_fd, packed, deadline)
        raw = _receive(answer_fd, deadline)
    except CallError as error:  # cancelled, or the child does not even end its undoing
        failure = error
        os.kill(child, signal.SIGKILL)
    finally:
        os.close(answer_fd)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if failure is None and status != 0:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        text = f"the child that sees to the network {how}"
        failure = CallError("internal", text, step=order.command, object="network")
    if failure is not None:
        raise _LostError(failure)
    answer = Answer.from_wire(msgpack.unpackb(raw), "answer")
    if answer.error is not None:
        raise _kept(CallError.from_wire(answer.error))
    return answer.result


def _kept(error: CallError) -> CallError:
    """Let the steps of the agent leave the step of the child in an error."""
    error.has_step = error.step is not None
    return error


def _check_child() -> None:
    if are_programs_forbidden():
        raise CallError(
            "unsupported",
            "the network cannot be set up: the programs of this root were not measured with the "
            "agent",
            step="start child",
            object="network",
            hint="set it up at boot, by guestagent.net=",
        )
    places = [f"{directory}/guestagent/net" for directory in sys.path]
    if importlib.machinery.PathFinder.find_spec(_CHILD.rpartition(".")[2], places) is None:
        raise CallError(
            "unsupported",
            "this guest cannot set up its network",
            step="start child",
            object="network",
            hint="build the boot image with the feature net",
        )


def _start(state_directory: str) -> tuple[int, int, int]:
    """Start a child; return its pid, where its order goes, and where its answer comes from."""
    fds: list[int] = []
    kept: tuple[int, ...] = ()
    try:
        order_reader, order_writer = os.pipe2(os.O_CLOEXEC)
        fds += [order_reader, order_writer]
        answer_reader, answer_writer = os.pipe2(os.O_CLOEXEC)
        fds += [answer_reader, answer_writer]
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        os.makedirs(state_directory, mode=0o700, exist_ok=True)
        fds.append(os.open(undo_path(state_directory), flags, 0o600))
        path = [entry for entry in sys.path if entry]
        child = os.posix_spawn(
            sys.executable,
            (sys.executable, "-I", "-S", "-c", _START.format(path=path, child=_CHILD)),
            {},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, order_reader, 0),
                (os.POSIX_SPAWN_DUP2, answer_writer, 1),
                (os.POSIX_SPAWN_DUP2, fds[-1], UNDO_FD),
            ],
            setsigmask=(),
        )
        kept = (order_writer, answer_reader)
    except OSError as error:
        text = f"there can be no child for the network: {error.strerror}"
        raise CallError(
            "resource", text, errno=error.errno, step="start child", object="network"
        ) from None
    finally:
        for fd in fds:
            if fd not in kept:
                os.close(fd)
    os.set_blocking(order_writer, False)
    return child, order_writer, answer_reader


def _send(fd: int, data: bytes, deadline: Deadline) -> None:
    view = memoryview(data)
    try:
        while view:
            deadline.wait((), "order the network", writable=(fd,))
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:  # it has died; its status says more
                return
    finally:
        os.close(fd)


def _receive(fd: int, deadline: Deadline) -> bytes:
    """Return the answer. The child has the same deadline, and undoes its work when that is over."""
    raw = b""
    with Deadline() as patience:
        while len(raw) <= _MAX_ANSWER_BYTES:
            if not deadline.expired or deadline.cancelled:
                try:
                    deadline.wait((fd,), "wait for the network")
                except CallError as error:
                    if error.code != "timeout":
                        raise
            if deadline.expired:  # the first time counts
                patience.limit(_UNDO_SECONDS)
                patience.wait((fd,), "wait until the network is as it was")
            piece = os.read(fd, _PIECE_BYTES)
            if not piece:
                return raw
            raw += piece
    raise CallError("internal", "the answer about the network is too large", object="network")
