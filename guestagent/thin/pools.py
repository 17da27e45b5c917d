"""The open pools: each used by one request at a time, adopted by an agent that starts again."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from guestagent.api import thin as api
from guestagent.api.request import handles
from guestagent.engine.inventory import refuse_other_spec
from guestagent.engine.parts import adopt_target, recover_part, undoing
from guestagent.engine.plan import dm_uuid
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import remove_devices, remove_directories, unmount_target
from guestagent.engine.transaction import Transaction
from guestagent.storage import blockdev
from guestagent.storage.devicemapper import thin
from guestagent.storage.mountinfo import find_mount
from guestagent.thin.changes import settle
from guestagent.thin.opening import grow_pool, open_pool, unmake
from guestagent.thin.pool import PART, Disks, Mounted, Pool, PoolEntry, dm_name, uuid_prefix
from guestagent.thin.records import RECORDS_ID
from vsock.errors import CallError
from vsock.log import log

__all__ = ("Pools",)

_LISTED_IDS = 64


class Pools:
    """Thread-safe: each request holds the lock of its pool."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._pools: dict[str, Pool] = {}
        #: Called when a pool is opened, and when a deletion begins to wait.
        self.on_change: Callable[[], None] = lambda: None

    def all(self) -> tuple[Pool, ...]:
        return tuple(self._pools.values())

    @contextmanager
    def use(self, pool_id: str, op: Transaction) -> Iterator[Pool]:
        """Hold a pool for the length of the block.

        Raises:
            CallError: ``not_found``, it is not open; ``timeout`` or ``cancelled``.
        """
        with self._state.locks.hold([("pool", pool_id)], op.deadline):
            pool = self._pools.get(pool_id)
            if pool is None:
                text = f"there is no open pool {pool_id!r}"
                raise CallError("not_found", text, object=pool_id, hint="pool.open opens it")
            if pool.records.pending is not None:  # of a request that could not undo it
                settle(pool)
            try:
                yield pool
            except OSError:  # a look at the pool; what changes it is in steps of its own
                with op.step("look", pool_id, is_checked=False):
                    raise

    def recover(self) -> None:
        """Go on with the pools of an earlier agent, and undo the requests that it had begun.

        What cannot be undone is told in the status.
        """

        def recover(entry: PoolEntry) -> None:
            with undoing(self._state) as op:
                pool = _recover_pool(self._state, entry, op)
                if pool is None:
                    self._forget(entry.spec.pool_id)
                else:
                    self._pools[pool.pool_id] = pool
                    pool.keep()

        def name_of(entry: PoolEntry) -> str:
            return f"pool {entry.spec.pool_id}"

        recover_part(self._state, PART, PoolEntry, name_of, recover)

    @handles(api.PoolOpen)
    def open(self, spec: api.PoolOpen, op: Transaction) -> api.PoolReport:
        """Open a pool, or say that exactly this pool is open already.

        Raises:
            CallError: as ``open_pool``; ``conflict``, the id is that of another pool; nothing is
                left behind.
        """
        with self._state.locks.hold([("pool", spec.pool_id)], op.deadline):
            permit = self._state.gate.request(spec.method, spec)
            there = self._pools.get(spec.pool_id)
            if there is not None:
                wanted = spec.replace(adopt=there.spec.adopt)
                refuse_other_spec("pool", spec.pool_id, wanted, there.spec, state="open")
                return self.report(there, already=True)
            with op:
                pool = open_pool(self._state, spec, op, permit)
                with op.step("read back", pool.name):
                    report = self.report(pool, op)
                with op.step("commit", pool.name, code="resource"):
                    pool.keep()
                op.commit()
            self._pools[spec.pool_id] = pool
        self.on_change()
        self._state.events.publish("pool_opened", pool_id=spec.pool_id, traceparent=op.traceparent)
        return report

    @handles(api.PoolGrow)
    def grow(self, request: api.PoolGrow, op: Transaction) -> api.PoolReport:
        """Take up what the disks have grown by, and append a disk.

        Raises:
            CallError: as ``grow_pool``.
        """
        with self.use(request.pool_id, op) as pool:
            permit = self._state.gate.request(request.method, request)
            with op:
                has_grown = grow_pool(pool, request, op, permit)
                op.commit()
            log.info("pool grown", pool=pool.pool_id, sectors=pool.table.length_sectors)
            return self.report(pool, op, already=not has_grown)

    @handles(api.PoolClose)
    def close(self, request: api.PoolClose, op: Transaction) -> api.PoolCloseReply:
        """Take the devices of a pool away; its disks keep everything.

        Raises:
            CallError: ``busy``, volumes are mounted or in use.
        """
        pool_id = request.pool_id
        with self._state.locks.hold([("pool", pool_id)], op.deadline):
            pool = self._pools.get(pool_id)
            if pool is not None:
                _refuse_mounted(pool)
            names = _dm_names(self._state, pool_id)
            remove_devices(self._state, names, op)
            with op.step("commit", pool_id):
                self._forget(pool_id)
        if pool is not None:
            self._state.events.publish("pool_closed", pool_id=pool_id, traceparent=op.traceparent)
        return api.PoolCloseReply(
            removed_devices=names,
            already=pool is None and not names,
            timings_ms=op.timings_ms,
        )

    def _forget(self, pool_id: str) -> None:
        self._pools.pop(pool_id, None)
        self._state.journal.remove_part(PART, pool_id)
        for kind in ("metadata", *range(api.MAX_DATA_DEVICES)):
            self._state.inventory.release((f"pool-{kind}", pool_id))
        self._state.inventory.settle_problem(f"pool {pool_id}")

    def report(
        self, pool: Pool, op: Transaction | None = None, *, already: bool = False
    ) -> api.PoolReport:
        """Describe a pool as the kernel has it now."""
        try:
            status = pool.status()
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            status = thin.PoolStatus(mode="gone")
        block_bytes, metadata_block_bytes = pool.block_bytes, thin.METADATA_BLOCK_BYTES
        volumes = pool.records.volumes
        return api.PoolReport(
            pool_id=pool.pool_id,
            mode=status.mode,
            transaction_id=status.transaction_id,
            data=api.SpaceUsed(
                used_bytes=status.used_data_blocks * block_bytes,
                total_bytes=status.total_data_blocks * block_bytes,
            ),
            metadata=api.SpaceUsed(
                used_bytes=status.used_metadata_blocks * metadata_block_bytes,
                total_bytes=status.total_metadata_blocks * metadata_block_bytes,
            ),
            block_size_bytes=block_bytes,
            low_water_bytes=pool.table.low_water_blocks * block_bytes,
            on_full="error" if pool.table.error_if_full else "queue",
            needs_check=status.needs_check,
            discard_passdown=status.discard_passdown,
            devices=(pool.disks.metadata.node, *(disk.node for disk in pool.disks.data)),
            volumes=sum(not volume.deleted for volume in volumes),
            deleting=tuple(volume.volume_id for volume in volumes if volume.deleted),
            foreign_ids=tuple(sorted(pool.foreign)[:_LISTED_IDS]),
            created=pool.is_new and not already,
            already=already,
            timings_ms={} if op is None else op.timings_ms,
        )

    @handles(api.PoolStatus)
    def status(self, request: api.PoolStatus, op: Transaction) -> api.PoolReport:
        """Describe a pool, with the thin devices in it that are foreign now."""
        with self.use(request.pool_id, op) as pool:
            if self._state.control.exists(name=pool.name):
                pool.find_foreign()
            return self.report(pool)

    @handles(api.PoolList)
    def list(self, _request: api.PoolList, _op: Transaction) -> api.PoolListReply:
        return api.PoolListReply(pools=tuple(map(self.report, self.all())))


