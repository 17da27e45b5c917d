"""dm-crypt over a device, with a key that is made here, for this device alone, and told to nobody.

The key goes from getrandom(2) into the kernel's keyring and from there into the device; here it is
in one buffer, which is overwritten. Nobody can read it back: with the device the content is lost.

Source: Documentation/admin-guide/device-mapper/dm-crypt.rst (Linux 6.1), random(4).
"""

import errno
import os

from guestagent.engine.plan import dm_uuid
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import undo_deadline
from guestagent.engine.transaction import Transaction
from guestagent.policy.decision import Allowed
from guestagent.storage import syscalls
from guestagent.storage.devicemapper import devices
from guestagent.storage.devicemapper.control import DeviceInfo
from guestagent.storage.devicemapper.targets import CryptTable
from guestagent.storage.keyring import ThreadKey
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("CIPHER", "crypt_device")

CIPHER = "aes-xts-plain64"
#: XTS takes two keys of AES-256.
_KEY_BYTES = 64
#: The kernel lacks device-mapper, keyrings, the cipher; EINVAL is also that it lacks the target.
_LACKING = (errno.ENODEV, errno.ENOSYS, errno.ENOENT)


def crypt_device(
    state: EngineState,
    *,
    dev: str,
    name: str,
    size_bytes: int,
    discards: bool,
    op: Transaction,
    permit: Allowed,
) -> DeviceInfo:
    """Create a writable device ``dm-crypt-NAME`` that keeps ``size_bytes`` of a device encrypted.

    What it reads before the first write is noise. It is removed on rollback; its uuid has the
    agent's prefix, so that recovery finds it.

    Args:
        dev: MAJOR:MINOR of the device below, which no other has open for itself.
        name: what the kernel calls it, or another word that is its alone.
        discards: pass discards on: the owner of the disk then sees which blocks are unused.

    Raises:
        CallError: ``unsupported``, the kernel lacks dm-crypt, its cipher or keyrings; ``timeout``
            or ``cancelled``, it has no random numbers yet.
    """
    dm_name = f"dm-crypt-{name.replace('!', '_')}"
    table = CryptTable(
        device=dev,
        length_bytes=size_bytes,
        cipher=CIPHER,
        key_bytes=_KEY_BYTES,
        key_description=f"guestagent:{dm_name}",
        options=("allow_discards",) if discards else (),
    )
    with op.step("crypt", dm_name):
        try:
            info = _create(
                state, dm_name, dm_uuid("crypt", dev, state.uuid_prefix), table, op, permit
            )
        except OSError as error:
            has_target = "crypt" in state.control.list_versions()
            if error.errno not in _LACKING and (has_target or error.errno != errno.EINVAL):
                raise
            raise CallError(
                "unsupported",
                f"this kernel cannot encrypt a scratch with {CIPHER}",
                errno=error.errno,
                hint="it needs the modules dm-crypt, xts and aes, and keyrings (CONFIG_KEYS)",
                kernel_log=op.kernel_lines(),
            ) from error

    def undo() -> None:
        with undo_deadline(state) as deadline:
            devices.remove_device(state.control, dm_name, deadline)

    op.on_rollback(f"dm device {dm_name}", undo)
    return info


def _create(
    state: EngineState, name: str, uuid: str, table: CryptTable, op: Transaction, _permit: Allowed
) -> DeviceInfo:
    key = bytearray(table.key_bytes)
    try:
        _fill(key, op.deadline)
        with ThreadKey("logon", table.key_description, key):
            return devices.create_device(
                state.control, name=name, uuid=uuid, targets=[table.target()], readonly=False
            )
    finally:
        key[:] = bytes(len(key))


def _fill(key: bytearray, deadline: Deadline) -> None:
    """Fill a key with random bytes, once the kernel's are seeded, which /dev/random tells."""
    try:
        syscalls.getrandom(key)
    except BlockingIOError:
        fd = os.open("/dev/random", os.O_RDONLY | os.O_CLOEXEC)
        try:
            deadline.wait([fd], "wait for random numbers")
        finally:
            os.close(fd)
        syscalls.getrandom(key)
