"""One stream as the device holds it: the connection's numbers, and the host's end of it."""

from dataclasses import dataclass

from vsock.device.connections import Connection, State
from vsock.device.hybrid import HostStream
from vsock.loop import Timer

__all__ = ("Limits", "Line")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one guest may use, and how long each side may take."""

    connections: int = 1023
    buffer_bytes: int = 256 * 1024
    handshake_seconds: float = 2.0
    answer_seconds: float = 10.0
    close_seconds: float = 8.0

    def __post_init__(self) -> None:
        if self.connections < 1 or not 4096 <= self.buffer_bytes <= 1 << 30:
            raise ValueError(f"limits out of range: {self}")
        if min(self.handshake_seconds, self.answer_seconds, self.close_seconds) <= 0:
            raise ValueError(f"limits out of range: {self}")


class Line(Connection):
    """A connection with the host's end of it."""

    __slots__ = ("deadline", "redial", "stream")

    def __init__(self, *, host_port: int, guest_port: int, state: State, buffer_bytes: int) -> None:
        super().__init__(
            host_port=host_port, guest_port=guest_port, state=state, buffer_bytes=buffer_bytes
        )
        self.stream: HostStream | None = None
        self.deadline: Timer | None = None
        self.redial: Timer | None = None
