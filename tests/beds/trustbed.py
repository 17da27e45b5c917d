"""A kernel that trusts a certificate of ours: the stock kernel, with its built-in one replaced.

Debian's kernel has one certificate in its built-in trusted keyring, of a key that was thrown away
after the build, and no other way to trust one but firmware. The code that checks signatures is the
same; only the anchor differs. The image is unpacked, which QEMU boots as an ELF file (PVH).

Source: certs/system_keyring.c (load_certificate_list).
"""

import datetime
import struct
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from rootfs.machine.vmlinux import unpack_kernel


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
        ValueError: the image does not hold exactly one certificate that is large enough.
    """
    elf = bytearray(unpack_kernel(image.read_bytes()))
    offset, size_bytes = _find_certificate(elf)
    if len(signer.der) > size_bytes:
        raise ValueError(f"{len(signer.der)} bytes of certificate for {size_bytes}")
    elf[offset : offset + size_bytes] = signer.der.ljust(size_bytes, b"\0")
    output.write_bytes(elf)
    return output


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
