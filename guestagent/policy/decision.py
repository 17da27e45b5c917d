"""The decision about one action, and the value that says that it is allowed.

An agent without a policy imports this module alone of the room: it allows everything.
"""

from vsock.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from guestagent.policy.rules import Action, Rules, State

__all__ = ("ALLOWED_WITHOUT_POLICY", "Allowed", "Denied", "decide")

_KEY = object()


class Allowed:
    """Says that an action was judged and allowed; only ``decide`` makes one.

    What makes devices and mounts takes one, so that a path to it without a decision does not pass
    the type checker.
    """

    __slots__ = ()

    def __init__(self, key: object) -> None:
        if key is not _KEY:
            raise TypeError("only a decision makes an Allowed")


class Denied(Record):
    """``rule`` is told to the host; ``reason`` to the guest's own log alone."""

    rule: str
    reason: str


#: What ``decide`` returns where there is no policy.
ALLOWED_WITHOUT_POLICY = Allowed(_KEY)


def decide(
    policies: "Sequence[Rules] | None", state: "State", action: "Action"
) -> Allowed | Denied:
    """Judge one action by every policy in force: a narrowed policy is two, and both must allow.

    ``None`` is no policy, which allows everything; no element at all denies everything. A fault of
    a rule denies.
    """
    if policies is None:
        return ALLOWED_WITHOUT_POLICY
    if not policies:
        return Denied(rule="policy", reason="there is no policy yet")
    for rules in policies:
        try:
            denial = rules.find_denial(state, action)
        except Exception as error:  # what cannot be judged is not allowed
            return Denied(rule="internal", reason=f"{type(error).__name__}: {error}")
        if denial is not None:
            rule, reason = denial
            return Denied(rule=rule, reason=reason)
    return Allowed(_KEY)
