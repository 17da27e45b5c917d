"""The part of the engine that looks and changes nothing."""

from collections.abc import Callable

from guestagent.api.inspect import PlaceRequest
from guestagent.engine.inspection import archive, listing, metadata, reading
from guestagent.engine.inspection.checksums import checksum_tree
from guestagent.engine.inspection.devices import Devices
from guestagent.engine.inspection.place import open_place
from guestagent.engine.inspection.sink import Sink
from guestagent.engine.operation import Operation
from guestagent.engine.state import EngineState
from vsock.record import Record

__all__ = ("LOOKS", "STREAMS", "Inspection")

#: Name -> function of a place, the request and the operation: answers at once.
LOOKS: dict[str, Callable[..., Record]] = {
    "acl_get_file": lambda place, request, _op: metadata.acl(place, request),
    "exists": lambda place, request, _op: metadata.exists(place, request),
    "getxattrs": lambda place, request, _op: metadata.xattrs(place, request),
    "head": reading.head,
    "lstat": lambda place, request, _op: metadata.lstat(place, request),
    "pread": reading.pread,
    "readlink": lambda place, request, _op: metadata.readlink(place, request),
    "statvfs": lambda place, request, _op: metadata.statvfs(place, request),
}
#: Name -> function of a place, the request, the operation and a sink: takes its time.
STREAMS: dict[str, Callable[..., Record]] = {
    "checksum": reading.checksum,
    "checksums": checksum_tree,
    "download": reading.download,
    "du": listing.du,
    "find": listing.find,
    "ls": listing.ls,
    "read_file": reading.read_file,
    "readdir": listing.readdir,
    "tar_out": archive.tar_out,
}


class Inspection:
    """Every method may be called from many threads at once."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self.devices = Devices(state)

    def look(self, name: str, request: PlaceRequest, op: Operation) -> Record:
        """Do one of ``LOOKS``."""
        with open_place(self._state, request) as place:
            return LOOKS[name](place, request, op)

    def stream(self, name: str, request: PlaceRequest, op: Operation, sink: Sink) -> Record:
        """Do one of ``STREAMS``."""
        with open_place(self._state, request) as place:
            return STREAMS[name](place, request, op, sink)
