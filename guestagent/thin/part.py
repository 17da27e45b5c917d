"""Pools, their volumes, the mounts of these and the scratches on them: one part of the agent."""

from collections.abc import Callable, Iterator
from functools import partial

from guestagent.api.thin import PoolClose
from guestagent.engine.engine import Engine
from guestagent.engine.teardown import undo_deadline
from guestagent.engine.transaction import Transaction
from guestagent.thin.mounts import Mounts
from guestagent.thin.pool import Pool
from guestagent.thin.pools import Pools
from guestagent.thin.scratches import Scratches
from guestagent.thin.volumes import Volumes
from guestagent.thin.watch import Watcher

__all__ = ("Thin",)


class Thin:
    """What an earlier agent had open is taken over at once."""

    def __init__(self, engine: Engine) -> None:
        state = engine.state
        self.pools = Pools(state)
        self.volumes = Volumes(self.pools)
        self.mounts = Mounts(self.pools, self.volumes)
        state.pool_scratches = Scratches(self.pools, self.volumes)
        watcher = Watcher(engine, self.pools, self.volumes)
        self.pools.on_change = watcher.wake
        self.pools.recover()
        for pool in self.pools.all():
            with undo_deadline(state) as deadline:
                self.volumes.delete_waiting(pool, engine.operation(deadline))
        watcher.wake()
        engine.closers.append(watcher.close)
        engine.lower_parts.append(self.take_downs)

    def take_downs(self) -> Iterator[Callable[[Transaction], object]]:
        """Yield what takes down each pool."""
        return (partial(self._take_down, pool) for pool in self.pools.all())

    def _take_down(self, pool: Pool, op: Transaction) -> None:
        with self.pools.use(pool.pool_id, op):
            self.mounts.unmount_all(pool, op)
        self.pools.close(PoolClose(pool_id=pool.pool_id), op)
