"""The child that does one request for the network and ends, and with it what it has imported.

It reads an order from standard input and writes an answer to standard output, each as one
MessagePack map; descriptor 3 is the undo file.
"""

import ctypes
import os
import signal

import msgpack

from guestagent.api.net import NetConfigure
from guestagent.engine.faults import Faults
from guestagent.engine.transaction import Transaction
from guestagent.net.network import UNDO_FD, Answer, Order
from guestagent.net.undofile import UndoFile
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record, wire_fields

__all__ = ("main",)

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def main() -> None:
    """Do what standard input orders."""
    with open(0, "rb", closefd=False) as stream:
        order = Order.from_wire(msgpack.unpackb(stream.read()), "order")
    # without an agent nothing would take its answer; the next agent restores what was there
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != order.agent_pid:  # it has died before
        os._exit(1)
    with Deadline(order.seconds) as deadline, UndoFile(UNDO_FD) as undo_file:
        try:
            answer = Answer(result=_do(order, undo_file, deadline).to_wire())
        except CallError as error:
            answer = Answer(error=error.to_wire())
        except OSError as error:
            failed = CallError("device", f"network: {error.strerror or error}", errno=error.errno)
            answer = Answer(error=failed.to_wire())
    with open(1, "wb", closefd=False) as stream:
        stream.write(msgpack.packb(answer, default=wire_fields))
    os._exit(0)  # nothing is left to be put in order, which would take longer than the work


def _do(order: Order, undo_file: UndoFile, deadline: Deadline) -> Record:
    from guestagent.net.changes import restore
    from guestagent.net.configure import configure, list_network

    if order.command == "list":
        return list_network(deadline)
    if order.command == "restore":
        restore(undo_file, deadline)
        return Answer()
    op = Transaction(deadline, faults=Faults.parse(order.faults))
    return configure(order.request or NetConfigure(), op, undo_file, root=order.root)