def _refuse_mounted(pool: Pool) -> None:
    held = [f"{m.volume_id} at {m.path} by {', '.join(m.holders)}" for m in pool.mounts.values()]
    if held:
        raise CallError(
            "busy",
            f"{len(held)} volumes of pool {pool.pool_id!r} are mounted",
            errno=errno.EBUSY,
            object=pool.pool_id,
            hint=f"mounted: {'; '.join(held[:16])}",
        )


# --- an agent that starts again


def _dm_names(state: EngineState, pool_id: str) -> tuple[str, ...]:
    """Return the dm devices of a pool, those that stand on others first."""
    uuid, prefix = f"{uuid_prefix(state)}{pool_id}-", dm_name(pool_id, "")
    last = {dm_name(pool_id, "pool"): 1, dm_name(pool_id, "data"): 2}
    names = [
        name
        for name, _, found in state.control.list_devices()
        if name.startswith(prefix) and found == uuid + name.removeprefix(prefix)
        if name in last or name.rpartition("-")[2].isdigit()
    ]
    return tuple(sorted(names, key=lambda name: (last.get(name, 0), name)))


def _recover_pool(state: EngineState, entry: PoolEntry, op: Transaction) -> Pool | None:
    """Go on with a pool of an earlier agent, or undo the request that was opening it.

    Returns None where nothing is left of the pool.

    Raises:
        CallError: ``integrity``, its records cannot be read; ``conflict``, another program has
            changed it.
    """
    spec, control = entry.spec, state.control
    names = _dm_names(state, spec.pool_id)
    for name in reversed(names):  # a snapshot may have been cut short
        if control.info(name).suspended:
            control.resume(name)
    if not entry.is_open or dm_name(spec.pool_id, "pool") not in names:
        _undo_open(state, entry, names, op)
        return None
    pool = _live_pool(state, entry)
    if not pool.active(RECORDS_ID):
        pool.activate_records(op)
    if not pool.read():
        text = f"the records of pool {spec.pool_id!r} cannot be read"
        raise CallError("integrity", text, object=spec.pool_id)
    mounted = {each.volume_id for each in entry.mounts}
    used = [each.device_id for each in pool.records.volumes if each.volume_id in mounted]
    kept = {dm_name(spec.pool_id, part) for part in ("pool", "data")}
    kept |= {dm_name(spec.pool_id, device_id) for device_id in (RECORDS_ID, *used)}
    for name in names:
        if name not in kept:
            pool.remove(name)
    settle(pool)
    if pool.records.data_bytes != pool.disks.data_bytes:
        pool.write(pool.records.replace(data_bytes=pool.disks.data_bytes))
    pool.find_foreign()
    for each in entry.mounts:
        _recover_mount(pool, each, op)
    return pool


