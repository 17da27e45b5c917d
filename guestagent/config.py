"""How the agent is to run: from the kernel command line (``guestagent.KEY=VALUE``) or from argv.

``KEYS`` is the one table of settings; the documentation is made from it. A value that cannot be
understood is a ``Problem``: the setting keeps its default and the agent says so in its status,
unless the setting guards security, where a boot must not go on by guessing.
"""

import os
from collections.abc import Callable, Mapping

from guestagent.api.agent import AGENT_PORT
from guestagent.api.layers import TARGET_ROOTS
from vsock.log import FORMATS, LEVELS
from vsock.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = (
    "FAULTS_ALLOWED",
    "KEYS",
    "Config",
    "Key",
    "Problem",
    "machine_settings",
    "parse_command_line",
    "read_settings",
)

PREFIX = "guestagent."
#: A file in the boot images of tests.
FAULTS_ALLOWED = "/etc/guestagent/faults"
_SINKS = ("console", "kmsg")


class Config(Record):
    """Everything that can be set. Addresses are texts as ``vsock.address`` reads them."""

    listen: tuple[str, ...] = (f"vsock://any:{AGENT_PORT}",)
    dial: tuple[str, ...] = ()
    console: tuple[str, ...] = ()
    console_shell: bool = False
    log: str = "info"
    log_format: str = "text"
    log_to: tuple[str, ...] = ("console",)
    log_dial: tuple[str, ...] = ()
    target_roots: tuple[str, ...] = TARGET_ROOTS
    state_directory: str = "/run/guestagent"
    require_verity: str = "no"
    deadline_seconds: int = 60
    max_deadline_seconds: int = 600
    vsock_peers: tuple[int, ...] = (2,)  # VMADDR_CID_HOST
    modules: tuple[str, ...] = ()
    policy: str | None = None
    fault: str = ""
    rcu_expedited: bool = True
    layers: tuple[str, ...] = ()
    overlay: str | None = None
    manifests: tuple[str, ...] = ()
    net: tuple[str, ...] = ()
    init: str = "/sbin/init"
    agent: str = "end"
    on_failure: str = "poweroff"


class Key(Record):
    """One setting: ``read`` turns its text into the value of ``field`` or raises ValueError.

    A setting that may ``repeat`` gathers its values in the order they come. Of any other the first
    counts, and a second one that says something else is a problem; one that is to come ``once``
    may not come again at all.
    """

    name: str
    field: str
    read: Callable[[str], object]
    summary: str
    guards_security: bool = False
    repeat: bool = False
    once: bool = False


class Problem(Record):
    """A setting that could not be taken as it was given."""

    key: str
    text: str
    fatal: bool


def _flag(text: str) -> bool:
    if text in ("1", "yes", "on", "true", ""):
        return True
    if text in ("0", "no", "off", "false"):
        return False
    raise ValueError(f"expected 1 or 0, got {text!r}")


def _verity_rule(text: str) -> str:
    if text == "full":
        return text
    try:
        return "yes" if _flag(text) else "no"
    except ValueError:
        raise ValueError(f"expected 1, 0 or full, got {text!r}") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _addresses(text: str) -> tuple[str, ...]:
    from vsock.address import parse_address

    return tuple(str(parse_address(word)) for word in _words(text))


def _port(text: str) -> tuple[str, ...]:
    return _addresses(f"vsock://any:{text}")


def _peers(text: str) -> tuple[str, ...]:
    """CID:PORT for short, or whole addresses."""
    words = (word if "://" in word else f"vsock://{word}" for word in _words(text))
    return _addresses(",".join(words))


def _console(text: str) -> tuple[str, ...]:
    """vsock:PORT and /dev/NAME for short, or whole addresses; ``off`` is none at all."""
    if text == "off":
        return ()
    places = []
    for word in _words(text):
        if word.startswith("/"):
            word = f"serial://{word}"
        elif word.startswith("vsock:") and not word.startswith("vsock://"):
            word = f"vsock://any:{word[len('vsock:') :]}"
        places.append(word)
    return _addresses(",".join(places))


def _level(text: str) -> str:
    if text not in LEVELS:
        raise ValueError(f"expected one of {', '.join(LEVELS)}, got {text!r}")
    return text


def _sinks(text: str) -> tuple[str, ...]:
    for word in _words(text):
        if word not in _SINKS:
            raise ValueError(f"expected some of {', '.join(_SINKS)}, got {word!r}")
    return _words(text)


def _directory(text: str) -> str:
    if not text.startswith("/") or "//" in text or "/.." in text or len(text) > 1024:
        raise ValueError(f"expected a plain absolute path, got {text!r}")
    return text.rstrip("/") or "/"


def _cids(text: str) -> tuple[int, ...]:
    from vsock.address import VMADDR_CID_ANY, VsockAddress, parse_cid

    cids = [VsockAddress(cid=parse_cid(word), port=0).cid for word in _words(text)]
    return tuple(VMADDR_CID_ANY if cid is None else cid for cid in cids)


