"""Pools and volumes together, as a part of the agent."""

from guestagent.api.thin import PoolClose
from guestagent.engine.engine import Engine
from guestagent.engine.teardown import undo_deadline
from guestagent.engine.transaction import Transaction
from guestagent.thin.pools import Pools
from guestagent.thin.volumes import Volumes
from guestagent.thin.watch import Watcher
from vsock.errors import CallError
from vsock.log import log

__all__ = ("Thin",)


class Thin:
    """``pools`` and ``volumes``. What an earlier agent had open is taken over at once."""

    def __init__(self, engine: Engine) -> None:
        self.pools = Pools(engine)
        self.volumes = Volumes(engine, self.pools)
        engine.state.pool_scratches = self.volumes
        self._watcher = Watcher(engine, self.pools, self.volumes)
        self.pools.on_change = self._watcher.wake
        self.pools.recover()
        for pool in self.pools.all():
            with undo_deadline(engine.state) as deadline:
                self.volumes.delete_waiting(pool, engine.operation(deadline))
        self._watcher.wake()
        engine.closers.append(self._watcher.close)
        engine.lower_parts.append(self.take_down_all)

    def take_down_all(self, op: Transaction, force: bool) -> None:
        """Unmount every volume and close every pool.

        Raises:
            CallError: ``busy``, the first that could not go; with ``force`` the rest goes anyway.
        """
        for pool in self.pools.all():
            try:
                with self.pools.use(pool.pool_id, op):
                    self.volumes.unmount_all(pool, op)
                self.pools.close(PoolClose(pool_id=pool.pool_id), op)
            except CallError as error:
                if not force:
                    raise
                log.warning("left behind", error=str(error))
