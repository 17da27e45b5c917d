"""The guest's half of the wire tests: a server on AF_VSOCK, in User Mode Linux, driven by calls."""

import os
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
VENV = PROJECT / f".cache/venv/lib/python3.{sys.version_info[1]}/site-packages"
sys.path[:0] = [str(PROJECT), str(VENV)]

from vsock.address import parse_address  # noqa: E402
from vsock.deadline import Deadline  # noqa: E402
from vsock.dial import dial, listen  # noqa: E402
from vsock.errors import CallError  # noqa: E402
from vsock.server import Call, Outcome, Server  # noqa: E402

PORT = 5000
CONTROL = 900


def handle(call: Call) -> Outcome:
    if call.method == "echo":
        return Outcome(None, call.params)
    if call.method == "wait":
        call.deadline.wait((), "wait")
    if call.method == "cancel":
        return Outcome(None, call.connection.cancel(call.params["msgid"]))
    if call.method == "peer":
        return Outcome(None, call.connection.peer)
    if call.method == "dial":
        return Outcome(None, dialled(str(call.params["address"]), call.params["seconds"]))
    if call.method == "offer":
        server.add_stream(dial(parse_address(str(call.params["address"])), call.deadline))
        return Outcome(None, None)
    raise CallError("unsupported", call.method)


def dialled(address: str, seconds: float) -> str:
    """Return what a dial ended with, by name."""
    deadline = Deadline(seconds)
    try:
        with dial(parse_address(address), deadline) as stream:
            stream.sendall(b"x" * 100_000, deadline)
            return "connected"
    except OSError as error:
        return os.strerror(error.errno or 0)
    except CallError as error:
        return error.code
    finally:
        deadline.close()


server = Server(handle, quick=frozenset({"echo", "cancel", "peer"}), hello_seconds=None)

if __name__ == "__main__":
    server.add_listener(listen(parse_address(f"vsock://any:{PORT}")))
    with dial(parse_address(f"vsock://host:{CONTROL}"), Deadline(60)) as control:
        control.sendall(b"ready\n", Deadline(60))
        server.serve_forever()
