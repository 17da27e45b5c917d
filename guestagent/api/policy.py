"""The policy of the guest: putting one in force, narrowing it, and asking which it is."""

from collections.abc import Mapping

from guestagent.api.checks import check_range
from guestagent.api.request import Request
from vsock.record import Record

#: Whether there is a policy.
POLICY_STATES = {
    "none": "there is none, and everything is allowed",
    "required": "there is none yet, and nothing is allowed before there is",
    "set": "a policy is in force",
    "inconsistent": "what is mounted is not what the policy allows: the machine can only end",
}
_SIGNATURE_BYTES = 64
_MAX_DOCUMENT_BYTES = 1024 * 1024


class PolicyReply(Record):
    """Which policy is in force. ``digest`` is the SHA-256 of its bytes, in hexadecimal, ``svn`` its
    security version. ``bound_by`` says what has vouched for it besides the one who set it: image,
    sha256, tsm, signature. ``narrowed`` counts the narrowings, ``denials`` by rule what was denied
    since this agent began. ``already``: just this one was in force before.
    """

    state: str
    name: str = ""
    svn: int = 0
    digest: str = ""
    bound_by: tuple[str, ...] = ()
    narrowed: int = 0
    denials: Mapping[str, int] = {}
    already: bool = False


class PolicySet(Request[PolicyReply], method="policy.set"):
    """Put a policy in force, once, until the machine ends.

    ``document`` has its bytes, in the canonical form of docs/policy.md. ``signature`` is Ed25519,
    by the key in the boot image. A policy that does not allow what is mounted is refused.
    """

    document: bytes
    signature: bytes | None = None

    def check(self) -> None:
        check_range("document length", len(self.document), 1, _MAX_DOCUMENT_BYTES)
        if self.signature is not None and len(self.signature) != _SIGNATURE_BYTES:
            raise ValueError(f"signature has {len(self.signature)} bytes, not {_SIGNATURE_BYTES}")


class PolicyNarrow(Request[PolicyReply], method="policy.narrow"):
    """Have a second policy judge as well: from now on both must allow.

    Three narrowings are kept. None is ever taken back.
    """

    document: bytes

    def check(self) -> None:
        check_range("document length", len(self.document), 1, _MAX_DOCUMENT_BYTES)


class PolicyGet(Request[PolicyReply], method="policy.get"):
    """Say which policy is in force, and what it has denied."""
