"""What may be asked of a share, and the tags that sysfs tells."""

from pathlib import Path
from typing import Any

import pytest

from guestagent.api.share import ShareMount
from guestagent.share.shares import served_tags
from vsock.errors import CallError


def test_defaults() -> None:
    spec = ShareMount(share_id="s", tag="host")
    assert (spec.kind, spec.read_only, spec.mount_point) == ("virtiofs", True, "/run/shares/s")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tag": ""}, "tag must have 1 to 36"),
        ({"tag": "x" * 37}, "tag must have 1 to 36"),
        ({"tag": "x" * 32, "kind": "9p"}, "tag must have 1 to 31"),
        ({"tag": "a,rw"}, "tag must be letters"),
        ({"tag": "a=b"}, "tag must be letters"),
        ({"tag": "a b"}, "tag must be letters"),
        ({"tag": "a\0"}, "tag must be letters"),
        ({"tag": "\N{LATIN SMALL LETTER E WITH ACUTE}"}, "tag must be letters"),
        ({"tag": "-o"}, "tag must be letters"),
        ({"kind": "nfs"}, "kind must be one of virtiofs, 9p"),
        ({"target": "relative"}, "target must be absolute"),
        ({"target": "/run/a,b"}, "target may hold"),
        ({"target": "/run/../etc"}, "target must be normal"),
        ({"msize_bytes": 8192}, "msize_bytes is of 9p"),
        ({"msize_bytes": 4095, "kind": "9p"}, "msize_bytes must be in"),
        ({"msize_bytes": 1 << 20, "kind": "9p"}, "msize_bytes must be in"),
        ({"share_id": "../x"}, "share_id must be letters"),
    ],
)
def test_what_can_never_work_is_refused(fields: dict[str, Any], message: str) -> None:
    request = {"share_id": "s", "tag": "host", **fields}
    with pytest.raises(CallError, match=message) as caught:
        ShareMount.from_wire(request)
    assert caught.value.code == "invalid"


@pytest.mark.parametrize(
    ("kind", "place", "content"),
    [
        ("virtiofs", "sys/fs/virtiofs/{}/tag", b"{}\n"),
        ("9p", "sys/bus/virtio/drivers/9pnet_virtio/virtio{}/mount_tag", b"{}\0"),
    ],
)
def test_tags_that_sysfs_tells(tmp_path: Path, kind: str, place: str, content: bytes) -> None:
    assert served_tags(kind, str(tmp_path)) is None
    for number, tag in enumerate((b"host", b"other")):
        path = tmp_path / place.format(number)
        path.parent.mkdir(parents=True)
        path.write_bytes(content.replace(b"{}", tag))
    (path.parent.parent / "bind").write_bytes(b"")
    (path.parent.parent / "device-without-a-tag").mkdir()
    assert served_tags(kind, str(tmp_path)) == ("host", "other")
