"""The policy: set once, narrowed, told."""

from guestagent.api.policy import PolicyGet, PolicyNarrow, PolicyReply, PolicySet
from guestagent.api.request import handles
from guestagent.engine.engine import Engine
from guestagent.policy.binding.keeper import PolicyKeeper
from guestagent.service.context import Context

__all__ = ("PolicyHandlers",)


class PolicyHandlers:
    """A policy gets into force while nothing else is done, so that no request that began without it
    ends after it."""

    def __init__(self, engine: Engine, keeper: PolicyKeeper) -> None:
        self._engine = engine
        self._keeper = keeper

    @handles(PolicySet)
    def set(self, request: PolicySet, call: Context) -> PolicyReply:
        """Put a policy in force."""
        with self._engine.state.locks.hold_all(call.deadline):
            judge = self._engine.find_denied
            already = self._keeper.set(request.document, request.signature, judge)
        return self._reply().replace(already=already)

    @handles(PolicyNarrow)
    def narrow(self, request: PolicyNarrow, call: Context) -> PolicyReply:
        """Let a second policy judge as well."""
        with self._engine.state.locks.hold_all(call.deadline):
            already = self._keeper.narrow(request.document, self._engine.find_denied_layer)
        return self._reply().replace(already=already)

    @handles(PolicyGet)
    def get(self, _request: PolicyGet, _call: Context) -> PolicyReply:
        """Tell which policy is in force."""
        return self._reply()

    def _reply(self) -> PolicyReply:
        keeper, gate = self._keeper, self._keeper.gate
        policies = keeper.policies
        reply = PolicyReply(
            state=keeper.state,
            bound_by=keeper.bound_by,
            denials=dict(gate.denials),
        )
        if not policies:
            return reply
        return reply.replace(
            name=policies[0].name,
            svn=policies[0].svn,
            digest=keeper.digest(),
            narrowed=len(policies) - 1,
        )
