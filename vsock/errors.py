"""Errors of the wire: what the peer did, what we did, and what a call answered.

The wire form of a failed call is one map (see ``CallError.to_wire``). The codes are stable tokens:
a caller decides by the code, a person reads the message, no program parses the message.
"""

import errno as errno_module
from collections.abc import Mapping

__all__ = (
    "CODES",
    "CallError",
    "ConnectionClosed",
    "LocalProtocolError",
    "ProtocolError",
    "RemoteProtocolError",
    "RpcError",
    "errno_name",
)

#: Every code that an error reply may carry.
CODES = (
    "invalid",
    "unsupported",
    "not_found",
    "conflict",
    "busy",
    "denied",
    "integrity",
    "timeout",
    "cancelled",
    "device",
    "mount",
    "resource",
    "internal",
)

#: The form of a code that a newer peer may send.
_CODE = frozenset("abcdefghijklmnopqrstuvwxyz_")
_MAX_CODE = 64
_MAX_TEXT_BYTES = 64 * 1024
#: A lone surrogate travels as six letters, everything else in less.
_MAX_CHARACTER_BYTES = 6


class RpcError(Exception):
    """Base of everything that this package raises on purpose."""


class ProtocolError(RpcError):
    """The rules of the wire were broken; see the two subclasses for by whom."""


class LocalProtocolError(ProtocolError):
    """Our side tried to send what the rules forbid. Nothing was sent; the connection lives."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the rules forbid.

    ``msgid`` is that of the offending request where it could be read, so that it can be answered;
    ``fatal`` says that framing is lost and the connection must end.
    """

    def __init__(self, message: str, *, msgid: int | None = None, fatal: bool = False) -> None:
        super().__init__(message)
        self.msgid = msgid
        self.fatal = fatal


class ConnectionClosed(RpcError):
    """The connection ended, by either side, before the answer came."""


class CallError(RpcError):
    """A call failed: raised by a handler to answer so, and by a client that got that answer.

    ``errno`` is the number on this machine or None; it travels by name, because numbers differ
    between architectures. ``step`` is what was being done, ``object`` what it was done to.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        errno: int | None = None,
        step: str | None = None,
        object: str | None = None,
        hint: str | None = None,
        kernel_log: tuple[str, ...] = (),
    ) -> None:
        if code not in CODES:
            raise ValueError(f"unknown error code {code!r}")
        super().__init__(message)
        self.code = code
        self.message = message
        self.errno = errno
        self.step = step
        self.object = object
        self.hint = hint
        self.kernel_log = kernel_log
        #: Set once the step that failed is known; steps around it then do not overwrite ``step``.
        self.has_step = False

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    def __reduce__(self) -> "tuple[type, tuple[str, str], dict[str, object]]":
        """Let copies be made, by pickle too, which makes an exception from its positional
        arguments and then sets its attributes."""
        return type(self), ("internal", self.message), dict(vars(self))

    def to_wire(self) -> dict[str, object]:
        """Return the error map of the contract, each text cut to 64 KiB."""
        return {
            "code": self.code,
            "message": _cut(self.message),
            "errno": errno_name(self.errno),
            "step": _cut(self.step),
            "object": _cut(self.object),
            "hint": _cut(self.hint),
            "kernel_log": [line[:1024] for line in self.kernel_log[-32:]],
        }

    @classmethod
    def from_wire(cls, value: object) -> "CallError":
        """Read an error map leniently: a peer's odd error must still reach the caller.

        A code that is not in ``CODES`` is kept where it is a word: the peer may be newer.
        """
        if not isinstance(value, Mapping):
            return cls("internal", f"the peer answered with an error that is no map: {value!r}")
        code = value.get("code")
        name = value.get("errno")
        log = value.get("kernel_log")
        error = cls(
            "internal",
            str(value.get("message", "")),
            errno=_errno_number(name),
            step=_text(value.get("step")),
            object=_text(value.get("object")),
            hint=_text(value.get("hint")),
            kernel_log=tuple(str(line) for line in log) if isinstance(log, (list, tuple)) else (),
        )
        if isinstance(code, str) and 0 < len(code) <= _MAX_CODE and _CODE.issuperset(code):
            error.code = code  # of a newer peer perhaps
        return error


def errno_name(number: int | None) -> str | None:
    """Return the symbolic name of an errno (``EBUSY``), or None for None."""
    if number is None:
        return None
    return errno_module.errorcode.get(number, f"E{number}")


def _errno_number(name: object) -> int | None:
    # the module holds more than numbers, and the name is a peer's
    number = vars(errno_module).get(name) if isinstance(name, str) else None
    return number if isinstance(number, int) else None


def _cut(text: str | None) -> str | None:
    if text is None or len(text) * _MAX_CHARACTER_BYTES <= _MAX_TEXT_BYTES:
        return text
    return text.encode("utf-8", "backslashreplace")[:_MAX_TEXT_BYTES].decode("utf-8", "ignore")


def _text(value: object) -> str | None:
    return None if value is None else str(value)
