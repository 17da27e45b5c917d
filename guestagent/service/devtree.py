"""The ``dev.`` methods: private /dev trees."""

from guestagent.api.devtree import (
    DevAdd,
    DevAttach,
    DevAttachReply,
    DevClosure,
    DevCreate,
    DevDestroy,
    DevList,
    DevListReply,
    DevPathsReply,
    DevRemove,
    DevRemoveReply,
    DevTree,
)
from guestagent.api.request import Empty
from guestagent.devtree.trees import DevTrees
from guestagent.engine.engine import Engine
from guestagent.service.context import Context, handles

__all__ = ("DevHandlers",)


class DevHandlers:
    """Every handler hands its request to the trees."""

    def __init__(self, engine: Engine) -> None:
        """Adopt what an earlier agent has left."""
        self._engine = engine
        self._trees = DevTrees(engine.state)
        engine.parts.append(self._trees.take_downs)

    @handles(DevCreate)
    def create(self, request: DevCreate, call: Context) -> DevTree:
        """Make a tree."""
        return self._trees.create(request, call.begin(self._engine))

    @handles(DevAdd)
    def add(self, request: DevAdd, call: Context) -> DevPathsReply:
        """Add paths to a tree."""
        return self._trees.add(request, call.begin(self._engine))

    @handles(DevRemove)
    def remove(self, request: DevRemove, call: Context) -> DevRemoveReply:
        """Take paths out of a tree."""
        return self._trees.remove(request, call.begin(self._engine))

    @handles(DevClosure)
    def closure(self, request: DevClosure, call: Context) -> DevPathsReply:
        """Say what paths need."""
        return self._trees.closure(request, call.begin(self._engine))

    @handles(DevList)
    def list(self, request: DevList, call: Context) -> DevListReply:
        """Report every tree, or one with its files."""
        return DevListReply(trees=self._trees.list(request.tree_id, call.begin(self._engine)))

    @handles(DevAttach)
    def attach(self, request: DevAttach, call: Context) -> DevAttachReply:
        """Mount a tree on a directory."""
        return self._trees.attach(request, call.begin(self._engine))

    @handles(DevDestroy)
    def destroy(self, request: DevDestroy, call: Context) -> Empty:
        """Take a tree away."""
        self._trees.destroy(request.tree_id, call.begin(self._engine))
        return Empty()
