"""The part of the engine that looks and changes nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from guestagent.api import inspect, inspect_devices
from guestagent.api.inspect import PlaceRequest
from guestagent.api.request import Request
from guestagent.engine.state import EngineState
from guestagent.engine.transaction import Transaction
from guestagent.inspect import archive, listing, metadata, reading
from guestagent.inspect.checksums import checksum_tree
from guestagent.inspect.devices import Devices
from guestagent.inspect.place import Place, open_place
from guestagent.inspect.sink import Sink
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("DEVICE_LOOKS", "LOOKS", "STREAMS", "Inspection")

#: Request -> function of a place and the request: answers at once.
LOOKS: dict[type[Request[Record]], Callable[..., Record]] = {
    inspect.FsAclGetFile: metadata.acl,
    inspect.FsExists: metadata.exists,
    inspect.FsGetxattrs: metadata.xattrs,
    inspect.FsHead: reading.head,
    inspect.FsLstat: metadata.lstat,
    inspect.FsPread: reading.pread,
    inspect.FsReadlink: metadata.readlink,
    inspect.FsStatvfs: metadata.statvfs,
}
#: Request -> function of a place, the request, the operation and a sink: takes its time.
STREAMS: dict[type[Request[Record]], Callable[..., Record]] = {
    inspect.FsChecksum: reading.checksum,
    inspect.FsChecksums: checksum_tree,
    inspect.FsDownload: reading.download,
    inspect.FsDu: listing.du,
    inspect.FsFind: listing.find,
    inspect.FsLs: listing.ls,
    inspect.FsReadFile: reading.read_file,
    inspect.FsReaddir: listing.readdir,
    inspect.FsTarOut: archive.tar_out,
}
#: Request -> function of the devices, the request and the operation: answers at once.
DEVICE_LOOKS: dict[type[Request[Record]], Callable[..., Record]] = {
    inspect_devices.FsListDevices: lambda devices, request, op: devices.list_devices(),
    inspect_devices.FsListPartitions: lambda devices, request, op: devices.list_partitions(),
    inspect_devices.FsListFilesystems: lambda devices, request, op: devices.list_filesystems(op),
    inspect_devices.FsVfsType: lambda devices, request, op: devices.vfs_type(request),
    inspect_devices.FsVfsUuid: lambda devices, request, op: devices.vfs_uuid(request),
    inspect_devices.FsVfsLabel: lambda devices, request, op: devices.vfs_label(request),
    inspect_devices.FsBlockdevGetsize64: lambda devices, request, op: devices.getsize64(request),
    inspect_devices.FsBlockdevGetro: lambda devices, request, op: devices.getro(request),
    inspect_devices.FsMountpoints: lambda devices, request, op: devices.mountpoints(),
}


class Inspection:
    """Every method may be called from many threads at once."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self.devices = Devices(state)

    def look(self, request: Request[Record], op: Transaction) -> Record:
        """Answer one of ``LOOKS``."""
        with self._place(request, op) as place:
            return LOOKS[type(request)](place, request)

    def stream(self, request: Request[Record], op: Transaction, sink: Sink) -> Record:
        """Answer one of ``STREAMS``."""
        with self._place(request, op) as place:
            return STREAMS[type(request)](place, request, op, sink)

    def device_look(self, request: Request[Record], op: Transaction) -> Record:
        """Answer one of ``DEVICE_LOOKS``."""
        return DEVICE_LOOKS[type(request)](self.devices, request, op)

    @contextmanager
    def _place(self, request: Request[Record], op: Transaction) -> Iterator[Place]:
        assert isinstance(request, PlaceRequest)
        step = request.method.removeprefix("fs.")
        with open_place(self._state, request) as place, op.step(step, place.name):
            # once more, now that what is open stays what it is
            self._state.gate.request(request.method, request)
            try:
                yield place
            except CallError as error:
                if error.code in ("integrity", "device"):
                    error.kernel_log = op.kernel_lines()
                raise
