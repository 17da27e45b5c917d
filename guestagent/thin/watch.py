"""Waits for events of the kernel while there are pools.

A pool that becomes full or fails raises an event of its dm device. A volume that was in use and is
to be deleted is deleted when the kernel has removed its dm device, which is a uevent.
"""

import errno
import threading
from contextlib import ExitStack

from guestagent.engine.engine import Engine
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.devicemapper.thin import PoolStatus
from guestagent.storage.uevents import UeventSocket
from guestagent.thin.pool import Pool
from guestagent.thin.pools import Pools
from guestagent.thin.volumes import Volumes
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import log
from vsock.threads import Waker, start_thread

__all__ = ("Watcher",)

#: A deletion that takes longer waits for the next event.
_DELETE_SECONDS = 30.0


class Watcher:
    """Runs a thread while there are pools."""

    def __init__(self, engine: Engine, pools: Pools, volumes: Volumes) -> None:
        self._engine = engine
        self._pools = pools
        self._volumes = volumes
        self._until = Deadline()
        self._waker = Waker()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Look again: a pool was opened, or a deletion began to wait."""
        with self._lock:
            if self._thread is None and self._pools.all() and not self._until.cancelled:
                self._thread = threading.Thread(target=self._run, name="pools", daemon=True)
                start_thread(self._thread)
        self._waker.wake()

    def close(self) -> None:
        """End the thread and wait for it. Idempotent."""
        self._until.cancel()
        thread = self._thread
        if thread is not None:
            thread.join()
        self._waker.close()
        self._until.close()

    def _run(self) -> None:
        try:
            with Control() as control:
                while self._goes_on():
                    control.arm_poll()
                    self._round(control)
        except CallError:  # closed
            return

    def _goes_on(self) -> bool:
        """Return whether there are pools; else the next one starts another thread."""
        with self._lock:
            if not self._pools.all():
                self._thread = None
            return self._thread is not None

    def _round(self, control: Control) -> None:
        waiting = [pool for pool in self._pools.all() if pool.is_deleting()]
        descriptors = [control.fileno(), self._waker.fd]
        with ExitStack() as stack:
            if waiting:  # subscribed before looking, so that no event falls between
                descriptors.append(stack.enter_context(UeventSocket()).fileno())
            for pool in self._pools.all():
                self._look_at(pool)
            for pool in waiting:
                self._delete(pool)
            self._until.wait(descriptors, "watch pools")
            self._waker.clear()

    def _delete(self, pool: Pool) -> None:
        """Delete the volumes of a pool whose deletion waits and that are not in use any more."""
        with (
            self._engine.state.locks.hold([("pool", pool.pool_id)], self._until),
            self._until.part(_DELETE_SECONDS) as deadline,
        ):
            if pool in self._pools.all() and pool.records.pending is None:
                self._volumes.delete_waiting(pool, self._engine.operation(deadline))

    def _look_at(self, pool: Pool) -> None:
        """Publish how the mode and the free space of a pool have changed."""
        try:
            status = pool.status()
        except OSError as error:
            if error.errno != errno.ENXIO:  # closed since
                log.warning("a pool does not answer", pool=pool.pool_id, error=str(error))
            return
        publish = self._engine.events.publish
        is_low, detail = _is_low(pool, status)
        if is_low and not pool.was_low:
            publish("pool_low_space", pool_id=pool.pool_id, detail=detail)
        pool.was_low = is_low
        mode = "ro" if status.needs_check and status.mode == "rw" else status.mode
        if mode == pool.last_mode:
            return
        pool.last_mode = mode
        inventory, key = self._engine.state.inventory, f"pool {pool.pool_id}"
        if mode == "rw":
            inventory.settle_problem(key)
            publish("pool_recovered", pool_id=pool.pool_id)
            return
        inventory.note_problem(key, f"pool {pool.pool_id!r} is {mode}")
        kind = "pool_out_of_space" if mode == "out_of_data_space" else "pool_failed"
        publish(kind, pool_id=pool.pool_id, detail=mode)


def _is_low(pool: Pool, status: PoolStatus) -> tuple[bool, str]:
    """Return whether data or metadata are below their low-water mark, and what is free."""
    if status.mode == "failed":
        return False, ""
    data = status.total_data_blocks - status.used_data_blocks
    metadata = status.total_metadata_blocks - status.used_metadata_blocks
    is_low = data <= pool.table.low_water_blocks
    is_low = is_low or metadata < (status.metadata_low_water_blocks or 0)
    detail = f"{data} of {status.total_data_blocks} blocks of data are free, "
    return is_low, detail + f"{metadata} of {status.total_metadata_blocks} of metadata"
