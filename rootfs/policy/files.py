"""Files of policies: the canonical bytes, their digests as a TEE reports them, and reading back."""

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

from guestagent.policy.document import (
    MAX_POLICY_BYTES,
    Policy,
    canonical_policy,
    read_policy,
)
from rootfs.imagefile.inputs import read_input
from vsock.errors import CallError

__all__ = ("TEES", "TeeField", "load_policy", "policy_bytes", "read_policy_file")


class TeeField(NamedTuple):
    """The field of a TEE's report that the host fills with the digest of a policy.

    The digest of ``algorithm`` fills the whole field: a cut one is never compared. ``qemu`` is the
    property of QEMU's object for such a guest, whose value is base64.
    """

    name: str
    algorithm: str
    qemu: str


#: AMD SEV-SNP: 32 bytes. Intel TDX: 48 bytes.
TEES: Mapping[str, TeeField] = {
    "snp": TeeField("HOST_DATA", "sha256", "sev-snp-guest,host-data"),
    "tdx": TeeField("MRCONFIGID", "sha384", "tdx-guest,mrconfigid"),
}


def policy_bytes(policy: Policy) -> bytes:
    """Return the canonical bytes of a policy; fields that have their default are left out.

    Raises:
        CallError: ``resource``, they are more than an agent reads.
    """
    document = {"type": policy.type, "version": policy.version, **policy.to_sparse_wire()}
    raw = canonical_policy(json.loads(json.dumps(document, default=bytes.hex)))
    if len(raw) > MAX_POLICY_BYTES:
        raise CallError(
            "resource",
            f"cannot make the policy {policy.name!r}: it would have {len(raw)} bytes, an agent "
            f"reads at most {MAX_POLICY_BYTES}",
            step="make the policy",
            object=policy.name,
        )
    return raw


def read_policy_file(path: str | os.PathLike[str]) -> tuple[bytes, Policy]:
    """Return the bytes of a file and the policy in them, judged as an agent judges them.

    Raises:
        CallError: ``invalid`` or ``unsupported``, with the file in the message and the field in
            ``object``; by errno.
    """
    raw = read_input(path, MAX_POLICY_BYTES, step="read the policy")
    try:
        return raw, read_policy(raw)
    except CallError as problem:
        problem.message = f"cannot use the policy {os.fspath(path)!r}: {problem.message}"
        raise


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Return the policy of a file.

    Raises:
        CallError: as ``read_policy_file``.
    """
    return read_policy_file(path)[1]
