"""The handlers of parts that most agents are never asked for; each part is loaded when it is."""

from guestagent.service.context import Handler, handlers_of, late_handlers_of
from vsock.errors import CallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guestagent.engine.engine import Engine
    from guestagent.policy.binding.keeper import PolicyKeeper

__all__ = ("late_handlers",)


def late_handlers(
    method: str, engine: "Engine", policy: "PolicyKeeper | None"
) -> dict[str, Handler]:
    """Load the part that a method belongs to; return all handlers of the part.

    Raises:
        CallError: ``unsupported``, the method is about a policy and this process holds none.
    """
    if method.startswith("dev."):
        from guestagent.devtree.trees import DevTrees

        trees = DevTrees(engine.state)
        engine.parts.append(trees.take_downs)
        return late_handlers_of(engine, trees)
    if method.startswith("net."):
        from guestagent.net.network import Network

        return late_handlers_of(engine, Network(engine.state))
    if method.startswith("policy."):
        from guestagent.service.policy import PolicyHandlers

        if policy is None:
            text = "this process holds no policy"
            raise CallError("unsupported", text, step="policy", object=method)
        return handlers_of(PolicyHandlers(engine, policy))
    if method.startswith(("pool.", "volume.")):
        from guestagent.thin.part import Thin

        thin = Thin(engine)
        return late_handlers_of(engine, thin.pools, thin.volumes, thin.mounts)
    if method.startswith("share."):
        from guestagent.share.shares import Shares

        shares = Shares(engine.state)
        engine.parts.append(shares.take_downs)
        return late_handlers_of(engine, shares)
    from guestagent.service.streams import InspectHandlers

    return InspectHandlers(engine).table
