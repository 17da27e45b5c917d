"""What must vouch for a policy before it is in force: all that is there must agree.

* a policy in the boot image, at ``POLICY_PATH``;
* ``guestagent.policy=PATH,sha256=HEX`` on the command line, or ``tsm``: the TEE's own report;
* a signature by the key in the boot image at ``KEY_PATH``, over a security version that is no less
  than the one beside it.

A boot image with a key, and a command line that says so, are for policies that must be there: until
one is set, all but hello, status, ``policy.set`` and the end of the machine is denied.
"""

import os

from guestagent.policy.binding import KEY_PATH, POLICY_PATH
from guestagent.policy.binding.ed25519 import KEY_BYTES, is_signed
from guestagent.policy.binding.tee import launch_digest
from guestagent.policy.document import MAX_POLICY_BYTES, Policy, read_policy
from guestagent.storage.hashing import new_hash
from vsock.errors import CallError
from vsock.record import Record

__all__ = (
    "SIGNATURE_CONTEXT",
    "Binding",
    "accept",
    "digest_of",
    "find_policy",
    "read_binding",
)

#: What a signature is over, before the bytes of the policy: no signature over anything else counts.
SIGNATURE_CONTEXT = b"guestagent-policy-signature-v1\n"
_MAX_KEY_FILE_BYTES = 256
_MAX_SIGNATURE_BYTES = 64


class Binding(Record):
    """What the boot image and the command line ask for. ``word`` is required, tsm, none, or empty;
    ``path`` and ``sha256`` name a policy; ``key`` with ``min_svn`` is who must have signed it."""

    word: str = ""
    path: str = ""
    sha256: bytes | None = None
    key: bytes | None = None
    min_svn: int = 0

    @property
    def is_required(self) -> bool:
        """Whether nothing may be done without a policy."""
        return self.word in ("required", "tsm") or bool(self.path) or self.key is not None

    @property
    def names(self) -> tuple[str, ...]:
        """What vouches for a policy, for the status."""
        there = {"sha256": self.sha256, "tsm": self.word == "tsm", "signature": self.key}
        image = ("image",) if self.path == POLICY_PATH else ()
        return (*image, *(name for name, is_there in there.items() if is_there))


def read_binding(
    setting: str | None, *, policy_path: str = POLICY_PATH, key_path: str = KEY_PATH
) -> Binding:
    """Read what binds a policy: the setting of the command line, and the boot image.

    Raises:
        CallError: ``invalid``, they contradict each other, or the key cannot be read.
    """
    key, min_svn = _read_key(key_path)
    image = os.path.lexists(policy_path)
    binding = Binding(key=key, min_svn=min_svn, path=policy_path if image else "")
    if setting is None:
        return binding
    path, _, digest = setting.partition(",sha256=")
    if not digest:
        if setting == "none" and binding.is_required:
            raise _contradiction("the command line says none, and the boot image has one")
        return binding.replace(word=setting)
    if image and path != policy_path:
        raise _contradiction(f"the command line names {path!r}, and the boot image has its own")
    return binding.replace(path=path, sha256=bytes.fromhex(digest))


def find_policy(binding: Binding) -> tuple[bytes, bytes | None] | None:
    """Return the bytes of the policy that is named, and of its signature in ``PATH.sig``; None: a
    policy has to be set.

    Raises:
        CallError: ``not_found``, it cannot be read.
    """
    if not binding.path:
        return None
    raw = _read(binding.path, MAX_POLICY_BYTES)
    signature = None
    if binding.key is not None:
        signature = _read(f"{binding.path}.sig", _MAX_SIGNATURE_BYTES)
    return raw, signature


def accept(binding: Binding, raw: bytes, signature: bytes | None) -> Policy:
    """Return the policy if all that must vouch for it does. It is parsed after that.

    Raises:
        CallError: ``denied``, something does not vouch for it; ``invalid`` or ``unsupported``, it
            cannot be used.
    """
    digest = digest_of(raw)
    if binding.sha256 is not None and digest != binding.sha256:
        raise _denied("sha256", "its digest is not the one on the command line")
    if binding.word == "tsm":
        launched = launch_digest()
        if launched != (digest if len(launched) == len(digest) else digest_of(raw, "sha384")):
            raise _denied("tsm", "its digest is not the one that the machine was launched with")
    if binding.key is not None and not is_signed(
        binding.key, SIGNATURE_CONTEXT + raw, signature or b""
    ):
        raise _denied("signature", "it is not signed by the key in the boot image")
    policy = read_policy(raw)
    if binding.key is not None and policy.svn < binding.min_svn:
        raise _denied("svn", "its security version is older than the boot image takes")
    return policy


def digest_of(raw: bytes, algorithm: str = "sha256") -> bytes:
    """Return the digest of a policy's bytes."""
    hasher = new_hash(algorithm)
    hasher.update(raw)
    return hasher.digest()


def _read_key(path: str) -> tuple[bytes | None, int]:
    if not os.path.lexists(path):
        return None, 0
    text = _read(path, _MAX_KEY_FILE_BYTES).decode("ascii", "replace")
    words = text.split()
    if len(words) == 3 and words[0] == "ed25519" and words[2].startswith("min_svn="):
        number = words[2].removeprefix("min_svn=")
        try:
            key = bytes.fromhex(words[1])
        except ValueError:
            key = b""
        if len(key) == KEY_BYTES and number.isascii() and number.isdigit():
            return key, int(number)
    raise _contradiction(f"{path!r} is not: ed25519 HEX min_svn=N")


def _read(path: str, most_bytes: int) -> bytes:
    try:
        with open(path, "rb") as stream:
            raw = stream.read(most_bytes + 1)
    except OSError as error:
        text = f"{path!r} cannot be read: {error.strerror}"
        raise CallError("not_found", text, step="policy", object=path) from None
    if len(raw) > most_bytes:
        text = f"{path!r} has over {most_bytes} bytes"
        raise CallError("invalid", text, step="policy", object=path)
    return raw


def _contradiction(problem: str) -> CallError:
    return CallError("invalid", f"no policy: {problem}", step="policy", object="guestagent.policy")


def _denied(rule: str, problem: str) -> CallError:
    return CallError("denied", f"the policy is refused: {problem}", step="policy", object=rule)
