"""The agent itself: hello, status, cancel, shutdown, and events."""

from collections.abc import Mapping

from guestagent.api.checks import check_choice, check_range
from guestagent.api.request import Empty, Request
from vsock.record import Record

#: Versions of this contract that the agent speaks, newest first.
PROTOCOL_VERSIONS = (1,)
#: The vsock port that the agent listens on unless configured otherwise. Ports up to 1023 are for
#: processes with CAP_NET_BIND_SERVICE (net/vmw_vsock/af_vsock.c, LAST_RESERVED_PORT), so that no
#: user of the guest can answer the host in the agent's place.
AGENT_PORT = 1023
#: Kind of event -> what happened.
EVENT_KINDS = {
    "agent_started": "an agent began to serve, perhaps after another had ended",
    "layer_mounted": "a layer was mounted",
    "layer_unmounted": "a layer was unmounted",
    "layer_failed": "a layer could not be mounted; `detail` is the error",
    "layer_corrupted": "dm-verity found a corrupt block; `block` is its number",
    "layer_device_lost": "the device of a layer is gone",
    "overlay_mounted": "an overlay was mounted",
    "overlay_unmounted": "an overlay was unmounted",
    "overlay_failed": "an overlay could not be mounted; `detail` is the error",
    "overlay_device_lost": "the device of an overlay's scratch is gone",
    "pool_opened": "a pool was opened",
    "pool_closed": "a pool was closed",
    "pool_low_space": "a pool has less free than its low-water mark; `detail` says how much",
    "pool_out_of_space": "no block of a pool is left; writes fail, or wait for the pool to grow",
    "pool_failed": "a pool takes no change any more; `detail` is its mode",
    "pool_recovered": "a pool takes writes again",
    "volume_created": "a volume was made",
    "volume_deleted": "a volume was deleted, perhaps after its last user let it go",
    "volume_mounted": "a volume was mounted",
    "volume_unmounted": "a volume was unmounted",
    "device_appeared": "a block device came; `device` is its node",
    "device_vanished": "a block device is gone; `device` was its node",
}
#: Name of a feature -> what the agent and its kernel can do.
FEATURES = {
    "dm-linear": "`mapping`: layers of a packed device",
    "dm-verity": "`verity`: layers that are verified",
    "dm-crypt": "`encrypted` scratch devices and volumes",
    "verity-signatures": "`signature`: the kernel checks it against its keyring",
    "preset-default": "the preset",
    "preset-strict": "the preset, with all of its options",
    "preset-fast": "the preset, with all of its options",
    "fs-erofs": "layers of the file system",
    "fs-squashfs": "layers of the file system",
    "fs-ext4": "layers of the file system",
    "erofs-flattened": "erofs layers whose image has a device table: many layers in one mount",
    "overlay-fsconfig-fd": "overlays are made by fsconfig, of open directories",
    "overlay-fsconfig-path": "overlays are made by fsconfig, of paths",
    "overlay-mount": "overlays are made by mount",
    "scratch-tmpfs": "a scratch in memory",
    "scratch-directory": "a scratch in a directory",
    "scratch-device-ext4": "a scratch on a block device with this file system",
    "scratch-device-xfs": "a scratch on a block device with this file system",
    "dm-thin-pool": "the methods `pool.*` and `volume.*`",
    "batch": "`layers.mount` and `layers.unmount`",
    "events": "`agent.subscribe` and `agent.events`",
    "inspect": "the methods `fs.*`",
    "verify": "`layer.verify`",
    "share-virtiofs": "`share.*` with shares of this kind",
    "share-9p": "`share.*` with shares of this kind",
    "net-configure": "the methods `net.*`",
    "device-labels": "a device of the kind `label`",
    "readonly-policy": "`readonly_policy` of a layer",
    "whiteouts": "`whiteouts` of a layer",
    "reasons": "`agent.features`",
}
SHUTDOWN_MODES = ("poweroff", "reboot", "exit")


class HelloReply(Record):
    """``features`` are names that a client may test for; ``limits`` are those of the wire."""

    version: int
    agent: str
    kernel: str
    features: tuple[str, ...]
    limits: Mapping[str, int]
    boot: Mapping[str, object]


