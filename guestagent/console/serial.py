"""Finding the device of a serial line by the name that a person knows it by."""

import errno
import os

__all__ = ("find_device", "line_term")

_NAMED = "/dev/virtio-ports/"
#: What init finds in its environment unless the command line says otherwise (init/main.c,
#: envp_init): it means the kernel's own screen.
_SCREEN_TERM = "linux"
#: PORT_UNKNOWN of linux/serial_core.h: the kernel makes nodes for UARTs that it might yet find.
_NO_UART = "0"


def line_term(term: str) -> str:
    """Return what is known of the terminal at the end of a line, where TERM here is ``term``."""
    return "dumb" if term in ("", _SCREEN_TERM) else term


def find_device(path: str, *, sys_root: str = "/sys") -> str:
    """Return the node of a serial line.

    ``/dev/virtio-ports/NAME`` is made by udev, of which a boot image has none; then the kernel is
    asked which port has that name (drivers/char/virtio_console.c, attribute ``name``). A name of
    the kernel's own, and one that is not known, is returned as it is.

    Raises:
        OSError: ENXIO, the node is there but no UART behind it. It could be opened all the same,
            and every read would fail.
    """
    if _uart_type(path, sys_root) == _NO_UART:
        raise OSError(errno.ENXIO, "no UART is there", path)
    if not path.startswith(_NAMED) or os.path.exists(path):
        return path
    wanted = path[len(_NAMED) :]
    directory = f"{sys_root}/class/virtio-ports"
    try:
        ports = sorted(os.listdir(directory))
    except OSError:  # no virtio-serial device
        return path
    for port in ports:
        try:
            with open(f"{directory}/{port}/name", encoding="utf-8", errors="replace") as stream:
                if stream.read().strip() == wanted:
                    return f"/dev/{port}"
        except OSError:  # a port without a name
            continue
    return path


def _uart_type(path: str, sys_root: str) -> str | None:
    """Return the kernel's number for the kind of a UART, None for what is none."""
    name = os.path.basename(os.path.realpath(path))
    try:
        with open(f"{sys_root}/class/tty/{name}/type", encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return None
