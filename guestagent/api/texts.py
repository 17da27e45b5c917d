"""Devices, scratches and layers as short texts: for a command line, a person's or the kernel's."""

from guestagent.api.devices import (
    ByteRange,
    Device,
    PathDevice,
    PmemDevice,
    ScsiDevice,
    Verity,
    VirtioBlkDevice,
)
from guestagent.api.layers import LayerSpec
from guestagent.api.overlays import DeviceScratch, DirectoryScratch, Scratch, TmpfsScratch

__all__ = ("device_from_text", "layer_from_text", "scratch_from_text")

_LAYER_KEYS = ("id", "offset", "size", "root", "hash_offset", "fs", "preset", "target")


def device_from_text(text: str) -> Device:
    """Read pmem:N, virtio-blk:SERIAL, scsi:CONTROLLER:LUN[:PARTITION] or a path below /dev.

    Raises:
        ValueError: it is none of these, or out of range.
    """
    kind, _, rest = text.partition(":")
    numbers = rest.split(":")
    if text.startswith("/"):
        return PathDevice(path=text)
    if kind == "pmem":
        return PmemDevice(number=_number("pmem", rest))
    if kind == "virtio-blk":
        return VirtioBlkDevice(serial=rest)
    if kind == "scsi" and 2 <= len(numbers) <= 3:
        controller, lun, partition = (*(_number("scsi", n) for n in numbers), 0)[:3]
        return ScsiDevice(controller=controller, lun=lun, partition=partition)
    raise ValueError(
        f"{text!r} is no pmem:N, virtio-blk:SERIAL, scsi:CONTROLLER:LUN[:PARTITION] or /dev/..."
    )


def scratch_from_text(text: str) -> Scratch:
    """Read tmpfs:BYTES, dir:PATH or device:DEVICE[,FILESYSTEM].

    Raises:
        ValueError: it is none of these.
    """
    kind, _, rest = text.partition(":")
    if kind == "tmpfs":
        return TmpfsScratch(size_bytes=_number("tmpfs", rest))
    if kind == "dir":
        return DirectoryScratch(path=rest)
    if kind == "device":
        device, _, filesystem = rest.partition(",")
        return DeviceScratch(device=device_from_text(device), filesystem=filesystem or "ext4")
    raise ValueError(f"scratch {text!r} is no tmpfs:BYTES, dir:PATH or device:DEVICE[,FILESYSTEM]")


def layer_from_text(text: str, default_id: str) -> LayerSpec:
    """Read DEVICE[,KEY=VALUE]... with the keys id, offset, size, root, hash_offset, fs, preset,
    target. ``root`` is the digest in hexadecimal, or ``none`` for a layer that is not verified: an
    absent root would be a guess.

    Raises:
        ValueError: a key is unknown, given twice, missing or malformed.
    """
    device, *words = text.split(",")
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in _LAYER_KEYS or not equals:
            raise ValueError(f"layer {text!r}: {word!r} is none of {', '.join(_LAYER_KEYS)}")
        if key in values:
            raise ValueError(f"layer {text!r}: {key} is given twice")
        values[key] = value
    if "root" not in values:
        raise ValueError(f"layer {text!r}: root=DIGEST is missing (root=none does without verity)")
    return LayerSpec(
        layer_id=values.get("id", default_id),
        device=device_from_text(device),
        mapping=_mapping(text, values),
        verity=_verity(text, values),
        filesystem=values.get("fs", "erofs"),
        target=values.get("target"),
    )


def _mapping(text: str, values: dict[str, str]) -> ByteRange | None:
    if ("offset" in values) != ("size" in values):
        raise ValueError(f"layer {text!r}: offset and size go together")
    if "offset" not in values:
        return None
    return ByteRange(
        offset_bytes=_number("offset", values["offset"]), size_bytes=_number("size", values["size"])
    )


def _verity(text: str, values: dict[str, str]) -> Verity | None:
    root = values["root"]
    if root == "none":
        for key in ("hash_offset", "preset"):
            if key in values:
                raise ValueError(f"layer {text!r}: {key} contradicts root=none")
        return None
    try:
        digest = bytes.fromhex(root)
    except ValueError:
        raise ValueError(f"layer {text!r}: root is no hexadecimal digest") from None
    offset = values.get("hash_offset")
    return Verity(
        root_digest=digest,
        hash_offset_bytes=None if offset is None else _number("hash_offset", offset),
        preset=values.get("preset", "default"),
    )


def _number(name: str, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is no number") from None
