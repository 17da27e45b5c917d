"""What the parts that are loaded late have in common: targets, journal entries, clean-ups."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from guestagent.engine.claims import Owner
from guestagent.engine.inventory import Reservation
from guestagent.engine.plan import check_target
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import (
    remove_directories,
    undo_deadline,
    unmount_target,
)
from guestagent.engine.transaction import Transaction
from vsock.errors import CallError
from vsock.log import log
from vsock.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    Kind = TypeVar("Kind", bound=Record)

__all__ = (
    "adopt_target",
    "attempt",
    "begin_entry",
    "claim_target",
    "forget_entry",
    "recover_part",
    "undo_mount",
    "undoing",
)


def claim_target(
    state: EngineState,
    owner: Owner,
    target: str,
    roots: tuple[str, ...],
    op: Transaction,
    field: str = "target",
) -> tuple[str, tuple[str, ...]]:
    """Reserve a target for ``owner`` (part, id); return the allowed root that it is below, and the
    directories that the owner is to make.

    Raises:
        CallError: ``invalid``, it is below no allowed root; ``conflict``, another has it.
    """
    root = check_target(target, roots, field)
    created = state.inventory.reserve(owner, target, exists=op.sees_directory).directories
    op.on_rollback("reservation", lambda: state.inventory.release(owner))
    return root, created


def adopt_target(state: EngineState, owner: Owner, target: str, created: tuple[str, ...]) -> None:
    """Reserve the target of what an earlier agent has mounted."""
    state.inventory.adopt(owner, Reservation(target=target, directories=created))


def begin_entry(state: EngineState, owner: Owner, entry: Record, op: Transaction) -> None:
    """Write the first entry of what is about to be made."""
    part, name = owner
    with op.step("journal", name, code="resource"):
        state.journal.write_part(part, name, entry)
    remove = partial(state.journal.remove_part, part, name)
    op.on_rollback("journal entry", remove, is_record=True)


def undo_mount(state: EngineState, path: str) -> None:
    """Unmount what a request that failed has mounted."""
    with undoing(state) as op:
        unmount_target(path, op)


@contextmanager
def undoing(state: EngineState) -> Iterator[Transaction]:
    """Run a clean-up as a transaction with a deadline of its own."""
    with undo_deadline(state) as deadline, Transaction(deadline) as op:
        yield op
        op.commit()


def recover_part(
    state: EngineState,
    part: str,
    kind: "type[Kind]",
    name_of: "Callable[[Kind], str]",
    recover: "Callable[[Kind], None]",
) -> None:
    """Recover each entry that an earlier agent has left of a part.

    An entry that cannot be recovered or read is told in the status.
    """
    for entry in state.journal.read_part(part, kind):
        attempt(state, name_of(entry), partial(recover, entry))
    state.note_damaged()


def attempt(state: EngineState, what: str, recover: Callable[[], None]) -> None:
    """Recover something; a failure is told in the status, and tried again by the next agent."""
    try:
        recover()
    except (OSError, CallError) as error:
        log.error("cannot recover", what=what, error=str(error))
        state.inventory.note_problem(what, f"{what} cannot be recovered: {error}")


def forget_entry(state: EngineState, owner: Owner, what: str, directories: tuple[str, ...]) -> None:
    """Drop the entry of what was taken down, with the reservations of ``owner`` (part, id) and the
    directories that were made for it."""
    state.tidy(f"the directories of {what}", remove_directories, directories)
    state.tidy(f"the journal of {what}", state.journal.remove_part, *owner)
    state.inventory.release(owner)
    state.inventory.settle_problem(what)
