"""The part of the engine that looks and changes nothing."""

from guestagent.api.inspect import ChecksumsReply, ChecksumsRequest
from guestagent.engine.inspection.checksums import checksum_tree
from guestagent.engine.inspection.place import open_place
from guestagent.engine.inspection.sink import Sink
from guestagent.engine.operation import Operation
from guestagent.engine.state import EngineState

__all__ = ("Inspection",)


class Inspection:
    """Every method may be called from many threads at once."""

    def __init__(self, state: EngineState) -> None:
        self._state = state

    def checksums(self, request: ChecksumsRequest, op: Operation, sink: Sink) -> ChecksumsReply:
        """Hash every regular file of a tree."""
        with open_place(self._state, request) as place:
            return checksum_tree(place, request, op, sink)
