"""A client of QMP, the control protocol of QEMU: commands, and events with a deadline.

Source: docs/interop/qmp-spec.txt (QEMU 7.2).
"""

import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from vsock.closeable import Closeable
from vsock.deadline import Deadline

__all__ = ("QmpClient", "QmpClosedError", "QmpError")

_CHUNK_BYTES = 64 * 1024


class QmpError(Exception):
    """QEMU refused a command. ``kind`` is its class of error."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"{command}: {description} ({kind})")
        self.command = command
        self.kind = kind


class QmpClosedError(QmpError):
    """The connection has ended, which means that QEMU has."""

    def __init__(self, command: str) -> None:
        super().__init__(command, "closed", "QEMU closed the connection")


class QmpClient(Closeable):
    """One connection to one machine, for use by one thread. A context manager."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over ``connection``; ``open`` is the usual way to get here."""
        self._connection = connection
        self._connection.setblocking(False)
        self._buffer = b""
        self._events: deque[dict[str, object]] = deque()
        self._next_id = 0

    @classmethod
    def open(cls, path: Path, deadline: Deadline) -> Self:
        """Connect to the socket ``path`` and agree on capabilities.

        Raises:
            OSError: there is no listener.
            CallError: ``timeout`` or ``cancelled``.
            QmpError: QEMU closed the connection.
        """
        connection = socket.socket(socket.AF_UNIX)
        with contextlib.ExitStack() as stack:
            stack.callback(connection.close)
            connection.connect(str(path))
            client = cls(connection)
            while "QMP" not in client._receive("greeting", deadline):
                pass
            client.execute("qmp_capabilities", deadline=deadline)
            stack.pop_all()
        return client

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._connection.close()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        deadline: Deadline,
    ) -> object:
        """Run a command and return what it returns.

        Raises:
            QmpError: QEMU refused it.
            QmpClosedError: QEMU ended.
            CallError: ``timeout`` or ``cancelled``.
        """
        self._next_id += 1
        message = {"execute": command, "arguments": dict(arguments or {}), "id": self._next_id}
        self._send(command, json.dumps(message).encode() + b"\r\n")
        while True:
            answer = self._receive(command, deadline)
            if "event" in answer:
                self._events.append(answer)
            elif answer.get("id") == self._next_id:
                return _result(command, answer)

    def wait_event(
        self, name: str, deadline: Deadline, *, data: Mapping[str, object] | None = None
    ) -> dict[str, object]:
        """Return the data of the next event ``name`` whose data contains ``data``.

        Events that came since the last call count; those passed over are dropped.

        Raises:
            QmpClosedError: QEMU ended.
            CallError: ``timeout`` or ``cancelled``.
        """
        while True:
            event = self._events.popleft() if self._events else self._receive(name, deadline)
            found = event.get("data", {})
            if event.get("event") != name or not isinstance(found, dict):
                continue
            if all(found.get(key) == value for key, value in (data or {}).items()):
                return found

    def _send(self, command: str, data: bytes) -> None:
        # a command is far smaller than the socket's buffer, and QEMU reads at once
        try:
            self._connection.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            raise QmpClosedError(command) from None

    def _receive(self, step: str, deadline: Deadline) -> dict[str, object]:
        while b"\n" not in self._buffer:
            deadline.wait([self._connection.fileno()], f"QMP: {step}")
            try:
                data = os.read(self._connection.fileno(), _CHUNK_BYTES)
            except ConnectionResetError:
                data = b""
            if not data:
                raise QmpClosedError(step)
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message = json.loads(line)
        assert isinstance(message, dict)
        return message


def _result(command: str, answer: Mapping[str, object]) -> object:
    error = answer.get("error")
    if isinstance(error, Mapping):
        raise QmpError(command, str(error.get("class")), str(error.get("desc")))
    return answer.get("return")
