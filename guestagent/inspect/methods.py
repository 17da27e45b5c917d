"""The part of the engine that looks and changes nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from guestagent.api.inspect import PlaceRequest
from guestagent.engine.state import EngineState
from guestagent.engine.transaction import Operation
from guestagent.inspect import archive, listing, metadata, reading
from guestagent.inspect.checksums import checksum_tree
from guestagent.inspect.devices import Devices
from guestagent.inspect.place import Place, open_place
from guestagent.inspect.sink import Sink
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("LOOKS", "STREAMS", "Inspection")

#: Name -> function of a place and the request: answers at once.
LOOKS: dict[str, Callable[..., Record]] = {
    "acl_get_file": metadata.acl,
    "exists": metadata.exists,
    "getxattrs": metadata.xattrs,
    "head": reading.head,
    "lstat": metadata.lstat,
    "pread": reading.pread,
    "readlink": metadata.readlink,
    "statvfs": metadata.statvfs,
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
        with self._place(name, request, op) as place:
            return LOOKS[name](place, request)

    def stream(self, name: str, request: PlaceRequest, op: Operation, sink: Sink) -> Record:
        """Do one of ``STREAMS``."""
        with self._place(name, request, op) as place:
            return STREAMS[name](place, request, op, sink)

    @contextmanager
    def _place(self, name: str, request: PlaceRequest, op: Operation) -> Iterator[Place]:
        with open_place(self._state, request) as place, op.step(name, place.name):
            try:
                yield place
            except CallError as error:
                if error.code in ("integrity", "device"):
                    error.kernel_log = op.kernel_lines()
                raise
