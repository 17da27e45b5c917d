"""The reference tables of the documentation, made from the code that they describe."""

import re
import types
from collections.abc import Callable, Iterable

from guestagent.api import (
    METHODS,
    agent,
    devices,
    devtree,
    inspect,
    layers,
    net,
    observe,
    overlays,
    policy,
    share,
    thin,
)
from guestagent.api.agent import EVENT_KINDS, FEATURES
from guestagent.api.devices import VERITY_PRESETS
from guestagent.config import KEYS, PREFIX, Config
from guestagent.engine.plan import PRESETS
from guestagent.observe.metrics import FAMILIES
from vsock.errors import CODES
from vsock.record import Record, RecordType

__all__ = ("CHOICES", "SECTIONS", "update")

_MEANING = {
    "invalid": "the request can never work as it is; a field is wrong, the error names it",
    "unsupported": "this agent, kernel or device cannot do it",
    "not_found": "there is nothing of that id or name",
    "conflict": "the id, target or scratch is taken by something else",
    "busy": "it is in use; the hint names the holders; try again later",
    "denied": "a rule forbids it, or the kernel does; never try again as it is",
    "integrity": "what is there is not what the digest says",
    "timeout": "the deadline passed; what had been made is undone",
    "cancelled": "`agent.cancel` came; what had been made is undone",
    "device": "a device failed or a device-mapper step did",
    "mount": "the kernel refused a mount or the file system is damaged",
    "resource": "a limit was reached: memory, space, descriptors, requests, bytes",
    "internal": "a bug of the agent; its log has the details",
}

#: What an option of dm-verity does, Documentation/admin-guide/device-mapper/verity.rst.
_VERITY_OPTIONS = {
    "panic_on_corruption": "a corrupt block panics the kernel; otherwise its read fails with EIO",
    "panic_on_error": "an error of the device panics the kernel, too",
    "try_verify_in_tasklet": "hash in a softirq where possible, without a hand-over to a worker",
    "ignore_zero_blocks": "blocks whose hash is that of zeros are not read, but answered as zeros",
}

#: Name of a constant of the contract -> the fields that take one of its values, and the values.
CHOICES: dict[str, tuple[str, Iterable[str]]] = {
    "FILESYSTEMS": (
        "`filesystem` of LayerSpec; `auto` goes by the magic number",
        layers.FILESYSTEMS,
    ),
    "MOUNT_OPTIONS": (
        "`options` of LayerSpec, beside `ro`, `nodev` and `nosuid`, which always hold",
        layers.MOUNT_OPTIONS,
    ),
    "READONLY_POLICIES": ("`readonly_policy` of LayerSpec", layers.READONLY_POLICIES),
    "WHITEOUT_KINDS": ("`whiteouts` of LayerSpec", layers.WHITEOUT_KINDS),
    "VERITY_PRESETS": ("`preset` of Verity", VERITY_PRESETS),
    "SCRATCH_FILESYSTEMS": ("`filesystem` of DeviceScratch", overlays.SCRATCH_FILESYSTEMS),
    "DEVICE_EXISTING": ("`existing` of DeviceScratch", overlays.DEVICE_EXISTING),
    "DIRECTORY_EXISTING": ("`existing` of DirectoryScratch", overlays.DIRECTORY_EXISTING),
    "METACOPY": ("`metacopy` of OverlayOptions", overlays.METACOPY),
    "REDIRECT_DIR": ("`redirect_dir` of OverlayOptions", overlays.REDIRECT_DIR),
    "XINO": ("`xino` of OverlayOptions", overlays.XINO),
    "PRESERVED": ("`preserve` of DevCreate", devtree.PRESERVED),
    "MISSING": ("`missing` of DevAdd, DevClosure and DevRemove", devtree.MISSING),
    "STRATEGIES": ("`strategy` of DevAdd and DevClosure", devtree.STRATEGIES),
    "SHUTDOWN_MODES": ("`mode` of AgentShutdown", agent.SHUTDOWN_MODES),
    "LOG_LEVELS": ("`level` of AgentLog and LogLine", observe.LOG_LEVELS),
    "CRASH_KINDS": ("`kind` of CrashReport", observe.CRASH_KINDS),
    "CHECKSUM_ALGORITHMS": (
        "`algorithm` of FsChecksum, FsChecksums and FsChecksumDevice",
        inspect.CHECKSUM_ALGORITHMS,
    ),
    "SHARE_KINDS": ("`kind` of ShareMount", share.SHARE_KINDS),
    "ADOPT": ("`adopt` of PoolOpen", thin.ADOPT),
    "ON_FULL": ("`on_full` of PoolOpen", thin.ON_FULL),
    "POOL_MODES": ("`mode` of PoolReport", thin.POOL_MODES),
    "FAMILIES": ("`family` of Rule and RuleReport", net.FAMILIES),
    "ACL_KINDS": ("`acl` of FsAclGetFile", inspect.ACL_KINDS),
}
#: The same, of what is told apart in another way than by a constant.
_MORE_CHOICES: tuple[tuple[str, Iterable[str]], ...] = (
    ("`algorithm` of Verity; `sha1` with `allow_sha1` only", devices.DIGEST_BYTES),
    ("`kind` of a device", [str(cls._fields["kind"][1]) for cls in devices.Device.__args__]),
    ("`kind` of a scratch", [str(cls._fields["kind"][1]) for cls in overlays.Scratch.__args__]),
    ("`state` of PolicyReply", policy.POLICY_STATES),
    ("`kind` of StatReply, DirectoryEntry, FoundEntry, Checksum and FsFind", inspect.ENTRY_TYPES),
)


