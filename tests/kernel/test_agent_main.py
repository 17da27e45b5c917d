"""The agent as a process, asked over its socket: every method, and every kind of bad request."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestagent.api import (
    METHODS,
    ByteRange,
    LayersMount,
    LayersUnmount,
    OverlaySpec,
    PathDevice,
    TmpfsScratch,
    Verity,
)
from guestagent.api.agent import FEATURES
from guestagent.host.client import GuestAgent
from tests.beds.agentbed import AgentProcess, Pack, World, layer_on, settled_world, who
from tests.beds.calls import call_error, run
from tests.beds.dmbed import loop_device
from vsock.client import Client
from vsock.errors import CallError

PACK_LAYERS = 3


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as agent:
        yield agent


@pytest.fixture
def guest(agent: AgentProcess) -> Iterator[GuestAgent]:
    with agent.client() as guest:
        yield guest


@pytest.fixture
def raw(agent: AgentProcess) -> Iterator[Client]:
    """A connection for requests that no typed client would send; it has said hello."""
    with Client(agent.address, connect_seconds=20) as client:
        client.call("agent.hello", {"versions": [1]}, timeout_seconds=20)
        yield client


def refused(client: Client, method: str, params: dict[str, Any]) -> CallError:
    """Send a bad request: it must fail, the connection must live on, and nothing be left."""
    before = World.now()
    with pytest.raises(CallError) as caught:
        client.call(method, params, deadline_ms=3000)
    assert isinstance(client.call("agent.status", {}, timeout_seconds=20), dict)
    assert settled_world(before) == before
    assert "Traceback" not in caught.value.message
    return caught.value


# --- every method


def test_every_method(guest: GuestAgent, pack: Pack) -> None:
    """Walk through the contract once; what is asked is what the kernel then has."""
    assert guest.hello.version == 1
    features = set(guest.hello.features)
    assert features <= set(FEATURES)
    assert features >= {
        *("dm-linear", "dm-verity", "fs-erofs", "batch"),
        *("preset-default", "scratch-tmpfs", "scratch-directory"),
    }
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert guest.hello.boot["boot_id"] == guest.events().boot_id == boot_id
    _walk_layers(guest, pack)
    _walk_overlays(guest, pack)
    _walk_agent(guest)


def _walk_layers(guest: GuestAgent, pack: Pack) -> None:
    report = guest.layer_mount(pack.spec(0))
    assert who(report.target) == pack.layers[0].marker
    assert not report.already
    assert report.options[:3] == ("ro", "nosuid", "nodev")
    assert [device.deferred_remove for device in report.dm] == [True, True]
    assert all(device.readonly for device in report.dm)
    again = guest.layer_mount(pack.spec(0))
    assert again.already
    assert again.mount_id == report.mount_id
    assert guest.layer_list() == (guest.layer_get("layer0"),)
    verity = report.dm[0].name
    assert guest.dm_table(verity).lines == (report.dm[0].table,)
    assert guest.dm_status(verity).lines[0].split()[2:4] == ["verity", "V"]
    assert {device.name for device in guest.dm_list().devices} == {d.name for d in report.dm}
    progress: list[tuple[int, int]] = []
    verified = guest.layer_verify("layer0", progress=lambda *place: progress.append(place))
    assert verified.corrupt_blocks == ()
    assert verified.read_bytes == progress[-1][0] == progress[-1][1]
    gone = guest.layer_unmount("layer0")
    assert gone.unmounted == (report.target,)
    assert gone.removed_devices == tuple(device.name for device in report.dm)
    assert guest.layer_unmount("layer0").already


def _walk_overlays(guest: GuestAgent, pack: Pack) -> None:
    spec = OverlaySpec(
        overlay_id="o", layers=("layer1", "layer0"), scratch=TmpfsScratch(size_bytes=1 << 20)
    )
    batch = LayersMount(layers=(pack.spec(0), pack.spec(1)))
    reply = guest.layers_mount(batch)
    assert [layer.layer_id for layer in reply.layers] == ["layer0", "layer1"]
    overlay = guest.overlay_mount(spec)
    assert who(overlay.target) == pack.layers[1].marker
    assert overlay.lowerdirs == ("/run/layers/layer1", "/run/layers/layer0")
    (listed,) = guest.overlay_list()
    assert (listed.mount_id, listed.lowerdirs) == (overlay.mount_id, overlay.lowerdirs)
    with call_error("busy", match="in use") as caught:
        guest.layer_unmount("layer0", force=True)
    assert "overlay o" in (caught.value.hint or "")
    assert not guest.overlay_unmount("o").already
    guest.layers_unmount(LayersUnmount(layers=("layer0", "layer1")))


def _walk_agent(guest: GuestAgent) -> None:
    status = guest.status()
    assert (status.state, status.problems, status.layers, status.dm_devices) == ("ready", (), 0, 0)
    assert not guest.cancel(4711).cancelled
    listed = guest.features().features
    assert tuple(one.name for one in listed) == tuple(FEATURES)
    assert {one.name for one in listed if one.is_there} == set(guest.hello.features)
    assert all(one.is_there == (one.why_not == "") for one in listed)
    since = guest.subscribe(lambda event: None).sequence
    assert guest.events(since).events == ()
    kinds = [event.kind for event in guest.events(0).events]
    assert kinds[0] == "agent_started"
    assert {"layer_mounted", "layer_unmounted", "overlay_mounted"} <= set(kinds)


def test_shutdown_unmounts_everything(pack: Pack) -> None:
    with AgentProcess() as agent:
        with agent.client() as guest:
            guest.layer_mount(pack.spec(0))
            guest.overlay_mount(OverlaySpec(overlay_id="o", layers=("layer0",)))
            guest.shutdown("exit")
        assert agent.wait() == 0


def test_a_signal_leaves_layers_for_the_next_agent(pack: Pack) -> None:
    with AgentProcess() as agent:
        with agent.client() as guest:
            before = guest.layer_mount(pack.spec(0))
        assert agent.process is not None
        agent.process.terminate()
        assert agent.wait() == 0
        agent.start()
        with agent.client() as guest:
            after = guest.layer_get("layer0")
            assert (after.mount_id, after.dev) == (before.mount_id, before.dev)
            guest.shutdown("exit")


# --- kinds of layers


@pytest.mark.parametrize("kind", ["erofs", "squashfs", "ext4"])
@pytest.mark.parametrize("said", [True, False])
def test_file_systems(guest: GuestAgent, tmp_path: Path, kind: str, said: bool) -> None:
    image = _image(tmp_path, kind)
    root = _format(image)
    with loop_device(image) as node:
        report = guest.layer_mount(
            layer_on(
                node, "fs", verity=Verity(root_digest=root), filesystem=kind if said else "auto"
            )
        )
        assert report.filesystem == kind
        assert Path(report.target, "hello").read_text() == "hello\n"
        assert any(o in ("noload", "norecovery") for o in report.options) == (kind == "ext4")
        guest.layer_unmount("fs")


@pytest.mark.parametrize("parts", ["plain", "linear", "verity", "both"])
def test_parts(guest: GuestAgent, tmp_path: Path, parts: str) -> None:
    """Each way to put a layer together has the table that dmsetup shows."""
    image = _image(tmp_path, "erofs")
    size_bytes = image.stat().st_size
    root = _format(image)
    whole = ByteRange(offset_bytes=0, size_bytes=image.stat().st_size)
    with loop_device(image) as node:
        spec = layer_on(
            node,
            "parts",
            mapping=whole if parts in ("linear", "both") else None,
            verity=Verity(root_digest=root) if parts in ("verity", "both") else None,
        )
        report = guest.layer_mount(spec)
        shown = _dmsetup_table()
        assert {device.name: device.table for device in report.dm} == shown
        kinds = [device.target_type for device in report.dm]
        wanted = {"plain": [], "linear": ["linear"], "verity": ["verity"]}
        assert kinds == wanted.get(parts, ["verity", "linear"])
        if parts in ("linear", "both"):
            dev = _dev(node)
            line = f"0 {whole.size_bytes // 512} linear {dev} 0"
            assert shown[report.dm[-1].name] == line
        if parts == "verity":
            blocks = size_bytes // 4096
            start = f"0 {size_bytes // 512} verity 1 {_dev(node)} {_dev(node)} 4096 4096 "
            assert shown[report.dm[0].name].startswith(
                f"{start}{blocks} {blocks + 1} sha256 {root.hex()} "
            )
        guest.layer_unmount("parts")


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("hash_type", [0, 1])
@pytest.mark.parametrize("block", [512, 1024, 2048, 4096])
def test_verity_formats(
    guest: GuestAgent, tmp_path: Path, algorithm: str, hash_type: int, block: int
) -> None:
    image = _image(tmp_path, "squashfs")
    options = [f"--hash={algorithm}", f"--format={hash_type}"]
    options += [f"--data-block-size={block}", f"--hash-block-size={block}"]
    size_bytes = image.stat().st_size
    root = _format(image, *options)
    with loop_device(image) as node:
        verity = Verity(root_digest=root, hash_offset_bytes=size_bytes)
        spec = layer_on(node, "v", filesystem="squashfs", verity=verity)
        report = guest.layer_mount(spec)
        assert report.verity is not None
        found = report.verity
        assert (found.algorithm, found.hash_type, found.data_block_size) == (
            algorithm,
            hash_type,
            block,
        )
        assert (found.status, found.source) == ("V", "superblock")
        assert Path(report.target, "hello").read_text() == "hello\n"
        _veritysetup_agrees(node, size_bytes, root)
        guest.layer_unmount("v")


def test_without_superblock_and_with_a_hash_device(guest: GuestAgent, tmp_path: Path) -> None:
    image = _image(tmp_path, "erofs")
    blocks = image.stat().st_size // 4096
    hashes = tmp_path / "hashes"
    output = run("veritysetup", "format", "--no-superblock", "--salt=abcd", str(image), str(hashes))
    root = _root_of(output)
    with loop_device(image) as node, loop_device(hashes) as hash_node:
        verity = Verity(
            root_digest=root,
            salt=b"\xab\xcd",
            algorithm="sha256",
            hash_type=1,
            data_blocks=blocks,
            data_block_size=4096,
            hash_block_size=4096,
            superblock=False,
            hash_device=PathDevice(path=hash_node),
        )
        spec = layer_on(node, "h", verity=verity)
        report = guest.layer_mount(spec)
        assert report.verity is not None
        assert (report.verity.source, report.verity.superblock) == ("request", False)
        assert f" {_dev(node)} {_dev(hash_node)} 4096 4096 {blocks} 0 sha256" in report.dm[0].table
        guest.layer_unmount("h")


def test_sha1_is_refused_unless_allowed(guest: GuestAgent, raw: Client, tmp_path: Path) -> None:
    image = _image(tmp_path, "erofs")
    root = _format(image, "--hash=sha1")
    with loop_device(image) as node:
        spec = layer_on(node, "old", verity=Verity(root_digest=root))
        error = refused(raw, "layer.mount", spec.to_wire())
        assert (error.code, error.step) == ("denied", "superblock")
        allowed = spec.replace(verity=Verity(root_digest=root, allow_sha1=True))
        assert guest.layer_mount(allowed).state == "mounted"
        guest.layer_unmount("old")


# --- bad requests

_GOOD_DIGEST = "ab" * 32
_PAGE = {"offset_bytes": 0, "size_bytes": 4096}

BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("unaligned offset", {"mapping": {"offset_bytes": 100, "size_bytes": 4096}}),
    ("unaligned size", {"mapping": {"offset_bytes": 0, "size_bytes": 4097}}),
    ("negative offset", {"mapping": {"offset_bytes": -512, "size_bytes": 4096}}),
    ("negative size", {"mapping": {"offset_bytes": 0, "size_bytes": -512}}),
    ("no size", {"mapping": {"offset_bytes": 0, "size_bytes": 0}}),
    ("overflow", {"mapping": {"offset_bytes": (1 << 63) - 512, "size_bytes": 1 << 62}}),
    ("overflow of 64 bits", {"mapping": {"offset_bytes": (1 << 64) - 512, "size_bytes": 512}}),
    ("past the device", {"mapping": {"offset_bytes": 0, "size_bytes": 1 << 40}}),
    ("far past the device", {"mapping": {"offset_bytes": 1 << 50, "size_bytes": 512}}),
    ("fraction", {"mapping": {"offset_bytes": 0.5, "size_bytes": 512}}),
    ("text for a number", {"mapping": {"offset_bytes": "0", "size_bytes": 512}}),
    ("truth for a number", {"mapping": {"offset_bytes": False, "size_bytes": 512}}),
    ("no ranges", {"mapping": []}),
    ("an unaligned range", {"mapping": [_PAGE, {"offset_bytes": 4096, "size_bytes": 100}]}),
    ("an empty range", {"mapping": [_PAGE, {"offset_bytes": 4096, "size_bytes": 0}]}),
    ("a range past the device", {"mapping": [_PAGE, {"offset_bytes": 1 << 50, "size_bytes": 512}]}),
    ("too many ranges", {"mapping": [_PAGE] * 4097}),
    ("ranges that overflow", {"mapping": [{"offset_bytes": 0, "size_bytes": 1 << 62}] * 2}),
    ("a list in a list of ranges", {"mapping": [[_PAGE]]}),
    ("nil in a list of ranges", {"mapping": [_PAGE, None]}),
    ("an unknown field of a range", {"mapping": [{**_PAGE, "dev": 1}]}),
    ("short digest", {"verity": {"root_digest": "ab" * 31}}),
    ("long digest", {"verity": {"root_digest": "ab" * 33}}),
    ("odd digest", {"verity": {"root_digest": "a" * 63}}),
    ("digest not hex", {"verity": {"root_digest": "zz" * 32}}),
    ("digest with a space", {"verity": {"root_digest": _GOOD_DIGEST + " 1"}}),
    ("digest with a newline", {"verity": {"root_digest": _GOOD_DIGEST + "\n"}}),
    ("digest of another length", {"verity": {"root_digest": _GOOD_DIGEST, "algorithm": "sha512"}}),
    ("salt not hex", {"verity": {"root_digest": _GOOD_DIGEST, "salt": "00 1 ignore_corruption"}}),
    ("long salt", {"verity": {"root_digest": _GOOD_DIGEST, "salt": "00" * 257}}),
    ("algorithm", {"verity": {"root_digest": _GOOD_DIGEST, "algorithm": "md5"}}),
    ("algorithm with a space", {"verity": {"root_digest": _GOOD_DIGEST, "algorithm": "sha256 x"}}),
    ("block size", {"verity": {"root_digest": _GOOD_DIGEST, "data_block_size": 5000}}),
    ("hash type", {"verity": {"root_digest": _GOOD_DIGEST, "hash_type": 2}}),
    ("preset", {"verity": {"root_digest": _GOOD_DIGEST, "preset": "ignore_corruption"}}),
    ("id with a space", {"layer_id": "a b"}),
    ("id with a newline", {"layer_id": "a\nb"}),
    ("id with a slash", {"layer_id": "../a"}),
    ("id with a dot first", {"layer_id": ".a"}),
    ("empty id", {"layer_id": ""}),
    ("long id", {"layer_id": "a" * 65}),
    ("target with a space", {"target": "/run/a b"}),
    ("target with a newline", {"target": "/run/a\nb"}),
    ("target with a comma", {"target": "/run/a,b"}),
    ("target with a colon", {"target": "/run/a:b"}),
    ("target outside", {"target": "/etc/layer"}),
    ("target is the root", {"target": "/run"}),
    ("target is the directory of layers", {"target": "/run/layers"}),
    ("target beside the directories of targets", {"target": "/run/systemd/system"}),
    ("target with dots", {"target": "/run/../etc/layer"}),
    ("relative target", {"target": "run/layer"}),
    ("target with two slashes", {"target": "/run//layer"}),
    ("long target", {"target": "/run/" + "a/" * 600 + "b"}),
    ("long name in the target", {"target": "/run/" + "a" * 300}),
    ("file system", {"filesystem": "btrfs"}),
    ("option", {"options": ["suid"]}),
    ("option with a comma", {"options": ["noexec,suid"]}),
    ("unknown field", {"colour": "red"}),
    ("unknown field inside", {"verity": {"root_digest": _GOOD_DIGEST, "roothash": ""}}),
    ("unknown kind of device", {"device": {"kind": "floppy", "number": 0}}),
    ("no kind of device", {"device": {"number": 0}}),
    ("device outside of /dev", {"device": {"kind": "path", "path": "/etc/passwd"}}),
    ("device with dots", {"device": {"kind": "path", "path": "/dev/../etc/passwd"}}),
    ("device is a character device", {"device": {"kind": "path", "path": "/dev/null"}}),
    ("serial with a space", {"device": {"kind": "virtio-blk", "serial": "a b"}}),
    ("wrong type", {"layer_id": 7}),
    ("nothing", {"device": None}),
]


@pytest.mark.parametrize(("name", "fields"), BAD_FIELDS, ids=[name for name, _ in BAD_FIELDS])
def test_bad_layer(raw: Client, pack: Pack, name: str, fields: dict[str, Any]) -> None:
    params = {**pack.spec(0).to_wire(), **fields}
    error = refused(raw, "layer.mount", params)
    assert error.code == "invalid"
    assert error.object, "the error does not say which field"


_OVERLAY = {"overlay_id": "o", "layers": ["a"]}


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("layer.mont", {}, "unsupported"),
        ("", {}, "unsupported"),
        ("agent.status", {"verbose": True}, "invalid"),
        ("layer.get", {"layer_id": "no-such"}, "not_found"),
        ("layer.verify", {"layer_id": "no-such"}, "not_found"),
        ("layer.get", {}, "invalid"),
        ("dm.table", {"name": "no-such"}, "not_found"),
        ("dm.status", {"name": "a b"}, "invalid"),
        ("dm.status", {"name": "a" * 128}, "invalid"),
        ("overlay.mount", {"overlay_id": "o", "layers": []}, "invalid"),
        ("overlay.mount", {"overlay_id": "o", "layers": ["no-such"]}, "not_found"),
        ("overlay.mount", {"overlay_id": "o", "layers": ["a", "a"]}, "invalid"),
        ("overlay.mount", {"overlay_id": "o", "layers": [f"l{n}" for n in range(501)]}, "invalid"),
        ("overlay.mount", {"overlay_id": "o", "layers": ["a:b"]}, "invalid"),
        ("overlay.mount", {**_OVERLAY, "options": {"lowerdir": "/"}}, "invalid"),
        ("overlay.mount", {**_OVERLAY, "options": {"xino": "on,x"}}, "invalid"),
        ("overlay.mount", {**_OVERLAY, "options": {"volatile": True}}, "invalid"),
        ("layers.mount", {"layers": []}, "invalid"),
        ("layers.unmount", {}, "invalid"),
        ("agent.shutdown", {"mode": "explode"}, "invalid"),
        ("agent.hello", {"versions": []}, "invalid"),
        ("agent.hello", {"versions": [99]}, "unsupported"),
        ("agent.cancel", {"msgid": "1"}, "invalid"),
    ],
)  # fmt: skip
def test_bad_request(raw: Client, method: str, params: dict[str, Any], code: str) -> None:
    assert refused(raw, method, params).code == code


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"agent.hello"}))
def test_nothing_is_answered_before_hello(agent: AgentProcess, method: str) -> None:
    with Client(agent.address, connect_seconds=20) as client:
        with call_error("denied"):
            client.call(method, {}, timeout_seconds=20)
        client.call("agent.hello", {"versions": [1]}, timeout_seconds=20)


def test_a_target_through_links_is_denied(raw: Client, pack: Pack) -> None:
    link = Path("/run/layers/link")
    link.parent.mkdir()
    link.symlink_to("/etc")
    magic = "/run/layers/magic"
    os.symlink("/proc/self/root", magic)
    try:
        for target in (f"{link}/layer", str(link), f"{magic}/run/layer"):
            params = pack.spec(0, target=target).to_wire()
            assert refused(raw, "layer.mount", params).code == "denied"
    finally:
        link.unlink()
        os.unlink(magic)
        link.parent.rmdir()


def test_a_target_that_is_taken(guest: GuestAgent, raw: Client, pack: Pack) -> None:
    guest.layer_mount(pack.spec(0))
    taken = (
        pack.spec(1, target="/run/layers/layer0"),
        pack.spec(1, target="/run/layers/layer0/inside"),
        pack.spec(1, layer_id="layer0"),
        pack.spec(0, target="/run/elsewhere"),
    )
    for spec in taken:
        assert refused(raw, "layer.mount", spec.to_wire()).code == "conflict"
    guest.layer_unmount("layer0")


def test_a_target_that_others_have_mounted(raw: Client, pack: Pack, tmp_path: Path) -> None:
    target = Path("/run/layers/foreign")
    target.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "foreign", str(target))
    try:
        params = pack.spec(0, target=str(target)).to_wire()
        assert refused(raw, "layer.mount", params).code == "conflict"
    finally:
        run("umount", str(target))
        target.rmdir()
        target.parent.rmdir()


def test_the_agents_own_directory_is_no_target(
    raw: Client, agent: AgentProcess, pack: Pack
) -> None:
    for target in (agent.state, f"{agent.state}/links/a", str(agent.directory)):
        params = pack.spec(0, target=target).to_wire()
        assert refused(raw, "layer.mount", params).code == "invalid"


def test_a_wrong_root_digest_is_refused_before_a_device_exists(raw: Client, pack: Pack) -> None:
    spec = pack.spec(0, verity=Verity(root_digest=bytes(32)))
    error = refused(raw, "layer.mount", spec.to_wire())
    assert (error.code, error.step) == ("integrity", "superblock")


def test_a_device_that_never_comes(raw: Client, pack: Pack) -> None:
    params = {**pack.spec(0).to_wire(), "device": {"kind": "pmem", "number": 7}}
    with call_error("timeout", match="loop"):
        raw.call("layer.mount", params, deadline_ms=300)


# --- tools


def _image(directory: Path, kind: str) -> Path:
    """An image of one file, padded to whole blocks of 4096 bytes."""
    source, image = directory / "source", directory / f"image.{kind}"
    source.mkdir()
    (source / "hello").write_text("hello\n")
    (source / "more").write_bytes(os.urandom(20_000))
    commands = {
        "erofs": ["mkfs.erofs", "-T0", str(image), str(source)],
        "squashfs": ["mksquashfs", str(source), str(image), "-quiet", "-no-progress"],
        "ext4": ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", str(source), str(image), "2M"],
    }
    run(*commands[kind])
    os.truncate(image, -(-image.stat().st_size // 4096) * 4096)
    return image


def _format(image: Path, *options: str) -> bytes:
    """Put veritysetup's hash tree behind the data; return the root digest."""
    offset = f"--hash-offset={image.stat().st_size}"
    size_bytes = image.stat().st_size
    block = next((int(o.split("=")[1]) for o in options if o.startswith("--data-block")), 4096)
    blocks = f"--data-blocks={size_bytes // block}"
    root = _root_of(run("veritysetup", "format", offset, blocks, *options, str(image), str(image)))
    os.truncate(image, -(-image.stat().st_size // 4096) * 4096)
    return root


def _root_of(output: str) -> bytes:
    return bytes.fromhex(
        next(line for line in output.splitlines() if "Root hash" in line).split()[-1]
    )


def _veritysetup_agrees(node: str, hash_offset_bytes: int, root: bytes) -> None:
    run("veritysetup", "verify", f"--hash-offset={hash_offset_bytes}", node, node, root.hex())


def _dmsetup_table() -> dict[str, str]:
    lines = run("dmsetup", "table").splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def _dev(node: str) -> str:
    number = os.stat(node).st_rdev
    return f"{os.major(number)}:{os.minor(number)}"
