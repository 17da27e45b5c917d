"""The ``share.`` methods: directories that the host serves."""

from guestagent.api.layers import UnmountReply
from guestagent.api.share import ShareList, ShareListReply, ShareMount, ShareReport, ShareUnmount
from guestagent.engine.engine import Engine
from guestagent.service.context import Context, handles
from guestagent.share.shares import Shares

__all__ = ("ShareHandlers",)


class ShareHandlers:
    """Every handler hands its request to the shares."""

    def __init__(self, engine: Engine) -> None:
        """Adopt what an earlier agent has left."""
        self._engine = engine
        self._shares = Shares(engine.state)
        engine.parts.append(self._shares.take_downs)

    @handles(ShareMount)
    def mount(self, request: ShareMount, call: Context) -> ShareReport:
        """Mount a shared directory."""
        return self._shares.mount(request, call.begin(self._engine))

    @handles(ShareUnmount)
    def unmount(self, request: ShareUnmount, call: Context) -> UnmountReply:
        """Unmount a shared directory."""
        return self._shares.unmount(request.share_id, call.begin(self._engine))

    @handles(ShareList)
    def list(self, _request: ShareList, _call: Context) -> ShareListReply:
        """Report every shared directory."""
        return ShareListReply(shares=self._shares.list())
