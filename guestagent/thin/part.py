"""Pools and volumes together, as a part of the agent."""

from collections.abc import Callable, Iterator
from functools import partial

from guestagent.api.thin import PoolClose
from guestagent.engine.engine import Engine
from guestagent.engine.teardown import undo_deadline
from guestagent.engine.transaction import Transaction
from guestagent.thin.pool import Pool
from guestagent.thin.pools import Pools
from guestagent.thin.volumes import Volumes
from guestagent.thin.watch import Watcher

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
        engine.lower_parts.append(self.take_downs)

    def take_downs(self) -> Iterator[Callable[[Transaction], object]]:
        """Yield what takes down each pool."""
        return (partial(self._take_down, pool) for pool in self.pools.all())

    def _take_down(self, pool: Pool, op: Transaction) -> None:
        with self.pools.use(pool.pool_id, op):
            self.volumes.unmount_all(pool, op)
        self.pools.close(PoolClose(pool_id=pool.pool_id), op)
