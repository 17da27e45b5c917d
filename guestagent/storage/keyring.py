"""Keys for the kernel: the signature of a verity root digest, there only while a table is loaded.

The kernel looks a ``user`` key up by its description in the keyrings of the thread that loads the
table. The thread's own keyring is used, so that no other thread and no other process sees the key,
and it cannot outlive the thread.

Source: drivers/md/dm-verity-verify-sig.c (Linux 5.4), keyctl(2), add_key(2).
"""

import os

from guestagent.storage import syscalls

__all__ = ("SignatureKey", "checks_signatures", "signature_key")

#: A parameter of the verity target that is there with CONFIG_DM_VERITY_VERIFY_ROOTHASH_SIG alone.
_PARAMETER = "/sys/module/dm_verity/parameters/require_signatures"


class SignatureKey:
    """A key in the calling thread's keyring; enter and leave it in one thread.

    Entering returns the description, which goes into the table's ``root_hash_sig_key_desc``.
    """

    def __init__(self, description: str, signature: bytes) -> None:
        """``description`` is one word of visible ASCII; ``signature`` a PKCS#7 in DER.

        Raises:
            ValueError: the description would not stay one word in a table line.
        """
        if not description or not all("!" <= char <= "~" for char in description):
            raise ValueError(f"key description must be one visible word, got {description!r}")
        self._description = description
        self._signature = signature
        self._key: int | None = None

    def __enter__(self) -> str:
        self._key = syscalls.add_key(
            "user", self._description, self._signature, syscalls.KEY_SPEC_THREAD_KEYRING
        )
        return self._description

    def __exit__(self, *_: object) -> None:
        key, self._key = self._key, None
        if key is not None:
            syscalls.keyctl(
                syscalls.KEYCTL_UNLINK,
                key,
                syscalls.KEY_SPEC_THREAD_KEYRING,
                filename=self._description,
            )


def signature_key(description: str, signature: bytes) -> SignatureKey:
    """Return a context manager that holds ``signature`` under ``description``.

    Raises (on entering):
        OSError: ENOSYS, the kernel has no keyrings; EDQUOT, too many keys.
    """
    return SignatureKey(description, signature)


def checks_signatures() -> bool:
    """Say whether the kernel's verity target, which is there, checks signatures of root digests."""
    return os.path.exists(_PARAMETER)
