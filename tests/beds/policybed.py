"""A policy of two layers, and one chain of them, for tests."""

from typing import Any

__all__ = ("POLICY",)


def _layer(name: str, digit: str) -> dict[str, Any]:
    return {
        "id": name,
        "filesystem": "erofs",
        "size_bytes": 1024 * 1024,
        "whiteouts": "trusted",
        "verity": {
            "root_digest": digit * 64,
            "salt": "ab" * 32,
            "algorithm": "sha256",
            "hash_type": 1,
            "data_blocks": 128,
            "data_block_size": 4096,
            "hash_block_size": 4096,
            "hash_offset_bytes": 524288,
            "superblock": True,
        },
    }


#: A policy as its JSON object; tests make others of copies.
POLICY: dict[str, Any] = {
    "type": "guestagent.policy",
    "version": 1,
    "name": "web",
    "svn": 3,
    "layers": [_layer("app", "a"), _layer("base", "b")],
    "chains": [
        {
            "name": "web",
            "layers": ["app", "base"],
            "options": {"suid": True},
            "scratch": [{"kind": "tmpfs", "max_bytes": 16 * 1024 * 1024}, {"kind": "device"}],
        }
    ],
    "devices": {"kinds": ["pmem", "virtio-blk"]},
    "exact": [{"method": "share.mount", "params": {"share_id": "conf", "tag": "conf"}}],
    "expose": {
        "methods": [
            *("layer.mount", "layers.mount", "overlay.mount", "layer.unmount", "layer.list"),
            *("fs.read_file", "fs.checksum_device", "dm.list", "dm.table"),
        ],
        "events": {"kinds": ["layer_mounted"], "fields": ["layer_id"]},
        "inspect": {"layers": ["app"]},
        "dm": "names",
        "console": ["help"],
    },
}
