"""Devices, scratches and layers as short texts: for a command line, a person's or the kernel's."""

from guestagent.api.devices import (
    ByteRange,
    Device,
    LabelDevice,
    LayerMapping,
    PathDevice,
    PmemDevice,
    ScsiDevice,
    Verity,
    VirtioBlkDevice,
    VmbusScsiDevice,
)
from guestagent.api.layers import LayerSpec
from guestagent.api.overlays import (
    DeviceScratch,
    DirectoryScratch,
    Scratch,
    ThinScratch,
    TmpfsScratch,
)
from vsock.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = (
    "ROOT_ID",
    "SCRATCH_TEXTS",
    "OverlayText",
    "device_from_text",
    "layer_from_text",
    "mapping_from_text",
    "overlay_from_text",
    "scratch_from_text",
)

#: The id of the overlay that becomes the root, unless the text names another.
ROOT_ID = "root"
#: What defines a hash tree; the root digest vouches for none of it.
_TREE_NUMBERS = ("hash_type", "data_blocks", "data_block_size", "hash_block_size", "hash_offset")
_VERITY_KEYS = ("salt", "algorithm", *_TREE_NUMBERS, "preset", "signature")
#: How a scratch is written, for help texts.
SCRATCH_TEXTS = (
    "tmpfs:BYTES, dir:PATH[,create][,adopt], thin:POOL:BYTES[,FILESYSTEM][,encrypted], "
    "device:DEVICE[,FILESYSTEM][,adopt|fresh][,encrypted][,shared][,discard]"
)
_DEVICE_WORDS = ("adopt", "fresh", "encrypted", "shared", "discard")
_LAYER_KEYS = (
    "id", "offset", "size", "ranges", "root", *_VERITY_KEYS, "fs", "target", "readonly_policy",
    "whiteouts",
)  # fmt: skip


class OverlayText(Record):
    """An overlay of layers that are named beside it: all of them if ``layers`` is empty."""

    overlay_id: str = ROOT_ID
    layers: tuple[str, ...] = ()
    scratch: str | None = None


def device_from_text(text: str) -> Device:
    """Read pmem:N, virtio-blk:SERIAL, label:LABEL, scsi:CONTROLLER:LUN[:PARTITION],
    vmbus:GUID:LUN[:PARTITION] or a path below /dev.

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
    if kind == "label":
        return LabelDevice(label=rest)
    if kind == "scsi" and 2 <= len(numbers) <= 3:
        controller, lun, partition = (*(_number("scsi", n) for n in numbers), 0)[:3]
        return ScsiDevice(controller=controller, lun=lun, partition=partition)
    if kind == "vmbus" and 2 <= len(numbers) <= 3:
        guid, *places = numbers
        lun, partition = (*(_number("vmbus", n) for n in places), 0)[:2]
        return VmbusScsiDevice(guid=guid, lun=lun, partition=partition)
    raise ValueError(
        f"{text!r} is no pmem:N, virtio-blk:SERIAL, label:LABEL, scsi:CONTROLLER:LUN[:PARTITION], "
        "vmbus:GUID:LUN[:PARTITION] or /dev/..."
    )


def scratch_from_text(text: str) -> Scratch:
    """Read tmpfs:BYTES, dir:PATH[,WORD]..., thin:POOL:BYTES[,FILESYSTEM][,encrypted] or
    device:DEVICE[,FILESYSTEM][,WORD]...

    The words of a directory are ``create`` and ``adopt``; those of a device ``adopt`` or ``fresh``,
    ``encrypted``, ``shared`` and ``discard``. A blank device is formatted; ``adopt`` uses what is
    there, ``fresh`` replaces it.

    Raises:
        ValueError: it is none of these, or a word is given twice.
    """
    kind, _, rest = text.partition(":")
    place, *words = rest.split(",")
    if kind == "tmpfs" and not words:
        return TmpfsScratch(size_bytes=_number("tmpfs", rest))
    if kind == "thin":
        pool_id, _, size = place.partition(":")
        filesystem = words.pop(0) if words and words[0] != "encrypted" else "ext4"
        found = _take_words(text, words, ("encrypted",))
        return ThinScratch(
            pool_id=pool_id,
            size_bytes=_number("thin", size),
            filesystem=filesystem,
            encrypted="encrypted" in found,
        )
    if kind == "dir":
        found = _take_words(text, words, ("create", "adopt"))
        existing = "adopt" if "adopt" in found else "refuse"
        return DirectoryScratch(path=place, existing=existing, create="create" in found)
    if kind == "device":
        filesystem = words.pop(0) if words and words[0] not in _DEVICE_WORDS else "ext4"
        found = _take_words(text, words, _DEVICE_WORDS)
        if found >= {"adopt", "fresh"}:
            raise ValueError(f"scratch {text!r}: adopt and fresh contradict each other")
        return DeviceScratch(
            device=device_from_text(place),
            filesystem=filesystem,
            ensure_filesystem=True,
            existing=next((word for word in ("adopt", "fresh") if word in found), "refuse"),
            encrypted="encrypted" in found,
            shared="shared" in found,
            discard="discard" in found,
        )
    raise ValueError(f"scratch {text!r} is none of {SCRATCH_TEXTS}")


def _take_words(text: str, words: list[str], known: tuple[str, ...]) -> set[str]:
    for word in words:
        if word not in known:
            raise ValueError(f"scratch {text!r}: {word!r} is none of {', '.join(known)}")
    found = set(words)
    if len(found) < len(words):
        raise ValueError(f"scratch {text!r}: a word is given twice")
    return found


def layer_from_text(
    text: str, default_id: str, read_signature: "Callable[[str], bytes] | None" = None
) -> LayerSpec:
    """Read DEVICE[,KEY=VALUE]... with the keys id, offset, size, root, fs, preset, target,
    readonly_policy, whiteouts, and for the hash tree salt (``-`` is none), algorithm, hash_type,
    data_blocks, data_block_size, hash_block_size, hash_offset. In place of offset and size,
    ``ranges`` has several ranges, as ``mapping_from_text`` reads them. ``root`` is the digest in
    hexadecimal, or ``none`` for a layer that is not verified: an absent root would be a guess.
    ``signature`` is the path of a file with the signature of the root digest, which
    ``read_signature`` reads; without it the key is refused.

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
        verity=_verity(text, values, read_signature),
        filesystem=values.get("fs", "erofs"),
        target=values.get("target"),
        readonly_policy=values.get("readonly_policy", "read"),
        whiteouts=values.get("whiteouts"),
    )


