"""Finding the device of a serial line by the name that a person knows it by."""

import os

__all__ = ("find_device",)

_NAMED = "/dev/virtio-ports/"


def find_device(path: str, *, sys_root: str = "/sys") -> str:
    """Return the node of a serial line.

    ``/dev/virtio-ports/NAME`` is made by udev, of which a boot image has none; then the kernel is
    asked which port has that name (drivers/char/virtio_console.c, attribute ``name``). A name of
    the kernel's own, and one that is not known, is returned as it is.
    """
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
