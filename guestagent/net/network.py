"""The network from the agent's side: an order to a child of its own, and the child's answer.

What the child imports takes 16 MiB and a tenth of a second, and goes with it. A child that is lost
or late is killed, and another one restores what was there before.
"""

import importlib.machinery
import os
import signal
import sys

import msgpack

from guestagent.api.net import NetConfigure, NetConfigureReply, NetList, NetListReply
from guestagent.api.request import handles
from guestagent.engine.transaction import Transaction
from guestagent.net.undofile import undo_path
from guestagent.policy.decision import Allowed
from guestagent.storage.makefs import are_programs_forbidden
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record, wire_fields

TYPE_CHECKING = False
if TYPE_CHECKING:  # the child imports this module, and needs no engine
    from guestagent.engine.state import EngineState

__all__ = (
    "UNDO_FD",
    "Answer",
    "Network",
    "Order",
    "configure_network",
    "list_network",
    "restore_network",
)

#: The descriptor of the undo file in the child.
UNDO_FD = 3
_CHILD = "guestagent.net.child"
_START = "import sys; sys.path[:] = {path!r}; from {child} import main; main()"
_MAX_ANSWER_BYTES = 4 << 20
_PIECE_BYTES = 64 * 1024
#: The time of a request without a deadline.
_SECONDS = 60.0
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


class Network:
    """The requests for the network: one child at a time, whatever connections ask."""

    def __init__(self, state: "EngineState") -> None:
        self._state = state

    @handles(NetConfigure)
    def configure(self, request: NetConfigure, op: Transaction) -> NetConfigureReply:
        """Set up the network: all of it, or what was there."""
        state = self._state
        with state.locks.hold([("network", "")], op.deadline):
            permit = state.gate.request(request.method, request)
            faults = state.faults.to_text()
            return configure_network(request, state.directory, op.deadline, permit, faults=faults)

    @handles(NetList)
    def list(self, _request: NetList, op: Transaction) -> NetListReply:
        with self._state.locks.hold([("network", "")], op.deadline):
            return list_network(self._state.directory, op.deadline)


def configure_network(
    request: NetConfigure,
    state_directory: str,
    deadline: Deadline,
    _permit: Allowed,
    *,
    faults: str = "",
    root: str = "/",
) -> NetConfigureReply:
    """Set up the network.

    Raises:
        CallError: it is as it was; the hint says what could not be restored.
    """
    order = _order("configure", deadline).replace(request=request, faults=faults, root=root)
    try:
        return NetConfigureReply.from_wire(_run(order, state_directory, deadline), "answer")
    except _ChildLostError as lost:
        try:
            restore_network(state_directory)
        except CallError as error:
            lost.hint = f"not undone: {error.message}"
        raise


def list_network(state_directory: str, deadline: Deadline) -> NetListReply:
    order = _order("list", deadline)
    return NetListReply.from_wire(_run(order, state_directory, deadline), "answer")


def restore_network(state_directory: str) -> None:
    """Undo what a child that was killed has left unfinished.

    Raises:
        CallError: something could not be restored; the next request tries it again.
    """
    with Deadline(_RESTORE_SECONDS) as deadline:
        order = _order("restore", deadline).replace(seconds=_RESTORE_SECONDS * 0.9)
        _run(order, state_directory, deadline)


class _ChildLostError(CallError):
    """A child was killed, or died, perhaps with its work unfinished."""


def _order(command: str, deadline: Deadline) -> Order:
    seconds = deadline.remaining()
    return Order(
        command=command, seconds=_SECONDS if seconds is None else seconds, agent_pid=os.getpid()
    )


def _run(order: Order, state_directory: str, deadline: Deadline) -> object:
    """Have a child carry out an order; return the map of its reply.

    Raises:
        CallError: the child's error, or there can be no child.
        _ChildLostError: the child was killed, at the deadline too, or has died.
    """
    _check_child()
    child, answer_fd = _start(msgpack.packb(order, default=wire_fields), state_directory)
    failure: CallError | None = None
    raw = b""
    try:
        raw = _receive(answer_fd, deadline)
    except CallError as error:  # cancelled, or the child does not even end its undoing
        failure = error
        os.kill(child, signal.SIGKILL)
    finally:
        os.close(answer_fd)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if failure is not None:
        raise _ChildLostError.from_wire(failure.to_wire())
    if status != 0:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        text = f"the child that sees to the network {how}"
        raise _ChildLostError("internal", text, step=order.command, object="network")
    answer = Answer.from_wire(msgpack.unpackb(raw), "answer")
    if answer.error is not None:
        refusal = CallError.from_wire(answer.error)
        refusal.has_step = refusal.step is not None  # that of the child stays
        raise refusal
    return answer.result


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


def _start(order: bytes, state_directory: str) -> tuple[int, int]:
    """Start a child; return its pid, and where its answer comes from."""
    fds: list[int] = []
    try:
        fds.append(os.memfd_create("order"))
        os.pwrite(fds[0], order, 0)
        answer_fd, writer = os.pipe2(os.O_CLOEXEC)
        fds += [writer, answer_fd]
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        os.makedirs(state_directory, mode=0o700, exist_ok=True)
        fds.append(os.open(undo_path(state_directory), flags, 0o600))
        path = [entry for entry in sys.path if entry]
        child = os.posix_spawn(
            sys.executable,
            (sys.executable, "-I", "-S", "-c", _START.format(path=path, child=_CHILD)),
            {},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, fds[0], 0),
                (os.POSIX_SPAWN_DUP2, writer, 1),
                (os.POSIX_SPAWN_DUP2, fds[-1], UNDO_FD),
            ],
            setsigmask=(),
        )
        fds.remove(answer_fd)
        return child, answer_fd
    except OSError as error:
        text = f"there can be no child for the network: {error.strerror}"
        raise CallError(
            "resource", text, errno=error.errno, step="start child", object="network"
        ) from None
    finally:
        for fd in fds:
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
