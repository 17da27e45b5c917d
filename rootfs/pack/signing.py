"""Detached signatures over manifests, by Ed25519 or by ECDSA on P-256 with SHA-256.

What is signed is a line that says so, ``guestagent-manifest-signature-v2`` and a newline, and then
the canonical form of the manifest (``rootfs.pack.canonical``), not the file, so that white space
does not matter. By this line a signature over a manifest holds for nothing else that the same key
signs: no JSON document, no root digest and no file without the line has the same bytes. The
signature is a JSON object beside the manifest, ``MANIFEST.sig``:

    {"algorithm": "ed25519",            or "ecdsa-p256-sha256"
     "digest": "sha256:HEX",            of what was signed: says at once that it is another manifest
     "key_id": "sha256:HEX",            of the SubjectPublicKeyInfo (DER) of the key
     "signature": "BASE64",             64 bytes for Ed25519, an ECDSA-Sig-Value (DER) for ECDSA
     "version": 2}

Any tool can check it: ``openssl pkeyutl -verify -rawin`` or ``openssl dgst -sha256 -verify`` over
the line and the canonical bytes. Nothing in this file but ``signature`` is trusted. Version 1 was
over the canonical bytes alone and is refused.
"""

import base64
import binascii
import dataclasses
import hashlib
import hmac
import re
from collections.abc import Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from rootfs.pack.canonical import canonical_bytes, parse_json
from rootfs.pack.keys import PrivateKey, PublicKey, describe_key
from vsock.errors import CallError

__all__ = ("Signature", "key_id", "sign_manifest", "verify_manifest")

_VERSION = 2
#: The first line of what is signed; it changes with ``_VERSION``.
_CONTEXT = b"guestagent-manifest-signature-v2\n"
_ED25519 = "ed25519"
_ECDSA = "ecdsa-p256-sha256"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z", re.ASCII)
_MAX_SIGNATURE_BYTES = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The content of a signature file."""

    algorithm: str
    digest: str
    key_id: str
    signature: bytes

    def to_json(self) -> bytes:
        """Return the bytes of the file."""
        fields = dataclasses.asdict(self)
        fields["signature"] = base64.b64encode(self.signature).decode("ascii")
        return canonical_bytes({**fields, "version": _VERSION}) + b"\n"

    @classmethod
    def parse(cls, raw: bytes) -> "Signature":
        """Read the bytes of a file.

        Raises:
            CallError: ``invalid``; ``object`` is the field.
        """
        try:
            fields = parse_json(raw)
        except ValueError as problem:
            raise _invalid("signature file", str(problem)) from None
        names = {"version", *(field.name for field in dataclasses.fields(cls))}
        for name in sorted(names ^ set(fields)):
            raise _invalid(name, "missing" if name in names else "unknown")
        if fields["version"] == 1:
            why = "1 does not say that what it signs is a manifest: sign the manifest again"
            raise _invalid("version", why)
        if fields["version"] != _VERSION:
            raise _invalid("version", f"{fields['version']!r} is not {_VERSION}")
        texts = {name: fields[name] for name in names - {"version"}}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise _invalid(name, "no text")
        for name in ("digest", "key_id"):
            if not _DIGEST.match(str(texts[name])):
                raise _invalid(name, f"{texts[name]!r} is not sha256: and 64 hexadecimal digits")
        return cls(
            algorithm=_known_algorithm(str(texts["algorithm"])),
            digest=str(texts["digest"]),
            key_id=str(texts["key_id"]),
            signature=_decoded(str(texts["signature"])),
        )


def sign_manifest(manifest: Mapping[str, object], key: PrivateKey) -> Signature:
    """Sign a manifest, as the module's docstring says.

    Raises:
        CallError: ``invalid``, a manifest without a canonical form, or a key of another kind.
    """
    message = _message(manifest)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        value = key.sign(message)
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        _algorithm_of(key.public_key())
        value = key.sign(message, ec.ECDSA(hashes.SHA256()))
    else:
        raise _wrong_key(key)
    public = key.public_key()
    return Signature(
        algorithm=_algorithm_of(public),
        digest=_digest(message),
        key_id=key_id(public),
        signature=value,
    )


def verify_manifest(manifest: Mapping[str, object], signature: Signature, key: PublicKey) -> None:
    """Return if ``signature`` is by ``key`` over this manifest.

    Raises:
        CallError: ``integrity``, it is not, and ``object`` says why: ``key_id`` (another key),
            ``digest`` (another manifest) or ``signature``; ``invalid`` as ``sign_manifest``.
    """
    message = _message(manifest)
    algorithm = _algorithm_of(key)
    if not hmac.compare_digest(signature.key_id, key_id(key)):
        raise _mismatch("key_id", f"made by {signature.key_id}, the key at hand is {key_id(key)}")
    if signature.algorithm != algorithm:
        raise _mismatch("algorithm", f"it says {signature.algorithm}, the key is {algorithm}")
    if signature.digest != _digest(message):
        raise _mismatch("digest", f"signed was {signature.digest}, this is {_digest(message)}")
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature.signature, message)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature.signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise _mismatch("signature", "it was not made by this key over this manifest") from None


def key_id(key: PublicKey) -> str:
    """Return the name of a key: the digest of its SubjectPublicKeyInfo."""
    return _digest(
        key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


def _algorithm_of(key: PublicKey) -> str:
    if isinstance(key, ed25519.Ed25519PublicKey):
        return _ED25519
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return _ECDSA
    raise _wrong_key(key)


def _known_algorithm(name: str) -> str:
    if name not in (_ED25519, _ECDSA):
        raise _invalid("algorithm", f"{name!r} is neither {_ED25519} nor {_ECDSA}")
    return name


def _decoded(text: str) -> bytes:
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _invalid("signature", "not base64") from None
    if not 0 < len(value) <= _MAX_SIGNATURE_BYTES:
        raise _invalid("signature", f"{len(value)} bytes")
    return value


def _message(manifest: Mapping[str, object]) -> bytes:
    try:
        return _CONTEXT + canonical_bytes(manifest)
    except ValueError as problem:
        raise _invalid("manifest", str(problem)) from None


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _wrong_key(key: object) -> CallError:
    return CallError(
        "invalid",
        f"cannot sign a manifest with a {describe_key(key)} key: Ed25519 or EC secp256r1 is needed",
        step="sign",
        object="key",
    )


def _invalid(field: str, problem: str) -> CallError:
    return CallError(
        "invalid", f"bad signature: {field}: {problem}", step="read the signature", object=field
    )


def _mismatch(field: str, problem: str) -> CallError:
    return CallError(
        "integrity", f"the signature does not hold: {problem}", step="verify", object=field
    )