def methods() -> str:
    """Return the table of methods."""
    lines = ["| method | parameters | result | |", "|---|---|---|---|"]
    for name, request in METHODS.items():
        fields = _field_class(request)
        parameters = "" if fields is None else _link(fields.__name__)
        reply = _link(request.reply.__name__) if request.reply._fields else ""
        lines.append(f"| `{name}` | {parameters} | {reply} | {_code(request.summary)} |")
    return "\n".join(lines)


def records() -> str:
    """Return a section for each record that a request or a reply can hold, in order of use."""
    found: dict[str, type[Record]] = {}
    for request in METHODS.values():
        fields = _field_class(request)
        if fields is not None:
            _collect(fields, found)
        if request.reply._fields:
            _collect(request.reply, found)
    return "\n\n".join(_record(record) for record in found.values())


def error_codes() -> str:
    """Return the table of error codes."""
    lines = ["| code | what it means to a caller |", "|---|---|"]
    lines += [f"| `{code}` | {_MEANING[code]} |" for code in CODES]
    return "\n".join(lines)


def readonly_policies() -> str:
    """Return the table of what becomes of a layer on a writable device."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in layers.READONLY_POLICIES.items()]
    return "\n".join(["| policy | on a device that is writable |", "|---|---|", *rows])


def event_kinds() -> str:
    """Return the table of events."""
    rows = [f"| `{kind}` | {meaning} |" for kind, meaning in EVENT_KINDS.items()]
    return "\n".join(["| kind | what happened |", "|---|---|", *rows])


def features() -> str:
    """Return the table of features that hello may tell."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in FEATURES.items()]
    return "\n".join(["| feature | what the agent and its kernel can do |", "|---|---|", *rows])


def presets() -> str:
    """Return the table of verity presets: the options that each asks of the kernel."""
    lines = ["| preset | option | since verity target | |", "|---|---|---|---|"]
    for preset in VERITY_PRESETS:
        if not PRESETS[preset]:
            lines.append(f"| `{preset}` | none | | the kernel's own behaviour |")
        for option, since in PRESETS[preset]:
            version = ".".join(map(str, since))
            lines.append(f"| `{preset}` | `{option}` | {version} | {_VERITY_OPTIONS[option]} |")
    return "\n".join(lines)


def choices() -> str:
    """Return the table of fields that take one of a few values."""
    rows = [
        f"| {where} | {', '.join(f'`{value}`' for value in values)} |"
        for where, values in (*CHOICES.values(), *_MORE_CHOICES)
    ]
    return "\n".join(["| field | values |", "|---|---|", *rows])


def settings() -> str:
    """Return the table of settings, as on a kernel command line."""
    lines = ["| setting | default | |", "|---|---|---|"]
    defaults = Config()
    for key in KEYS:
        value = getattr(defaults, key.field)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        shown = {True: "1", False: "0"}.get(shown, shown) if isinstance(shown, bool) else shown
        guard = "; a wrong value stops the boot" if key.guards_security else ""
        default = f"`{shown}`" if shown != "" else ""
        lines.append(f"| `{PREFIX}{key.name}=` | {default} | {key.summary}{guard} |")
    return "\n".join(lines)


def console_commands() -> str:
    """Return a table of the console's commands for each group of them."""
    from guestagent.console.commands import GROUPS

    tables = []
    for group in GROUPS:
        rows = [
            f"| `{command.usage.replace('|', chr(92) + '|')}` | {command.summary} |"
            for command in group.commands.values()
        ]
        tables.append("\n".join([f"| {group.title} | |", "|---|---|", *rows]))
    return "\n\n".join(tables).replace("\\xNN", "`\\xNN`").replace("* and ?", "`*` and `?`")


