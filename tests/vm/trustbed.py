"""A kernel that trusts a certificate of ours: the stock kernel, with its built-in one replaced.

Debian's kernel has one certificate in its built-in trusted keyring, of a key that was thrown away
after the build, and no other way to trust one but firmware. The code that checks signatures is the
same; only the anchor differs. The image is unpacked, which QEMU boots as an ELF file (PVH).

Source: Documentation/arch/x86/boot.rst (payload_offset, payload_length); certs/system_keyring.c.
"""

import datetime
import struct
import subprocess
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

_SETUP_SECTORS, _PAYLOAD = 0x1F1, 0x248
_LZ4_LEGACY = bytes.fromhex("02214c18")


class Signer:
    """An RSA key with its certificate."""

    def __init__(self, name: str) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        begin = datetime.datetime(2020, 1, 1)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(days=36500))
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False
            )
            .sign(self.key, hashes.SHA256())
        )

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)


def kernel_trusting(image: Path, signer: Signer, output: Path) -> Path:
    """Write the kernel ``image`` unpacked to ``output``, with ``signer`` in place of what it has.

    Raises:
        ValueError: the image is not packed with lz4, or holds no certificate to replace.
    """
    elf = bytearray(_unpack(image.read_bytes()))
    offset, size_bytes = _find_certificate(elf)
    if len(signer.der) > size_bytes:
        raise ValueError(f"{len(signer.der)} bytes of certificate for {size_bytes}")
    elf[offset : offset + size_bytes] = signer.der.ljust(size_bytes, b"\0")
    output.write_bytes(elf)
    return output


def _unpack(image: bytes) -> bytes:
    setup_bytes = (image[_SETUP_SECTORS] + 1) * 512
    offset, size_bytes = struct.unpack_from("<II", image, _PAYLOAD)
    # the last four bytes are the unpacked size, not part of the lz4 frame
    payload = image[setup_bytes + offset : setup_bytes + offset + size_bytes - 4]
    if not payload.startswith(_LZ4_LEGACY):
        raise ValueError(f"the kernel is not packed with lz4 but begins {payload[:6].hex()}")
    return subprocess.run(["lz4", "-dc"], input=payload, capture_output=True, check=True).stdout


def _find_certificate(elf: bytearray) -> tuple[int, int]:
    """Return (offset, length) of the one X.509 certificate in an image."""
    found = []
    offset = elf.find(b"\x30\x82")
    while offset >= 0:
        size_bytes = struct.unpack_from(">H", elf, offset + 2)[0] + 4
        if 400 < size_bytes < 4096 and elf[offset + 4 : offset + 6] == b"\x30\x82":
            try:
                x509.load_der_x509_certificate(bytes(elf[offset : offset + size_bytes]))
                found.append((offset, size_bytes))
            except ValueError:
                pass  # these bytes occur by chance, too
        offset = elf.find(b"\x30\x82", offset + 1)
    if len(found) != 1:
        raise ValueError(f"the kernel holds {len(found)} certificates, not one")
    return found[0]
