"""Signatures of root digests that the kernel itself checks: PKCS#7 for ``root_hash_sig_key_desc``.

Signed is the root digest in lower-case hexadecimal, without a newline: the text of the table line.
The signature is detached, without attributes and without certificates, DER. It is byte for byte
what ``openssl smime -sign -noattr -nocerts -binary -outform der`` makes with the same RSA key.

Source: drivers/md/dm-verity-verify-sig.c (Linux 6.1); RFC 2315.
"""

from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import pkcs7

from guestagent.storage.verity import DIGEST_BYTES
from rootfs.pack.keys import PrivateKey, describe_key
from vsock.errors import CallError

__all__ = ("sign_root_digest", "verify_root_digest")

_SIGNED_DATA = bytes.fromhex("2a864886f70d010702")
_HASHES: dict[bytes, hashes.HashAlgorithm] = {
    bytes.fromhex("608648016503040201"): hashes.SHA256(),
    bytes.fromhex("608648016503040202"): hashes.SHA384(),
    bytes.fromhex("608648016503040203"): hashes.SHA512(),
}
_INTEGER, _OCTETS, _OID, _SEQUENCE, _SET, _TAG_0, _TAG_1 = 0x02, 0x04, 0x06, 0x30, 0x31, 0xA0, 0xA1
_MAX_BYTES = 64 * 1024


def sign_root_digest(root_digest: bytes, certificate: x509.Certificate, key: PrivateKey) -> bytes:
    """Return the signature (DER) of a root digest.

    ``certificate`` names the key to the kernel, which must have it in a trusted keyring.

    Raises:
        CallError: ``invalid``, no root digest; a key that the kernel cannot check, or not that of
            the certificate.
    """
    if len(root_digest) not in DIGEST_BYTES.values():
        raise _failed(f"no algorithm has digests of {len(root_digest)} bytes", "root_digest")
    if not isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey)):
        raise _failed(f"the kernel checks RSA and EC keys only, this is {describe_key(key)}", "key")
    if _encoded(key.public_key()) != _encoded(certificate.public_key()):
        raise _failed("the key is not the one of the certificate", "certificate")
    builder = pkcs7.PKCS7SignatureBuilder().set_data(_text(root_digest))
    options = [
        pkcs7.PKCS7Options.DetachedSignature,
        pkcs7.PKCS7Options.Binary,
        pkcs7.PKCS7Options.NoAttributes,
        pkcs7.PKCS7Options.NoCerts,
    ]
    return builder.add_signer(certificate, key, hashes.SHA256()).sign(
        serialization.Encoding.DER, options
    )


def verify_root_digest(root_digest: bytes, signature: bytes, certificate: x509.Certificate) -> None:
    """Return if ``signature`` (DER) is by the key of ``certificate`` over this root digest.

    Whether the certificate is to be trusted is the caller's, and the kernel's, to say.

    Raises:
        CallError: ``integrity``, it does not match; ``invalid``, it is no such signature.
    """
    try:
        signer = _read_signer(signature)
    except ValueError as problem:
        raise _failed(f"no PKCS#7 signature of the kernel's kind: {problem}", "signature") from None
    named = _issuer_and_serial(certificate)
    if signer.issuer_and_serial != named:
        raise _mismatch("it was made with another certificate", "certificate")
    key = certificate.public_key()
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(
                signer.signature, _text(root_digest), padding.PKCS1v15(), signer.hash_algorithm
            )
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signer.signature, _text(root_digest), ec.ECDSA(signer.hash_algorithm))
        else:
            raise _failed(f"the certificate has a {describe_key(key)} key", "certificate")
    except InvalidSignature:
        raise _mismatch("it is not over this root digest", "signature") from None


def _issuer_and_serial(certificate: x509.Certificate) -> bytes:
    """Return the content of the IssuerAndSerialNumber that names a certificate."""
    serial = certificate.serial_number
    octets = serial.to_bytes(serial.bit_length() // 8 + 1, "big", signed=True)
    return certificate.issuer.public_bytes() + bytes([_INTEGER, len(octets)]) + octets


class _Signer(NamedTuple):
    issuer_and_serial: bytes
    hash_algorithm: hashes.HashAlgorithm
    signature: bytes


class _Reader:
    """The elements of a DER value, one after the other."""

    def __init__(self, content: bytes) -> None:
        self._rest = content

    def take(self, tag: int) -> bytes:
        """Return the content of the next element, which must have this tag."""
        if len(self._rest) < 2 or self._rest[0] != tag:
            raise ValueError(f"no element of tag {tag:#04x} where one is due")
        length, start = self._rest[1], 2
        if length & 0x80:
            count = length & 0x7F
            start += count
            if not 1 <= count <= 3:
                raise ValueError("a length of no definite form")
            length = int.from_bytes(self._rest[2:start], "big")
        content = self._rest[start : start + length]
        if len(content) != length:
            raise ValueError("cut off")
        self._rest = self._rest[start + length :]
        return content

    def has(self, tag: int) -> bool:
        return self._rest[:1] == bytes([tag])

    def finish(self) -> None:
        if self._rest:
            raise ValueError(f"{len(self._rest)} bytes too many")


def _read_signer(signature: bytes) -> _Signer:
    if len(signature) > _MAX_BYTES:
        raise ValueError(f"{len(signature)} bytes")
    outer = _Reader(signature)
    info = _Reader(outer.take(_SEQUENCE))
    outer.finish()
    if info.take(_OID) != _SIGNED_DATA:
        raise ValueError("no SignedData")
    wrapped = _Reader(info.take(_TAG_0))
    info.finish()
    signed = _Reader(wrapped.take(_SEQUENCE))
    signed.take(_INTEGER)
    signed.take(_SET)
    content = _Reader(signed.take(_SEQUENCE))
    content.take(_OID)
    content.finish()  # content here would mean that it is not detached
    for optional in (_TAG_0, _TAG_1):  # certificates and revocation lists prove nothing
        if signed.has(optional):
            signed.take(optional)
    signers = _Reader(signed.take(_SET))
    signed.finish()
    signer = _Reader(signers.take(_SEQUENCE))
    signers.finish()
    return _one_signer(signer)


def _one_signer(signer: _Reader) -> _Signer:
    signer.take(_INTEGER)
    issuer_and_serial = signer.take(_SEQUENCE)
    digest = _Reader(signer.take(_SEQUENCE)).take(_OID)
    if digest not in _HASHES:
        raise ValueError("neither SHA-256, SHA-384 nor SHA-512")
    if signer.has(_TAG_0):
        raise ValueError("it has attributes: sign with -noattr")
    signer.take(_SEQUENCE)
    value = signer.take(_OCTETS)
    signer.finish()
    return _Signer(issuer_and_serial, _HASHES[digest], value)


def _text(root_digest: bytes) -> bytes:
    return root_digest.hex().encode("ascii")


def _encoded(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _failed(problem: str, field: str) -> CallError:
    return CallError(
        "invalid",
        f"cannot sign or check a root digest: {problem}",
        step="root digest signature",
        object=field,
    )


def _mismatch(problem: str, field: str) -> CallError:
    return CallError(
        "integrity",
        f"the signature of the root digest does not hold: {problem}",
        step="root digest signature",
        object=field,
    )
