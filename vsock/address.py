"""Where a byte stream begins or ends, as text and as checked values.

    vsock://CID:PORT         AF_VSOCK; CID a number, ``host`` (2), ``local`` (1) or ``any``
    unix:///path             a Unix stream socket; ``unix://@name`` is an abstract one
    hybrid:///path:PORT      AF_VSOCK of a guest, reached through the Unix socket of its VMM
    serial:///dev/...        a character device: a virtio-serial port or a tty

``str()`` of an address is its text, and ``parse_address`` of that text is the same address.
"""

from vsock.record import Record

__all__ = (
    "Address",
    "HybridAddress",
    "SerialAddress",
    "UnixAddress",
    "VsockAddress",
    "parse_address",
    "parse_cid",
)

# include/uapi/linux/vm_sockets.h
VMADDR_CID_ANY = 0xFFFFFFFF
VMADDR_CID_HYPERVISOR = 0
VMADDR_CID_LOCAL = 1
VMADDR_CID_HOST = 2
VMADDR_PORT_ANY = 0xFFFFFFFF

_CID_NAMES = {"any": None, "-1": None, "host": VMADDR_CID_HOST, "local": VMADDR_CID_LOCAL}
#: sizeof(sockaddr_un.sun_path) is 108 with the closing NUL.
_MAX_SOCKET_PATH_BYTES = 107
_MAX_DEVICE_PATH_BYTES = 4095


class VsockAddress(Record):
    """An AF_VSOCK address; ``cid`` None listens on every CID and cannot be dialled."""

    cid: int | None
    port: int

    def check(self) -> None:
        if self.cid == VMADDR_CID_HYPERVISOR:
            raise ValueError("CID 0 is reserved for the hypervisor")
        if self.cid is not None and not 0 < self.cid < VMADDR_CID_ANY:
            raise ValueError(f"CID {self.cid} is outside of 1..{VMADDR_CID_ANY - 1}")
        _check_port(self.port)

    def __str__(self) -> str:
        return f"vsock://{'any' if self.cid is None else self.cid}:{self.port}"


class UnixAddress(Record):
    """A Unix stream socket; a leading ``@`` means the abstract name space."""

    path: str

    def check(self) -> None:
        if not self.path.startswith(("/", "@")) or self.path == "@":
            raise ValueError(f"socket path {self.path!r} is neither absolute nor @name")
        _check_path(self.path, _MAX_SOCKET_PATH_BYTES)

    def __str__(self) -> str:
        return f"unix://{self.path}"


class HybridAddress(Record):
    """Port ``port`` of the guest whose VMM serves the Unix socket ``path``.

    Dialled, it is reached through ``path``; listened on, it is the Unix socket ``path_port`` that
    the VMM connects to when the guest dials the host.
    """

    path: str
    port: int

    def check(self) -> None:
        if not self.path.startswith("/"):
            raise ValueError(f"socket path {self.path!r} is not absolute")
        _check_port(self.port)
        _check_path(f"{self.path}_{self.port}", _MAX_SOCKET_PATH_BYTES)

    @property
    def listen_path(self) -> str:
        return f"{self.path}_{self.port}"

    def __str__(self) -> str:
        return f"hybrid://{self.path}:{self.port}"


class SerialAddress(Record):
    """A character device that carries one stream at a time."""

    path: str

    def check(self) -> None:
        if not self.path.startswith("/"):
            raise ValueError(f"device path {self.path!r} is not absolute")
        _check_path(self.path, _MAX_DEVICE_PATH_BYTES)

    def __str__(self) -> str:
        return f"serial://{self.path}"


Address = VsockAddress | UnixAddress | HybridAddress | SerialAddress


def parse_address(text: str) -> Address:
    """Read an address.

    Raises:
        ValueError: names the text and what is wrong with it.
    """
    scheme, separator, rest = text.partition("://")
    try:
        if separator and scheme == "unix":
            return UnixAddress(path=rest)
        if separator and scheme == "serial":
            return SerialAddress(path=rest)
        if separator and scheme == "vsock":
            cid, port = _split_port(rest)
            return VsockAddress(cid=parse_cid(cid), port=port)
        if separator and scheme == "hybrid":
            path, port = _split_port(rest)
            return HybridAddress(path=path, port=port)
        raise ValueError("expected vsock://CID:PORT, unix:///P, hybrid:///P:PORT or serial:///P")
    except ValueError as problem:
        raise ValueError(f"address {text!r}: {problem}") from None


def _split_port(text: str) -> tuple[str, int]:
    head, separator, port = text.rpartition(":")
    if not separator:
        raise ValueError("the port is missing")
    return head, _parse_number(port, "port")


def parse_cid(text: str) -> int | None:
    """Read a CID: a number, ``host``, ``local``, or ``any``, which is None.

    Raises:
        ValueError: the text is none of these.
    """
    return _CID_NAMES[text] if text in _CID_NAMES else _parse_number(text, "CID")


def _parse_number(text: str, name: str) -> int:
    # int() takes signs, spaces, underscores and other scripts; an address is plainer than that
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise ValueError(f"{name} {text!r} is not a 32-bit number")
    return int(text)


def _check_port(port: int) -> None:
    if not 0 <= port < VMADDR_PORT_ANY:
        raise ValueError(f"port {port} is outside of 0..{VMADDR_PORT_ANY - 1}")


def _check_path(path: str, max_bytes: int) -> None:
    if "\0" in path:
        raise ValueError(f"path {path!r} holds a NUL")
    length_bytes = len(path.encode("utf-8", "surrogateescape"))
    if length_bytes > max_bytes:
        raise ValueError(f"path {path!r} is longer than {max_bytes} bytes")
