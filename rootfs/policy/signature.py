"""Signatures of policies, as the guest reads them: the 64 bytes of Ed25519 (RFC 8032) and nothing
else, over a line that says what is signed and the bytes of the policy."""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from rootfs.pack.keys import PrivateKey, PublicKey, describe_key
from vsock.errors import CallError

__all__ = ("SIGNATURE_BYTES", "key_line", "sign_policy", "verify_policy")

SIGNATURE_BYTES = 64
#: By this line a signature over a policy holds for nothing else that the same key signs.
_CONTEXT = b"guestagent-policy-signature-v1\n"


def sign_policy(raw: bytes, key: PrivateKey) -> bytes:
    """Return the signature over the bytes of a policy.

    Raises:
        CallError: ``invalid``, the key is not Ed25519.
    """
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise _wrong_key(key)
    return key.sign(_CONTEXT + raw)


def verify_policy(raw: bytes, signature: bytes, key: PublicKey) -> None:
    """Return if ``signature`` is by ``key`` over the bytes of a policy.

    Raises:
        CallError: ``integrity``, it is not; ``invalid``, the key is not Ed25519.
    """
    try:
        _ed25519(key).verify(signature, _CONTEXT + raw)
    except InvalidSignature:
        raise CallError(
            "integrity",
            "the signature was not made by this key over this policy",
            step="verify the signature",
            object="signature",
        ) from None


def key_line(key: PublicKey, min_svn: int) -> bytes:
    """Return the file of a boot image that asks for policies signed by ``key``, whose security
    version is no less than ``min_svn``.

    Raises:
        CallError: ``invalid``, the key is not Ed25519.
    """
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    return f"ed25519 {_ed25519(key).public_bytes(*raw).hex()} min_svn={min_svn}\n".encode()


def _ed25519(key: PublicKey) -> ed25519.Ed25519PublicKey:
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise _wrong_key(key)
    return key


def _wrong_key(key: object) -> CallError:
    text = f"cannot use a {describe_key(key)} key for policies: Ed25519 is needed"
    return CallError("invalid", text, step="load the key", object="key")
