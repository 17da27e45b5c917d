"""The guest's network: each request is done by a child of its own (``guestagent.net``)."""

from guestagent.api.net import NetConfigure, NetConfigureReply, NetList, NetListReply
from guestagent.engine.engine import Engine
from guestagent.net.network import configure_network, list_network
from guestagent.service.context import Context, handles

__all__ = ("NetHandlers",)


class NetHandlers:
    """One child at a time, whatever connections ask."""

    def __init__(self, engine: Engine) -> None:
        self._state = engine.state

    @handles(NetConfigure)
    def configure(self, request: NetConfigure, call: Context) -> NetConfigureReply:
        """Set up the network: all of it, or what was there."""
        with self._state.locks.hold([("network", "")], call.deadline):
            return configure_network(
                request,
                self._state.directory,
                call.deadline,
                faults=self._state.faults.to_text(),
            )

    @handles(NetList)
    def list(self, _request: NetList, call: Context) -> NetListReply:
        """Report the network."""
        with self._state.locks.hold([("network", "")], call.deadline):
            return list_network(self._state.directory, call.deadline)
