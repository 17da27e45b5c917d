"""Keys for the kernel, there only while a table is loaded: a signature, or what dm-crypt uses.

The kernel looks a key up by its type and description in the keyrings of the thread that loads the
table. The thread's own keyring is used, so that no other thread and no other process sees the key,
and it cannot outlive the thread. The payload of a ``logon`` key cannot be read back by anybody.

Source: drivers/md/dm-verity-verify-sig.c (Linux 5.4), drivers/md/dm-crypt.c (Linux 4.10),
keyctl(2), add_key(2).
"""

import os

from guestagent.storage import syscalls
from vsock.errors import CallError

__all__ = ("ThreadKey", "checks_signatures")

#: A parameter of the verity target that is there with CONFIG_DM_VERITY_VERIFY_ROOTHASH_SIG alone.
_PARAMETER = "/sys/module/dm_verity/parameters/require_signatures"


class ThreadKey:
    """A key in the calling thread's keyring; enter and leave it in one thread.

    Entering returns the description, by which a table names the key.

    Raises (on entering):
        OSError: ENOSYS, the kernel has no keyrings; EDQUOT, too many keys.
    """

    def __init__(self, key_type: str, description: str, payload: bytes | bytearray) -> None:
        """``description`` is one word of visible ASCII. A ``user`` key may hold a PKCS#7 in DER; a
        ``logon`` key has a description with a prefix, as PREFIX:NAME.

        Raises:
            ValueError: the description would not stay one word in a table line.
        """
        if not description or not all("!" <= char <= "~" for char in description):
            raise ValueError(f"key description must be one visible word, got {description!r}")
        self._type = key_type
        self._description = description
        self._payload = payload
        self._key: int | None = None

    def __enter__(self) -> str:
        self._key = syscalls.add_key(
            self._type, self._description, self._payload, syscalls.KEY_SPEC_THREAD_KEYRING
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


def checks_signatures() -> bool:
    """Say whether the kernel's verity target, which is there, checks signatures of root digests."""
    return os.path.exists(_PARAMETER)


def require_signature_checks() -> None:
    """Refuse where ``checks_signatures`` is false.

    Raises:
        CallError: ``unsupported``.
    """
    if not checks_signatures():
        raise CallError(
            "unsupported",
            "this kernel checks no signatures of root digests",
            step="version",
            object="params.verity.signature",
            hint="it is built without CONFIG_DM_VERITY_VERIFY_ROOTHASH_SIG",
        )