class AgentHello(Request[HelloReply], method="agent.hello", quick=True):
    """Agree on a version.

    The first call of every connection. ``versions`` are those of this contract that the client
    speaks; ``client`` is a name for the agent's log.
    """

    versions: tuple[int, ...]
    client: str = ""

    def check(self) -> None:
        if not self.versions:
            raise ValueError("versions is empty")
        check_range("client length", len(self.client), 0, 256)


class FeatureReport(Record):
    """A feature by its name in hello; ``why_not`` is empty where it is there."""

    name: str
    meaning: str
    is_there: bool
    why_not: str


class FeaturesReply(Record):
    features: tuple[FeatureReport, ...]


class AgentFeatures(Request[FeaturesReply], method="agent.features"):
    """List every feature of agent and kernel, and why one is not there.

    ``agent.hello`` names those that are there.
    """


class StatusReply(Record):
    """``state`` is ready or degraded; ``problems`` says why. ``events_dropped`` counts the events
    that subscribers did not get because they did not keep up. ``policy`` is the state of the policy
    as in `PolicyReply`, ``policy_digest`` the SHA-256 of the one in force.

    The defaults are for agents that do not count the thing."""

    state: str
    problems: tuple[str, ...] = ()
    uptime_seconds: float = 0.0
    pid: int = 0
    restarts: int = 0
    layers: int = 0
    overlays: int = 0
    dm_devices: int = 0
    requests_in_flight: int = 0
    connections: int = 0
    rss_bytes: int = 0
    threads: int = 0
    event_sequence: int = 0
    events_dropped: int = 0
    policy: str = "none"
    policy_digest: str = ""


class AgentStatus(Request[StatusReply], method="agent.status", quick=True):
    """Say how the agent is."""


class CancelReply(Record):
    """``cancelled`` is false when no such request was in flight on this connection."""

    cancelled: bool


class AgentCancel(Request[CancelReply], method="agent.cancel", quick=True):
    """Stop a waiting request of the same connection, by its msgid."""

    msgid: int


class AgentShutdown(Request[Empty], method="agent.shutdown"):
    """Unmount all, then end.

    ``mode``: poweroff or reboot the machine (only as PID 1), or exit the agent alone. ``force``
    goes on when layers or overlays are busy.
    """

    mode: str = "poweroff"
    force: bool = False

    def check(self) -> None:
        check_choice("mode", self.mode, SHUTDOWN_MODES)


class Event(Record):
    """Something that happened. ``sequence`` grows by one with each event of a boot of the machine,
    also across a restart of the agent; ``boot_id`` is the kernel's name for the boot. ``dropped``
    says how many events this subscriber did not get just before this one; ``agent.events`` still
    has them."""

    sequence: int
    kind: str
    unix_ms: int
    layer_id: str | None = None
    overlay_id: str | None = None
    pool_id: str | None = None
    volume_id: str | None = None
    device: str | None = None
    block: int | None = None
    detail: str = ""
    traceparent: str | None = None
    dropped: int = 0
    boot_id: str = ""

    def check(self) -> None:
        check_choice("kind", self.kind, EVENT_KINDS)


class SubscribeReply(Record):
    """Events after ``sequence`` come as notifications ``agent.event`` on this connection."""

    sequence: int


class AgentSubscribe(Request[SubscribeReply], method="agent.subscribe", quick=True):
    """Send events to this connection until it ends."""


class EventsReply(Record):
    """The oldest kept events after ``since``, at most 1000. With ``more``, the number of the last
    of them is the next ``since``. ``dropped`` counts events after ``since`` that are no longer
    kept; ``sequence`` is the number of the last event there was."""

    events: tuple[Event, ...]
    dropped: int
    sequence: int
    more: bool = False
    boot_id: str = ""


class AgentEvents(Request[EventsReply], method="agent.events", quick=True):
    """List kept events whose number is over ``since``, the oldest first."""

    since: int = 0


class MoreReply(Record):
    """``known`` is false when no such request is in flight on this connection."""

    known: bool


class AgentMore(Request[MoreReply], method="agent.more", quick=True):
    """Ask for more chunks of an answer.

    All chunks before ``sequence`` of the request ``msgid`` have been dealt with.
    """

    msgid: int
    sequence: int
