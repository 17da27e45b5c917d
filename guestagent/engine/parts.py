"""What the parts that are loaded late have in common: their entries in the journal."""

from collections.abc import Callable
from functools import partial

from guestagent.engine.claims import Owner
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import remove_directories
from vsock.errors import CallError
from vsock.log import log
from vsock.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    Kind = TypeVar("Kind", bound=Record)

__all__ = ("attempt", "forget_entry", "recover_part")


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
