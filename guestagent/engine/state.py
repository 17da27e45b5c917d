"""What the parts of the engine share: device-mapper control, inventory, journal, rules, events."""

from guestagent.api.layers import TARGET_ROOTS
from guestagent.api.overlays import ThinScratch
from guestagent.engine.events import EventLog
from guestagent.engine.faults import Faults
from guestagent.engine.inventory import Inventory, LiveScratch
from guestagent.engine.journal import Begun, Journal
from guestagent.engine.locks import KeyLocks
from guestagent.engine.plan import Version
from guestagent.engine.statedirectory import StateDirectory, uuid_prefix
from guestagent.engine.transaction import Transaction
from guestagent.policy.gate import Gate
from guestagent.storage.devicemapper.control import open_control
from guestagent.storage.kmsg import KernelLog
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("EngineState", "PoolScratches", "Rules", "layer_action")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from guestagent.engine.inventory import LiveLayer
    from guestagent.policy.decision import Allowed
    from guestagent.policy.rules import LayerAction, State


class Rules(Record):
    """What requests may ask for. ``undo_seconds`` bounds the clean-up after a failure; unmounts and
    recovery use at most ``parallel`` threads."""

    target_roots: tuple[str, ...] = TARGET_ROOTS
    #: Which layers are refused: with "yes" those without verity, with "full" also those whose
    #: request leaves a part of what defines the hash tree to the superblock; "no": none.
    require_verity: str = "no"
    undo_seconds: float = 10.0
    parallel: int = 8

    @property
    def volume_roots(self) -> tuple[str, ...]:
        """Return the directories below which a volume may be mounted."""
        more = ("/run/volumes",) if self.target_roots == TARGET_ROOTS else ()
        return (*self.target_roots, *more)

    @property
    def share_roots(self) -> tuple[str, ...]:
        """Return the directories below which a shared directory may be mounted."""
        more = ("/run/shares",) if self.target_roots == TARGET_ROOTS else ()
        return (*self.target_roots, *more)

    @property
    def scratch_roots(self) -> tuple[str, ...]:
        """Return the directories below which a scratch directory may lie."""
        return ("/run",) if self.target_roots == TARGET_ROOTS else self.target_roots


class PoolScratches:
    """Volumes of pools as scratches of overlays, of a part that stands on the engine."""

    def make_scratch(
        self, overlay_id: str, scratch: ThinScratch, path: str, op: Transaction, permit: "Allowed"
    ) -> LiveScratch:
        """Make a volume and mount it at ``path``, which the caller has made."""
        raise NotImplementedError

    def release_scratch(self, pool_id: str, overlay_id: str, op: Transaction) -> None:
        """Delete the volume of an overlay, which is not mounted any more."""
        raise NotImplementedError


class EngineState:
    """Opened once for an engine; ``close()`` frees descriptors and leaves the kernel's
    state as it is."""

    def __init__(
        self,
        *,
        state_directory: "str | StateDirectory",
        rules: Rules,
        faults: Faults,
        gate: Gate | None = None,
    ) -> None:
        """``state_directory`` is locked here, and unlocked by ``close``, unless it is open already.

        Without a ``gate`` there is no policy, until one is put in force.

        Raises:
            CallError: ``conflict``, another agent has it.
        """
        self._own_directory: StateDirectory | None = None
        if isinstance(state_directory, str):
            state_directory = self._own_directory = StateDirectory(state_directory)
        self.directory = state_directory.path
        self.uuid_prefix = uuid_prefix(self.directory)
        self.rules = rules
        self.faults = faults
        self.gate = Gate() if gate is None else gate
        self.gate.look = self._mounted
        self.journal = Journal(self.directory)
        self.events = EventLog(self.journal)
        self.inventory = Inventory(reserved=self.directory)
        self.locks = KeyLocks()
        self.kernel_log = KernelLog()
        self.control = open_control()
        #: What makes scratches in pools, once there was a pool.
        self.pool_scratches: PoolScratches | None = None
        #: The version of the kernel's verity target, once it was asked for and there was one.
        self.known_verity_version: Version | None = None

    def verity_version(self) -> Version | None:
        """Ask for the version of the kernel's verity target; None if it has none (yet)."""
        self.known_verity_version = self.control.list_versions().get("verity")
        return self.known_verity_version

    def begin(self, name: str, begun: Begun, op: Transaction) -> None:
        """Write down what is about to be made, so that a restart can undo it."""
        with op.step("journal", name, code="resource"):
            self.journal.begin(name, begun)
        op.on_rollback("what was begun", lambda: self.journal.decide(name), is_record=True)

    def hold(self, keys: "Iterable[tuple[str, str]]", op: Transaction) -> "_Hold":
        """Return a context that holds what a request mounts or unmounts, and that under a policy
        lets no other request do so meanwhile.

        Entering it raises CallError: ``timeout`` or ``cancelled``; ``busy``, a policy was set while
        it waited.
        """
        return _Hold(self, keys, op)

    def _mounted(self) -> "State":
        """Return what a policy knows of what is mounted."""
        from guestagent.policy.rules import State

        return State(
            layers={live.spec.layer_id: layer_action(live) for live in self.inventory.layers()},
            overlays={live.spec.overlay_id: live.spec for live in self.inventory.overlays()},
        )

    def tidy(self, what: str, action: "Callable[..., None]", *arguments: object) -> None:
        """Do the last of a clean-up, which is past failing; a failure shows in the status."""
        try:
            action(*arguments)
        except (OSError, CallError) as error:
            self.inventory.note_problem(what, f"{what} could not be removed: {error}")

    def note_damaged(self) -> None:
        """Tell the entries of the journal that could not be read in the status."""
        for path in self.journal.damaged():
            self.inventory.note_problem(path, f"journal entry {path!r} could not be read")

    def close(self) -> None:
        """Idempotent."""
        self.control.close()
        self.kernel_log.close()
        self.events.close()
        if self._own_directory is not None:
            self._own_directory.close()


class _Hold:
    __slots__ = ("_gate", "_inner", "_more")

    def __init__(
        self, state: EngineState, keys: "Iterable[tuple[str, str]]", op: Transaction
    ) -> None:
        self._gate = state.gate
        self._more = self._gate.lock_keys
        self._inner = state.locks.hold((*keys, *self._more), op.deadline)

    def __enter__(self) -> None:
        self._inner.__enter__()
        if self._gate.lock_keys != self._more:
            self._inner.__exit__(None, None, None)
            text = "a policy was put in force while this request waited"
            raise CallError("busy", text, step="lock", hint="ask again")

    def __exit__(self, *error: "Any") -> bool | None:
        return self._inner.__exit__(*error)


def layer_action(live: "LiveLayer") -> "LayerAction":
    """Return what a policy knows of a layer that is planned or mounted."""
    from guestagent.policy.rules import LayerAction

    verity = live.plan.verity
    return LayerAction(
        spec=live.spec,
        verity=None if verity is None else verity.parameters,
        size_bytes=live.source.size_bytes,
    )