def console_frames() -> str:
    """Return the table of the console's frames."""
    from guestagent.api.console import FRAME_TYPES, FROM_AGENT, FROM_CLIENT

    lines = ["| type | frame | from | payload | |", "|---|---|---|---|---|"]
    for number, frame in FRAME_TYPES.items():
        sides = [
            name
            for name, frames in (("client", FROM_CLIENT), ("agent", FROM_AGENT))
            if frame in frames
        ]
        lines.append(
            f"| {number:#04x} | {frame.__name__} | {', '.join(sides)} | {_payload(frame)} "
            f"| {_prose(frame)} |"
        )
    return "\n".join(lines)


def _payload(frame: type[Record]) -> str:
    if not frame._fields:
        return "none"
    if tuple(frame._fields) == ("data",):
        return "bytes"
    fields = (
        f"`{name}` {kind.__name__ if isinstance(kind, RecordType) else _type(kind)}"
        + ("" if type(default) is object else f" = {_default(default)}")
        for name, (kind, default) in frame._fields.items()
    )
    return "; ".join(fields)


def metrics() -> str:
    """Return the table of metrics, as an agent tells them."""
    lines = ["| metric | type | labels | |", "|---|---|---|---|"]
    for family in FAMILIES.values():
        labels = ", ".join(f"`{label}`" for label in family.labels)
        lines.append(f"| `{family.name}` | {family.kind} | {labels} | {family.summary} |")
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[], str]] = {
    "event-kinds": event_kinds,
    "readonly-policies": readonly_policies,
    "features": features,
    "presets": presets,
    "choices": choices,
    "methods": methods,
    "records": records,
    "error-codes": error_codes,
    "settings": settings,
    "metrics": metrics,
    "console-commands": console_commands,
    "console-frames": console_frames,
}


def update(text: str) -> str:
    """Return a document with each ``<!-- begin NAME -->`` ... ``<!-- end NAME -->`` made anew."""

    def fresh(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- begin {name} -->\n{SECTIONS[name]()}\n<!-- end {name} -->"

    pattern = r"<!-- begin ([a-z-]+) -->.*?<!-- end \1 -->"
    return re.sub(pattern, fresh, text, flags=re.DOTALL)


def _field_class(request: type[Record]) -> type[Record] | None:
    """Return the class whose fields a request has: itself or a base, None for no fields."""
    if not request._fields:
        return None
    return next(cls for cls in request.__mro__ if vars(cls).get("__annotations__"))


def _collect(kind: object, found: dict[str, type[Record]]) -> None:
    if isinstance(kind, RecordType) and kind.__name__ not in found:
        assert issubclass(kind, Record)
        found[kind.__name__] = kind
        for field_type, _ in kind._fields.values():
            _collect(field_type, found)
    for argument in getattr(kind, "__args__", ()):
        _collect(argument, found)


def _record(record: type[Record]) -> str:
    lines = [f"### {record.__name__}", "", _prose(record), ""]
    if not record._fields:
        return "\n".join(lines).rstrip()
    lines += ["| field | type | default |", "|---|---|---|"]
    for name, (kind, default) in record._fields.items():
        lines.append(f"| `{name}` | {_type(kind)} | {_default(default)} |")
    return "\n".join(lines)


def _prose(record: type[Record]) -> str:
    doc = record.__doc__ if "__doc__" in record.__dict__ and record.__doc__ else ""
    return _code(" ".join(doc.split()))


def _code(text: str) -> str:
    return text.replace("``", "`")


def _type(kind: object) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_type(member) for member in kind.__args__)
    if isinstance(kind, types.GenericAlias):
        if kind.__origin__ is tuple:
            return f"array of {_type(kind.__args__[0])}"
        return f"map of {_type(kind.__args__[1])}"
    if kind is types.NoneType:
        return "nil"
    if isinstance(kind, type) and issubclass(kind, Record):
        return _link(kind.__name__)
    names = {bytes: "bin or hex", str: "str", object: "any"}
    assert isinstance(kind, type)
    return names.get(kind, kind.__name__)


def _default(default: object) -> str:
    if type(default) is object:
        return "required"
    if default is None:
        return "nil"
    if isinstance(default, Record):
        return "all defaults"
    if isinstance(default, tuple | dict):
        return "empty"
    return f"`{str(default).lower()}`" if isinstance(default, bool) else f"`{default}`"


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"