def _undo_open(
    state: EngineState, entry: PoolEntry, names: tuple[str, ...], op: Transaction
) -> None:
    remove_devices(state, names, op)
    if entry.is_new and not entry.is_open:
        metadata = blockdev.find(entry.spec.metadata_device)
        data = blockdev.find(entry.spec.data_device)
        if metadata is not None and data is not None:
            unmake(metadata, data)


def _live_pool(state: EngineState, entry: PoolEntry) -> Pool:
    """Learn from the live tables which disks the pool has, and reserve them."""
    control, spec = state.control, entry.spec
    table = thin.parse_pool(control.table(dm_name(spec.pool_id, "pool"))[0])
    data = control.table(dm_name(spec.pool_id, "data"))
    disks = Disks(
        metadata=blockdev.inspect(table.metadata_device),
        data=tuple(blockdev.inspect(target.params.split()[0]) for target in data),
    )
    state.inventory.reserve_scratch(("pool-metadata", spec.pool_id), disks.metadata.dev)
    for number, disk in enumerate(disks.data):
        state.inventory.reserve_scratch((f"pool-{number}", spec.pool_id), disk.dev)
    # a disk that was to be appended when the agent was killed is not part of the pool
    more = spec.more_data_devices[: len(data) - 1]
    return Pool(state, spec.replace(more_data_devices=more), disks, table)


def _recover_mount(pool: Pool, mounted: Mounted, op: Transaction) -> None:
    """Adopt the mount of a volume, or take away what there is of it."""
    state, volume = pool.state, pool.records.volume(mounted.volume_id)
    info = None if volume is None else pool.active(volume.device_id)
    own = [] if info is None else [info]
    if info is not None and mounted.encrypted:
        crypt = state.control.find(uuid=dm_uuid("crypt", info.dev, state.uuid_prefix))
        own = [info] if crypt is None else [crypt, info]
    mount = find_mount(mounted.path)
    if own and mount is not None and mount.dev == own[0].dev:
        if mounted.mount_id:
            if not mounted.path.startswith(state.directory + "/"):  # no scratch
                owner = pool.mount_owner(mounted.volume_id)
                adopt_target(state, owner, mounted.path, mounted.created)
            found = mounted.replace(dev=mount.dev, mount_id=mount.mount_id)
            pool.mounts[mounted.volume_id] = found
            return
        unmount_target(mounted.path, op, dev=mount.dev)
    for device in own:
        pool.remove(device.name)
    remove_directories(mounted.created)