def overlay_from_text(text: str) -> OverlayText:
    """Read ID[,layers=A+B][,scratch=SCRATCH]; the scratch comes last, as it may hold commas.

    Raises:
        ValueError: a word is unknown, or given twice.
    """
    overlay_id, *words = text.split(",")
    layers: tuple[str, ...] = ()
    scratch: str | None = None
    for index, word in enumerate(words):
        key, equals, value = word.partition("=")
        if key == "layers" and equals and not layers:
            layers = tuple(value.split("+"))
        elif key == "scratch" and equals:
            scratch = ",".join([value, *words[index + 1 :]])
            scratch_from_text(scratch)
            break
        else:
            raise ValueError(f"overlay {text!r}: {word!r} is no layers=A+B or scratch=SCRATCH")
    return OverlayText(overlay_id=overlay_id or ROOT_ID, layers=layers, scratch=scratch)


def mapping_from_text(text: str) -> tuple[ByteRange, ...]:
    """Read OFFSET+SIZE[:OFFSET+SIZE]..., in bytes.

    Raises:
        ValueError: a range is malformed, or none that a layer may have.
    """
    parts = []
    for number, word in enumerate(text.split(":")):
        offset, plus, size = word.partition("+")
        if not plus:
            raise ValueError(f"range {number}: expected OFFSET+SIZE in bytes, got {word!r}")
        offset_bytes, size_bytes = _number("offset", offset), _number("size", size)
        parts.append(ByteRange(offset_bytes=offset_bytes, size_bytes=size_bytes))
    return tuple(parts)


def _mapping(text: str, values: dict[str, str]) -> LayerMapping | None:
    if ("offset" in values) != ("size" in values):
        raise ValueError(f"layer {text!r}: offset and size go together")
    if "ranges" in values:
        if "offset" in values:
            raise ValueError(f"layer {text!r}: ranges contradicts offset and size")
        return mapping_from_text(values["ranges"])
    if "offset" not in values:
        return None
    return ByteRange(
        offset_bytes=_number("offset", values["offset"]), size_bytes=_number("size", values["size"])
    )


def _verity(
    text: str, values: dict[str, str], read_signature: "Callable[[str], bytes] | None"
) -> Verity | None:
    root = values["root"]
    if root == "none":
        for key in _VERITY_KEYS:
            if key in values:
                raise ValueError(f"layer {text!r}: {key} contradicts root=none")
        return None
    numbers = {name: _number(name, values[name]) for name in _TREE_NUMBERS if name in values}
    salt, signature = values.get("salt"), None
    if "signature" in values:
        if read_signature is None:
            raise ValueError(f"layer {text!r}: no signature is read here")
        signature = read_signature(values["signature"])
    return Verity(
        root_digest=_bytes(text, "root", root),
        salt=None if salt is None else _bytes(text, "salt", salt.removeprefix("-")),
        algorithm=values.get("algorithm"),
        hash_type=numbers.get("hash_type"),
        data_blocks=numbers.get("data_blocks"),
        data_block_size=numbers.get("data_block_size"),
        hash_block_size=numbers.get("hash_block_size"),
        hash_offset_bytes=numbers.get("hash_offset"),
        preset=values.get("preset", "default"),
        signature=signature,
    )


def _bytes(text: str, name: str, value: str) -> bytes:
    try:
        if not value.isalnum() and value:  # fromhex() takes spaces, too
            raise ValueError(value)
        return bytes.fromhex(value)
    except ValueError:
        raise ValueError(f"layer {text!r}: {name} is not hexadecimal") from None


def _number(name: str, text: str) -> int:
    # int() also takes signs, spaces, underscores and other scripts
    digits = text[2:] if text[:2] in ("0x", "0X") else text
    if not (digits.isascii() and digits.isalnum()):
        raise ValueError(f"{name}: {text!r} is no number")
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(f"{name}: {text!r} is no number") from None
