"""Keys and certificates from files, PEM or DER, with errors that say what is wrong with them."""

import os
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from rootfs.imagefile.errors import OsErrors
from vsock.errors import CallError

__all__ = (
    "Path",
    "PrivateKey",
    "PublicKey",
    "describe_key",
    "load_certificate",
    "load_private_key",
    "load_public_key",
)

PrivateKey: TypeAlias = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey: TypeAlias = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey
Path: TypeAlias = str | os.PathLike[str]

_PEM = b"-----BEGIN "
_MAX_FILE_BYTES = 1 << 20


def load_private_key(path: Path, *, password: bytes | None = None) -> PrivateKey:
    """Read a private key (PKCS#8, or the older forms that OpenSSL writes).

    Raises:
        CallError: ``denied``, encrypted and no or the wrong password; ``invalid``, no private key
            or of a kind that nothing here signs with; by errno.
    """
    raw = _read(path)
    if raw.lstrip().startswith(_PEM) and b"PRIVATE KEY-----" not in raw:
        raise _bad(path, "it holds no private key", "a private key")
    load = (
        serialization.load_pem_private_key
        if raw.lstrip().startswith(_PEM)
        else serialization.load_der_private_key
    )
    try:
        key = load(raw, password)
    except TypeError:  # the only sign of a password that is missing, or one too many
        if password is None:
            raise _locked(path, "it is encrypted, and no password is given") from None
        raise _bad(path, "a password is given, but it is not encrypted", "a private key") from None
    except (ValueError, UnsupportedAlgorithm) as problem:
        if password is not None:
            raise _locked(path, "the password is wrong, or the file is damaged") from None
        raise _bad(path, str(problem), "a private key") from None
    if not isinstance(key, PrivateKey):
        raise _bad(path, f"a {describe_key(key)} key cannot be used here", "a private key")
    return key


def load_public_key(path: Path) -> PublicKey:
    """Read a public key, or that of a certificate.

    Raises:
        CallError: ``invalid``, no public key; by errno.
    """
    raw = _read(path)
    if b"PRIVATE KEY-----" in raw:
        raise _bad(path, "it is a private key, which a verifier should not have", "a public key")
    try:
        if b"CERTIFICATE-----" in raw:
            key: object = x509.load_pem_x509_certificate(raw).public_key()
        elif raw.lstrip().startswith(_PEM):
            key = serialization.load_pem_public_key(raw)
        else:
            key = serialization.load_der_public_key(raw)
    except (ValueError, UnsupportedAlgorithm) as problem:
        raise _bad(path, str(problem), "a public key") from None
    if not isinstance(key, PublicKey):
        raise _bad(path, f"a {describe_key(key)} key cannot be used here", "a public key")
    return key


def load_certificate(path: Path) -> x509.Certificate:
    """Read an X.509 certificate.

    Raises:
        CallError: ``invalid``, no certificate; by errno.
    """
    raw = _read(path)
    try:
        if raw.lstrip().startswith(_PEM):
            return x509.load_pem_x509_certificate(raw)
        return x509.load_der_x509_certificate(raw)
    except ValueError as problem:
        raise _bad(path, str(problem), "a certificate") from None


def describe_key(key: object) -> str:
    """Return what kind of key it is, for a message."""
    if isinstance(key, (ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey)):
        return f"EC {key.curve.name}"
    name = type(key).__name__.lstrip("_")
    return name.removesuffix("PrivateKey").removesuffix("PublicKey") or name


def _read(path: Path) -> bytes:
    with OsErrors("read the key", path), open(path, "rb") as file:
        return file.read(_MAX_FILE_BYTES)


def _bad(path: Path, reason: str, wanted: str) -> CallError:
    return CallError(
        "invalid",
        f"cannot use {os.fspath(path)!r} as {wanted}: {reason}",
        step="load the key",
        object=os.fspath(path),
    )


def _locked(path: Path, reason: str) -> CallError:
    return CallError(
        "denied",
        f"cannot read the private key {os.fspath(path)!r}: {reason}",
        step="load the key",
        object=os.fspath(path),
    )
