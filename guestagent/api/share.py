"""Shared directories: what the host serves to the guest by virtiofs or 9p, mounted by its tag."""

from collections.abc import Mapping

from guestagent.api.checks import check_choice, check_path, check_range, check_word
from guestagent.api.layers import UnmountReply
from guestagent.api.request import Request
from vsock.record import Record

#: File systems of shares, and the longest tag of each in bytes: struct virtio_fs_config of
#: include/uapi/linux/virtio_fs.h; QEMU's limit for a 9p tag.
TAG_BYTES = {"virtiofs": 36, "9p": 31}
SHARE_KINDS = tuple(TAG_BYTES)
#: Bytes of a 9p message; with more a virtio queue of 128 buffers of a page cannot carry it.
MSIZE_MIN, MSIZE_MAX = 4096, 500 * 1024


class ShareReport(Record):
    """A share as the kernel has it. ``dev`` is MAJOR:MINOR; ``options`` are those of the mount.

    ``state`` is mounted, or unmounted: another program has unmounted, moved or covered it.
    """

    share_id: str
    tag: str
    kind: str
    state: str
    target: str
    dev: str
    mount_id: int
    read_only: bool
    options: tuple[str, ...]
    timings_ms: Mapping[str, float] = {}
    already: bool = False


class ShareMount(Request[ShareReport], method="share.mount"):
    """Mount a directory that the host serves under a tag.

    It is always ``nosuid`` and ``nodev``, and read-only unless ``read_only`` is false. ``target``
    defaults to /run/shares/SHARE_ID. ``msize_bytes`` is the largest message of a 9p share. A tag is
    mounted once.
    """

    share_id: str
    tag: str
    kind: str = "virtiofs"
    target: str | None = None
    read_only: bool = True
    msize_bytes: int | None = None

    def check(self) -> None:
        check_word("share_id", self.share_id)
        check_choice("kind", self.kind, SHARE_KINDS)
        check_word("tag", self.tag, TAG_BYTES[self.kind])
        if self.target is not None:
            check_path("target", self.target)
        check_range("msize_bytes", self.msize_bytes, MSIZE_MIN, MSIZE_MAX)
        if self.msize_bytes is not None and self.kind != "9p":
            raise ValueError(f"msize_bytes is of 9p, not of {self.kind}")

    @property
    def mount_point(self) -> str:
        return self.target or f"/run/shares/{self.share_id}"


class ShareUnmount(Request[UnmountReply], method="share.unmount"):
    """Unmount a shared directory; busy while it is in use."""

    share_id: str

    def check(self) -> None:
        check_word("share_id", self.share_id)


class ShareListReply(Record):
    shares: tuple[ShareReport, ...]


class ShareList(Request[ShareListReply], method="share.list"):
    """List the shared directories, read back from the kernel."""