def _directories(text: str) -> tuple[str, ...]:
    return tuple(_directory(word) for word in text.split(","))


def _policy(text: str) -> str:
    if text in ("none", "required", "tsm"):
        return text
    path, comma, digest = text.partition(",sha256=")
    if not comma or len(digest) != 64 or not frozenset("0123456789abcdef").issuperset(digest):
        raise ValueError(f"expected none, required, tsm or PATH,sha256=HEX, got {text!r}")
    _directory(path)
    return text


def _seconds(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 86_400:
        raise ValueError(f"expected 1 to 86400 seconds, got {text!r}")
    return int(text)


def _layer(text: str) -> str:
    from guestagent.api.texts import layer_from_text

    def not_read(path: str) -> bytes:
        # settings are read again where the boot image is gone; the boot reads the file
        if not path.startswith("/"):
            raise ValueError(f"signature {path!r} is no absolute path")
        return b"-"

    layer_from_text(text, "layer", not_read)
    return text


def _overlay(text: str) -> str:
    from guestagent.api.texts import overlay_from_text

    overlay_from_text(text)
    return text


def _network(text: str) -> str:
    from guestagent.api.nettexts import check_network_part

    check_network_part(text)
    return text


def _choice(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, got {text!r}")
        return text

    return read


def _faults(text: str) -> str:
    from guestagent.engine.faults import Faults

    Faults.parse(text)
    return text


KEYS: tuple[Key, ...] = (
    Key(
        name="port",
        field="listen",
        read=_port,
        summary="vsock port to listen on",
        guards_security=True,
    ),
    Key(
        name="listen",
        field="listen",
        read=_addresses,
        summary="addresses to listen on, separated by commas; none when empty",
        guards_security=True,
    ),
    Key(
        name="dial",
        field="dial",
        read=_peers,
        summary="addresses (or CID:PORT) to connect to and serve, again and again",
        guards_security=True,
    ),
    Key(
        name="console",
        field="console",
        read=_console,
        summary="where the debug console is: vsock:1022, /dev/hvc0, /dev/ttyS1, "
        "/dev/virtio-ports/NAME, addresses, separated by commas; off",
        guards_security=True,
    ),
    Key(
        name="console_shell",
        field="console_shell",
        read=_flag,
        summary="let a person at the console run programs of the guest, too",
        guards_security=True,
    ),
    Key(name="log", field="log", read=_level, summary="least level that is printed"),
    Key(
        name="log_format",
        field="log_format",
        read=_choice(*FORMATS),
        summary="how lines are printed: text (key=value) or json",
    ),
    Key(
        name="log_to",
        field="log_to",
        read=_sinks,
        summary="where lines are printed: console, kmsg (the kernel's log), both, or nowhere",
    ),
    Key(
        name="log_dial",
        field="log_dial",
        read=_peers,
        summary="addresses (or CID:PORT) of hosts that are sent the log as JSON, when they listen",
        guards_security=True,
    ),
    Key(
        name="target_root",
        field="target_roots",
        read=_directories,
        summary="directories that all targets must lie below, separated by commas",
        guards_security=True,
    ),
    Key(
        name="state",
        field="state_directory",
        read=_directory,
        summary="directory (in a tmpfs) for the journal",
        guards_security=True,
    ),
    Key(
        name="require_verity",
        field="require_verity",
        read=_verity_rule,
        summary="refuse layers that are not verified; full: refuse requests that leave a part of "
        "what defines the hash tree to the superblock",
        guards_security=True,
    ),
    Key(
        name="deadline",
        field="deadline_seconds",
        read=_seconds,
        summary="seconds that a request may take when it names no deadline_ms",
    ),
    Key(
        name="max_deadline",
        field="max_deadline_seconds",
        read=_seconds,
        summary="seconds of the longest deadline_ms that a request may name",
    ),
    Key(
        name="vsock_peers",
        field="vsock_peers",
        read=_cids,
        summary="CIDs that may connect over vsock, separated by commas: host, local, numbers, any",
        guards_security=True,
    ),
    Key(
        name="modules",
        field="modules",
        read=_words,
        summary="kernel modules to load besides",
        guards_security=True,
    ),
    Key(
        name="rcu_expedited",
        field="rcu_expedited",
        read=_flag,
        summary="as PID 1: let the kernel hurry when devices are removed",
    ),
    Key(
        name="layer",
        field="layers",
        read=_layer,
        summary="mount at boot, topmost first: DEVICE,root=HEX[,offset=N,size=N][,id=ID][,fs=TYPE]"
        "[,ranges=OFFSET+SIZE:OFFSET+SIZE...]"
        "[,readonly_policy=NAME][,whiteouts=KIND]"
        "[,salt=HEX,algorithm=NAME,hash_type=N,data_blocks=N,data_block_size=N,hash_block_size=N,"
        "hash_offset=N][,signature=PATH]",
        guards_security=True,
        repeat=True,
    ),
    Key(
        name="overlay",
        field="overlay",
        read=_overlay,
        summary="overlay those layers: ID[,layers=A+B][,scratch=SCRATCH]",
        guards_security=True,
    ),
    Key(
        name="manifest",
        field="manifests",
        read=str,
        summary="mount the layers of a pack at boot, or one image of it: "
        "PATH,DEVICE[,sha256=HEX][,image=ID]",
        guards_security=True,
        repeat=True,
    ),
    Key(
        name="net",
        field="net",
        read=_network,
        summary="set up the network at boot: interface,match=mac=MAC,addresses=A/N,... rule,... "
        "dns,... hosts,... hostname=NAME wait_ms=N, with the fields of net.configure",
        guards_security=True,
        repeat=True,
    ),
    Key(
        name="init",
        field="init",
        read=_directory,
        summary="what to execute in the root that was mounted at boot; / to stay in the boot image",
        guards_security=True,
    ),
    Key(
        name="agent",
        field="agent",
        read=_choice("stay", "end"),
        summary="after the switch to that root: stay as one of its processes, or end",
        guards_security=True,
    ),
    Key(
        name="on_failure",
        field="on_failure",
        read=_choice("poweroff", "reboot", "serve"),
        summary="when the root cannot be mounted: end the machine, or serve for a look at it",
        guards_security=True,
    ),
    Key(
        name="policy",
        field="policy",
        read=_policy,
        summary="what the host may ask for: PATH,sha256=HEX, a file of the boot image; required: "
        "nothing before policy.set; tsm: the same, with the digest that the TEE tells; none",
        guards_security=True,
        once=True,
    ),
    Key(
        name="fault",
        field="fault",
        read=_faults,
        summary="for tests: fail steps, as STEP:ERRNO[:NTH] or #NTH:ERRNO; a boot image takes it "
        "only if it was made for tests",
        guards_security=True,
    ),
)


def machine_settings() -> tuple[Config, tuple[Problem, ...]]:
    """Return ``read_settings`` of the command line that this machine's kernel was started with.

    Raises:
        OSError: it cannot be read.
    """
    with open("/proc/cmdline", encoding="utf-8", errors="replace") as stream:
        settings = parse_command_line(stream.read())
    return read_settings(settings, faults=os.path.exists(FAULTS_ALLOWED))


def parse_command_line(text: str) -> tuple[tuple[str, str], ...]:
    """Return the ``guestagent.`` settings of a kernel command line in order, without the prefix.

    What follows ``--`` is for the init and holds no settings. Quotes are as the kernel's (next_arg
    in lib/cmdline.c): between them spaces do not end a word, and those around a word or a value
    are no part of it. A lone name has the value "".
    """
    settings: list[tuple[str, str]] = []
    for word in _split(text):
        if word == "--":
            break
        name, _, value = _unquoted(word).partition("=")
        if name.startswith(PREFIX):
            settings.append((name[len(PREFIX) :].replace("-", "_"), _unquoted(value)))
    return tuple(settings)


def read_settings(
    settings: tuple[tuple[str, str], ...], *, faults: bool = True
) -> tuple[Config, tuple[Problem, ...]]:
    """Return the configuration that ``settings`` ask for, and what could not be taken.

    Without ``faults`` the setting of that name is refused.
    """
    keys: Mapping[str, Key] = {key.name: key for key in KEYS}
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, text in settings:
        key = keys.get(name)
        if key is None:
            problems.append(_problem(name, "unknown setting", fatal=False))
            continue
        try:
            if key.field == "fault" and not faults:
                raise ValueError("this boot image was not made for tests")
            value = key.read(text)
            if key.once and key.field in values:
                raise ValueError("given twice")
            if not key.repeat and values.get(key.field, value) != value:
                raise ValueError("given twice, and not the same")
            values[key.field] = (*values.get(key.field, ()), value) if key.repeat else value
        except ValueError as error:
            problems.append(_problem(name, str(error), fatal=key.guards_security))
    return Config().replace(**values), tuple(problems)


def _problem(name: str, text: str, *, fatal: bool) -> Problem:
    return Problem(key=PREFIX + name, text=f"{PREFIX}{name}: {text}", fatal=fatal)


def _split(text: str) -> list[str]:
    words: list[str] = []
    word = ""
    quoted = False
    for c in text.strip():
        if c.isspace() and not quoted:
            words.append(word)
            word = ""
            continue
        quoted ^= c == '"'
        word += c
    words.append(word)
    return [word for word in words if word]


def _unquoted(text: str) -> str:
    return text[1:].removesuffix('"') if text.startswith('"') else text
