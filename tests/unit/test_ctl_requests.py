"""The command line can ask for everything that the contract has: every method, every field."""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from guestagent.api import METHODS, LayersMount, LayerSpec, OverlaySpec, Verity
from guestagent.api.devices import ByteRange, PathDevice, ScsiDevice, VirtioBlkDevice
from guestagent.api.layers import VerityReport
from guestagent.api.net import Interface, InterfaceMatch, Neighbour, NetConfigure, Route
from guestagent.api.observe import CrashReport
from guestagent.api.overlays import DeviceScratch, OverlayOptions
from guestagent.api.thin import (
    PoolGrow,
    PoolOpen,
    VolumeCreate,
    VolumeDelete,
    VolumeGrow,
    VolumeMount,
    VolumeSnapshot,
    VolumeUnmount,
)
from guestagent.host.ctl.main import collect
from rootfs.pack.manifest import Manifest, layer_spec
from tests.beds.handlebed import Agent, dm_device, layer_report, overlay_report
from tests.beds.imagebed import Layout, Member, directory
from vsock.errors import CallError
from vsock.record import Record
from vsock.server import Call, Outcome

#: Runs guestctl on the agent of the test.
Ctl = Callable[..., Result]

#: Method -> a command that calls it.
VECTORS = Path(__file__).resolve().parents[1] / "vectors/policy"
COMMANDS = {
    "agent.hello": "hello",
    "agent.status": "status",
    "agent.shutdown": "shutdown --mode exit --force",
    "agent.events": "events --since 1",
    "agent.log": "log --level debug",
    "agent.metrics": "metrics",
    "agent.crashes": "crashes",
    "agent.features": "features",
    "layer.mount": "layer mount x --device pmem:0",
    "layer.unmount": "layer unmount x --force",
    "layer.list": "layer list",
    "layer.get": "layer get x",
    "layer.verify": "layer check x",
    "overlay.mount": "overlay mount o a b",
    "overlay.unmount": "overlay unmount o --force",
    "overlay.trim": "overlay trim o",
    "overlay.list": "overlay list",
    "layers.mount": "layers mount pmem:0,root=none",
    "layers.unmount": "layers unmount a b --overlay o --force",
    "dev.create": "dev create t --root /run/x --size 8192 --mode 711 --preserve pts "
    "--user-namespace 100000:200000:65537",
    "dev.add": "dev add t /dev/null --missing skip --strategy bind --outside /run/x",
    "dev.remove": "dev remove t /dev/null --missing skip",
    "dev.list": "dev list t",
    "dev.closure": "dev closure /dev/null --missing skip --strategy mknod --outside /run/x",
    "dev.attach": "dev attach t /dev --pid 7",
    "dev.destroy": "dev destroy t",
    "pool.open": "pool open p --metadata pmem:0 --data pmem:1",
    "pool.close": "pool close p",
    "pool.status": "pool status p",
    "pool.list": "pool list",
    "pool.grow": "pool grow p --data pmem:2",
    "volume.create": "volume create p v --size 1048576",
    "volume.snapshot": "volume snapshot p w --of v",
    "volume.delete": "volume delete p v --deferred",
    "volume.list": "volume list p",
    "volume.get": "volume get p v",
    "volume.mount": "volume mount p v /run/volumes/v",
    "volume.unmount": "volume unmount p v",
    "volume.grow": "volume grow p v --size 2097152",
    "volume.trim": "volume trim p v",
    "share.mount": "share mount s host --kind 9p --target /run/x --write --msize 65536",
    "share.unmount": "share unmount s",
    "share.list": "share list",
    "policy.set": f"policy set {VECTORS}/web.json --signature {VECTORS}/web.json.sig",
    "policy.narrow": f"policy narrow {VECTORS}/web.json",
    "policy.get": "policy get",
    "device.remove": "device remove scsi:0:0",
    "dm.list": "dm list",
    "dm.table": "dm table x",
    "dm.status": "dm status x",
    "net.configure": "net configure hostname=guest",
    "net.list": "net list",
    "fs.list_devices": "fs devices",
    "fs.list_partitions": "fs devices",
    "fs.list_filesystems": "fs devices",
    "fs.vfs_type": "fs device /dev/vda",
    "fs.vfs_uuid": "fs device /dev/vda",
    "fs.vfs_label": "fs device /dev/vda",
    "fs.blockdev_getsize64": "fs device /dev/vda",
    "fs.blockdev_getro": "fs device /dev/vda",
    "fs.checksum_device": "fs checksum-device /dev/vda --algorithm sha512",
    "fs.mountpoints": "fs mountpoints",
    "fs.checksums": "fs checksum layer:a /directory",
    "fs.checksum": "fs checksum layer:a /file",
    "fs.statvfs": "fs df layer:a",
    "fs.lstat": "fs stat layer:a /file",
    "fs.getxattrs": "fs stat layer:a /file",
    "fs.acl_get_file": "fs stat layer:a /file",
    "fs.head": "fs head layer:a /file -n 3",
    "fs.download": "fs download layer:a /file",
    "fs.ls": "fs ls layer:a",
    "fs.readdir": "fs ls -l overlay:a",
    "fs.find": "fs find layer:a --name x --type f --max-depth 2",
    "fs.du": "fs du layer:a",
    "fs.tar_out": "fs tar layer:a",
}
#: Methods without a command, and why.
NO_COMMAND = {
    "agent.cancel": "Ctrl-C does it",
    "agent.subscribe": "events --follow does it",
    "agent.more": "flow control of streams",
    "fs.exists": "fs stat says it by its exit status",
    "fs.readlink": "fs stat prints the target",
    "fs.read_file": "fs cat reads files of any size",
    "fs.pread": "fs cat --offset --size reads ranges of any size",
    "fs.available": "hello lists the features",
    "fs.version": "hello has the versions",
}


class Recorder(Agent):
    """Keeps what was asked, and refuses what it knows no answer to."""

    def __init__(self, path: Path) -> None:
        self.asked: list[tuple[str, dict[str, object]]] = []
        super().__init__(path)

    def _handle(self, call: Call) -> Outcome:
        self.asked.append((call.method, dict(call.params)))
        if not hasattr(self, call.method.replace(".", "_")):
            return Outcome(CallError("unsupported", "only recorded").to_wire(), None)
        return super()._handle(call)

    def fs_list_devices(self, _call: Call) -> object:
        return {"devices": []}

    fs_list_partitions = fs_list_devices

    def fs_list_filesystems(self, _call: Call) -> object:
        return {"filesystems": {}}

    def fs_blockdev_getsize64(self, _call: Call) -> object:
        return {"size_bytes": 512}

    def fs_blockdev_getro(self, _call: Call) -> object:
        return {"readonly": True}

    def fs_vfs_type(self, _call: Call) -> object:
        return {"value": "erofs"}

    fs_vfs_uuid = fs_vfs_label = fs_vfs_type

    def fs_lstat(self, call: Call) -> object:
        numbers = dict.fromkeys(
            ("mode", "uid", "gid", "links", "size_bytes", "allocated_bytes", "inode"), 0
        )
        times = dict.fromkeys(("mtime_ns", "atime_ns", "ctime_ns"), 0)
        kind = "d" if b"directory" in bytes(call.params["path"]) else "f"  # type: ignore[call-overload]
        more = {"kind": kind, "dev": "1:1", "rdev": None, "target": None}
        return {**numbers, **times, **more}

    def fs_getxattrs(self, _call: Call) -> object:
        return {"xattrs": []}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Recorder]:
    one = Recorder(tmp_path / "agent")
    yield one
    one.stop()


@pytest.fixture
def ctl(agent: Recorder) -> Ctl:
    def run(*words: str, text: bytes | None = None) -> Result:
        return CliRunner().invoke(collect(), ["--connect", agent.address, *words], input=text)

    return run


def request(agent: Recorder, method: str) -> dict[str, object]:
    return next(params for name, params in reversed(agent.asked) if name == method)


def test_every_method_has_a_command_or_a_reason() -> None:
    assert set(METHODS) == set(COMMANDS) | set(NO_COMMAND)
    assert not set(COMMANDS) & set(NO_COMMAND)


@pytest.mark.parametrize("method", COMMANDS)
def test_a_command_calls_its_method(agent: Recorder, ctl: Ctl, method: str) -> None:
    done = ctl(*COMMANDS[method].split())
    assert method in [name for name, _ in agent.asked], done.output
    METHODS[method].from_wire(request(agent, method))


def test_every_field_of_a_mount_can_be_said(agent: Recorder, ctl: Ctl, tmp_path: Path) -> None:
    signature = tmp_path / "layer.p7s"
    signature.write_bytes(b"signed")
    digest = "ab" * 20
    whole = (
        "layer mount x --device scsi:1:2:3 --mapping 4096+8192 --filesystem squashfs -o noexec "
        f"--target /run/layers/y --root-digest {digest} --preset strict --allow-sha1 "
        f"--hash-device virtio-blk:tree --signature {signature} --no-superblock --salt 0a "
        "--hash sha1 --hash-type 0 --data-blocks 3 --data-block-size 1024 --hash-block-size 2048 "
        "--hash-offset 4096 --readonly-policy error --whiteouts user"
    )
    overlay = "overlay mount o a b"
    lines = (
        whole,
        "layer mount x --device pmem:7",
        "layer mount x --device pmem:7 --mapping 0+512:4096+0x200 --mapping 0+512",
        "layer mount x --device /dev/vda",
        "layer mount x --device vmbus:f8b3781a-1e82-4818-a1c3-63d806ec15bb:3:1",
        "layer mount x --device label:base",
        f"{overlay} --target /run/overlays/p --scratch device:/dev/vdb,xfs,fresh "
        "--metacopy off --redirect-dir follow --xino auto --volatile --userxattr --suid --dev",
        f"{overlay} --scratch tmpfs:8192",
        f"{overlay} --scratch thin:pool:1048576,xfs,encrypted",
        f"{overlay} --scratch dir:/run/scratch,create,adopt",
        f"{overlay} --scratch device:/dev/vdb,encrypted,shared,discard",
    )
    for line in lines:
        assert "only recorded" in ctl(*line.split()).stderr, line
    kinds: dict[str, type[Record]] = {"layer.mount": LayerSpec, "overlay.mount": OverlaySpec}
    sent = [kinds[name].from_wire(params) for name, params in agent.asked if name in kinds]
    assert sent[0] == LayerSpec(
        layer_id="x",
        device=ScsiDevice(controller=1, lun=2, partition=3),
        mapping=ByteRange(offset_bytes=4096, size_bytes=8192),
        filesystem="squashfs",
        options=("noexec",),
        target="/run/layers/y",
        readonly_policy="error",
        whiteouts="user",
        verity=Verity(
            root_digest=bytes.fromhex(digest),
            preset="strict",
            allow_sha1=True,
            hash_device=VirtioBlkDevice(serial="tree"),
            signature=b"signed",
            superblock=False,
            salt=b"\n",
            algorithm="sha1",
            hash_type=0,
            data_blocks=3,
            data_block_size=1024,
            hash_block_size=2048,
            hash_offset_bytes=4096,
        ),
    )
    assert sent[2].as_dict()["mapping"] == tuple(
        ByteRange(offset_bytes=offset, size_bytes=512) for offset in (0, 4096, 0)
    )
    assert sent[6] == OverlaySpec(
        overlay_id="o",
        layers=("a", "b"),
        target="/run/overlays/p",
        scratch=DeviceScratch(
            device=PathDevice(path="/dev/vdb"),
            filesystem="xfs",
            ensure_filesystem=True,
            existing="fresh",
        ),
        options=OverlayOptions(
            metacopy="off",
            redirect_dir="follow",
            xino="auto",
            volatile=True,
            userxattr=True,
            suid=True,
            dev=True,
        ),
    )
    said = {field for record in sent for field in fields_said(record)}
    assert fields_of(LayerSpec) | fields_of(OverlaySpec) == said


def test_every_field_of_a_private_dev_can_be_said(agent: Recorder, ctl: Ctl) -> None:
    names = [name for name in METHODS if name.startswith("dev.")]
    for name in names:
        assert "only recorded" in ctl(*COMMANDS[name].split()).stderr, name
    ctl("dev", "attach", "t", "/dev", "--namespace", "/run/ns")
    sent = [METHODS[name].from_wire(params) for name, params in agent.asked if name in names]
    said = {field for record in sent for field in fields_said(record)}
    assert set[tuple[type[Record], str]]().union(*(fields_of(METHODS[n]) for n in names)) == said


def test_every_field_of_a_pool_and_a_volume_can_be_said(agent: Recorder, ctl: Ctl) -> None:
    lines = (
        "pool open p --metadata scsi:1:2:3 --data /dev/vdb --data pmem:7 "
        "--block-size 131072 --on-full queue --low-water 1048576 --min-free 5 --adopt matching",
        "pool grow p --data virtio-blk:more",
        "volume create p v --size 1048576 --filesystem xfs --origin pmem:3",
        "volume create p v --size 1048576 --filesystem none",
        "volume snapshot p w --of v --size 2097152",
        "volume delete p v --deferred",
        "volume mount p v /run/volumes/v --holder h --rootfs --suid --dev",
        "volume unmount p v --holder h",
        "volume grow p v --size 2097152",
    )
    for line in lines:
        assert "only recorded" in ctl(*line.split()).stderr, line
    kinds = {PoolOpen, PoolGrow, VolumeCreate, VolumeSnapshot, VolumeDelete}
    kinds |= {VolumeMount, VolumeUnmount, VolumeGrow}
    sent = [METHODS[name].from_wire(params) for name, params in agent.asked if name in METHODS]
    said = {field for record in sent for field in fields_said(record)}
    own = {(kind, name) for kind in kinds for name in kind._fields}
    assert own <= said
    assert any(isinstance(each, VolumeCreate) and each.filesystem is None for each in sent)


def test_every_field_of_a_network_can_be_said(agent: Recorder, ctl: Ctl) -> None:
    parts = (
        "interface,match=mac=52:54:00:12:34:56,name=eth0,mtu=1400,addresses=10.0.0.2/24,"
        "addresses=fd00::2/64,routes=destination=default+gateway=10.0.0.1+metric=7+table=9"
        "+source=10.0.0.2+on_link=1,neighbours=address=10.0.0.9+mac=52:54:00:00:00:99,dad=0",
        "interface,match=name=eth1,up=0,addresses=",
        "interface,vlan=parent=eth0+id=5,name=eth0.5",
        "rule,priority=100,table=9,source=10.0.0.0/24,destination=10.0.0.0/8,interface=eth0,mark=7,"
        "family=ipv4",
        "dns,servers=10.0.0.1,search=example.org,options=ndots:2",
        "hosts,address=10.0.0.2,names=guest,names=guest.example.org",
        "hostname=guest",
        "wait_ms=100",
    )
    assert "only recorded" in ctl("net", "configure", *parts).stderr
    params = request(agent, "net.configure")
    sent = NetConfigure.from_wire(params)
    assert sent.interfaces[0] == Interface(
        match=InterfaceMatch(mac="52:54:00:12:34:56"),
        name="eth0",
        mtu=1400,
        addresses=("10.0.0.2/24", "fd00::2/64"),
        routes=(
            Route(
                destination="default",
                gateway="10.0.0.1",
                metric=7,
                table=9,
                source="10.0.0.2",
                on_link=True,
            ),
        ),
        neighbours=(Neighbour(address="10.0.0.9", mac="52:54:00:00:00:99"),),
        dad=False,
    )
    assert sent.interfaces[1].addresses == ()
    said = {
        field
        for record in (sent, *sent.interfaces, *(sent.rules or ()), *(sent.hosts or ()))
        for field in fields_said(record)
    }
    route_fields = {(Route, name) for name in Route._fields}
    neighbour_fields = {(Neighbour, name) for name in Neighbour._fields}
    assert fields_of(NetConfigure) == said | route_fields | neighbour_fields
    document = json.dumps(params).encode()
    ctl("net", "configure", "--request", "-", text=document)
    assert request(agent, "net.configure") == params


def fields_of(kind: object) -> set[tuple[type[Record], str]]:
    """Return every field of a type of the contract and of the records in it, but ``kind``."""
    if isinstance(kind, type) and not isinstance(kind, types.GenericAlias):
        if not issubclass(kind, Record):
            return set()
        own = {(kind, name) for name in kind._fields if name != "kind"}
        return own.union(*(fields_of(each) for each, _ in kind._fields.values()))
    return set[tuple[type[Record], str]]().union(*map(fields_of, typing.get_args(kind)))


def fields_said(value: object) -> Iterator[tuple[type[Record], str]]:
    """Yield the fields of a record, and of records in it, whose value is not the default."""
    if not isinstance(value, Record):
        return
    for name, (_, default) in type(value)._fields.items():
        field = getattr(value, name)
        if name != "kind" and field != default:
            yield type(value), name
        yield from fields_said(field)


@pytest.mark.parametrize(
    "line",
    [
        "layer mount x --device pmem:0 --salt ab",
        "layer mount x --device pmem:0 --no-superblock",
        "layer mount x --device pmem:0 --preset strict",
        f"layer mount x --device pmem:0 --root-digest {'ab' * 32} --no-superblock",
        "layer mount x --device pmem:0 --root-digest abc",
        "overlay mount o a --volatile",
        "layers mount",
        "layers mount pmem:0,root=none --xino on",
        "layers mount pmem:0",
        "layers unmount",
        "pool open p --metadata pmem:0 --data pmem:0",
        "pool open p --metadata pmem:0 --data pmem:1 --block-size 1000",
        "volume create p v --size 1000",
        "volume create p .v --size 1048576",
        "volume mount p v relative",
    ],
)
def test_invalid_command_line_is_usage_error_and_sends_no_request(
    agent: Recorder, ctl: Ctl, line: str
) -> None:
    done = ctl(*line.split())
    assert done.exit_code == 2, done.output
    assert agent.asked == []


def test_a_batch_as_text_and_as_json(agent: Recorder, ctl: Ctl, tmp_path: Path) -> None:
    digest = "ab" * 32
    words = (f"pmem:0,root={digest},id=top", "/dev/vda,root=none", "--overlay", "root")
    ctl("layers", "mount", *words, "--scratch", "tmpfs:8192")
    asked = request(agent, "layers.mount")
    batch = LayersMount.from_wire(asked)
    assert [layer.layer_id for layer in batch.layers] == ["top", "layer1"]
    assert batch.overlay is not None
    assert batch.overlay.layers == ("top", "layer1")
    text = json.dumps(batch.to_wire(), default=bytes.hex).encode()
    agent.asked.clear()
    ctl("layers", "mount", "--request", "-", text=text)
    assert LayersMount.from_wire(request(agent, "layers.mount")) == batch
    assert ctl("layers", "mount", "--request", "-", text=b"[" * 100_000).exit_code == 2
    assert ctl("layers", "mount", "--request", "-", *words, text=text).exit_code == 2
    agent.asked.clear()
    (tmp_path / "top.p7s").write_bytes(b"signed")
    ctl("layers", "mount", f"pmem:0,root={digest},signature={tmp_path}/top.p7s")
    (signed,) = LayersMount.from_wire(request(agent, "layers.mount")).layers
    assert signed.verity == Verity(root_digest=bytes.fromhex(digest), signature=b"signed")
    missing = ctl("layers", "mount", f"pmem:0,root={digest},signature={tmp_path}/no")
    assert (missing.exit_code, "cannot be read: No such file" in missing.stderr) == (2, True)
    unknown = b'{"layers": [], "unknown": 1}'
    done = ctl("layers", "mount", "--request", "-", text=unknown)
    assert (done.exit_code, "unknown" in done.stderr) == (1, True)


# --- a guest that sends control sequences

EVIL = "\x1b]0;owned\x07"


def crash_report() -> CrashReport:
    return CrashReport(
        number=1, kind="death", reason="x", unix_ms=1, agent="x", pid=1, restarts=0, traceback="x"
    )


class Hostile(Recorder):
    """Every text of its replies has a control sequence in it."""

    def _handle(self, call: Call) -> Outcome:
        outcome = super()._handle(call)
        return Outcome(outcome.error, spoilt(outcome.result)) if outcome.error is None else outcome

    def layer_mount(self, _call: Call) -> object:
        device, verity = dm_device("x"), dict.fromkeys(VerityReport._fields, "x")
        numbers = ("hash_type", "data_blocks", "data_block_size", "hash_block_size")
        verity |= dict.fromkeys((*numbers, "hash_offset_bytes"), 0)
        verity |= {"superblock": True, "signed": False, "options": [], "dropped": []}
        more = {"dm": [device], "verity": verity, "overlaps": ["x"], "timings_ms": {"x": 1.0}}
        return {**layer_report("x"), **more}

    def overlay_mount(self, _call: Call) -> object:
        return overlay_report("x", "a")

    def layers_mount(self, call: Call) -> object:
        layers = [self.layer_mount(call)]
        return {"layers": layers, "overlay": self.overlay_mount(call), "timings_ms": {}}

    def layer_unmount(self, _call: Call) -> object:
        more = {"timings_ms": {}, "already": False}
        return {"unmounted": ["x"], "removed_devices": ["x"], **more}

    overlay_unmount = layer_unmount

    def layers_unmount(self, call: Call) -> object:
        gone = self.layer_unmount(call)
        return {"layers": {"x": gone}, "overlay": gone, "timings_ms": {}}

    def dev_create(self, _call: Call) -> object:
        texts = dict.fromkeys(("tree_id", "state", "root", "dev"), "x")
        numbers = dict.fromkeys(("mount_id", "size_bytes", "free_bytes", "mode"), 0)
        where = {"target": "x", "pid": None, "namespace": "x"}
        more = {"paths": ["x"], "nodes": [self._node()], "attached": [where]}
        return {**texts, **numbers, **more, "user_namespace": None}

    def dev_list(self, call: Call) -> object:
        return {"trees": [self.dev_create(call)]}

    def dev_add(self, _call: Call) -> object:
        path = {"path": "x", "state": "x", "nodes": [self._node()]}
        return {"paths": [path], "timings_ms": {"x": 1.0}}

    dev_closure = dev_add

    def dev_remove(self, _call: Call) -> object:
        return {"removed": ["x"], "kept": ["x"], "timings_ms": {}}

    def dev_attach(self, _call: Call) -> object:
        names = {"tree_id": "x", "target": "x", "mount_id": 0}
        return {**names, "already": False, "timings_ms": {}}

    def share_mount(self, _call: Call) -> object:
        texts = dict.fromkeys(("share_id", "tag", "kind", "state", "target", "dev"), "x")
        return {**texts, "mount_id": 1, "read_only": True, "options": ["x"]}

    def share_list(self, call: Call) -> object:
        return {"shares": [self.share_mount(call)]}

    def _node(self) -> dict[str, object]:
        texts = dict.fromkeys(("path", "way", "state", "rdev", "target"), "x")
        return {**texts, "kind": "link", **dict.fromkeys(("uid", "gid", "mode"), 0)}

    def net_configure(self, _call: Call) -> object:
        numbers = {"timings_ms": {"x": 1.0}, "already": False}
        return {"interfaces": [], "rules": [], "hostname": "x", **numbers}

    def dm_table(self, _call: Call) -> object:
        return {"name": "x", "lines": ["x"]}

    def dm_status(self, _call: Call) -> object:
        return {"name": "x", "lines": ["x"], "device": dm_device("x")}

    def fs_acl_get_file(self, _call: Call) -> object:
        return {"entries": [], "text": "x"}

    def fs_mountpoints(self, _call: Call) -> object:
        texts = dict.fromkeys(("target", "source", "filesystem", "dev"), "x")
        return {"mounts": [{**texts, "mount_id": 1, "options": ["x"]}]}

    def fs_checksum_device(self, _call: Call) -> object:
        return {"algorithm": "sha256", "digest": "x", "size_bytes": 1, "timings_ms": {}}

    fs_checksum = fs_checksum_device


def spoilt(value: object, name: str = "") -> object:
    if isinstance(value, dict):
        is_map = name in ("timings_ms", "boot", "limits", "fields")
        return {f"{key}{EVIL if is_map else ''}": spoilt(v, key) for key, v in value.items()}
    if isinstance(value, list):
        return [spoilt(each, name) for each in value]
    return value + EVIL if isinstance(value, str) and name != "kind" else value


@pytest.mark.parametrize(
    "line",
    [
        "hello",
        "status",
        "top",
        "log",
        "crashes",
        "events",
        "layer list",
        "layer mount x --device pmem:0",
        "layer unmount x",
        "layer check x",
        "overlay list",
        "overlay mount o a",
        "overlay unmount o",
        "layers mount pmem:0,root=none",
        "layers unmount a",
        "dev create x",
        "dev add x /dev/null",
        "dev remove x /dev/null",
        "dev list",
        "dev list x",
        "dev closure /dev/null",
        "dev attach x /dev",
        "share mount x host",
        "share list",
        "dm list",
        "dm table x",
        "dm status x",
        "fs mountpoints",
        "fs device /dev/vda",
        "fs devices",
        "fs stat layer:a /file",
        "fs checksum layer:a /file",
        "fs checksum-device /dev/vda",
        "metrics",
        "crashes 1",
        "net configure hostname=guest",
        "connect vm ADDRESS",
    ],
)
def test_replies_from_guest_are_printed_without_control_characters(
    tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    agent = Hostile(tmp_path / "agent")
    try:
        agent.layers, agent.overlays = {"a": "mounted"}, {"o": ("a",)}
        agent.crashes = [crash_report()]
        agent.publish(f"layer_mounted{EVIL}")
        agent.log()
        words = line.replace("ADDRESS", agent.address).split()
        done = CliRunner().invoke(collect(), ["--connect", agent.address, *words])
    finally:
        agent.stop()
    assert done.exit_code == 0, done.output
    assert done.stdout
    assert "\x1b" not in done.output
    assert "\x07" not in done.output


# --- packs


@pytest.fixture
def manifest(tmp_path: Path, ctl: Ctl) -> Manifest:
    files = [directory("etc"), Member("etc/hosts", b"localhost")]
    layout = Layout(tmp_path / "layout").layer(files).layer([Member("etc/.wh.hosts")])
    done = ctl("pack", "build", str(layout.finish()), str(tmp_path / "p.img"))
    assert done.exit_code == 0, done.stderr
    return Manifest.load(tmp_path / "p.img.json")


def test_a_pack_is_mounted_and_unmounted(
    agent: Recorder, ctl: Ctl, manifest: Manifest, tmp_path: Path
) -> None:
    ids = tuple(layer.layer_id for layer in manifest.layers)
    signatures = tmp_path / "signatures"
    signatures.mkdir()
    words = ("--device", "pmem:2", "--overlay", "root", "--scratch", "tmpfs:8192")
    path = str(tmp_path / "p.img.json")
    more = ("--signatures", str(signatures), "--preset", "strict")
    assert ids[0] in ctl("pack", "mount", path, *words, *more).stderr  # no signature of it
    assert agent.asked == []
    for layer_id in ids:
        (signatures / f"{layer_id}.p7s").write_bytes(layer_id.encode())
    assert "only recorded" in ctl("pack", "mount", path, *words, *more).stderr
    batch = LayersMount.from_wire(request(agent, "layers.mount"))
    device = {"kind": "pmem", "number": 2}
    for sent, layer in zip(batch.layers, manifest.layers, strict=True):
        known = LayerSpec.from_wire(layer_spec(layer, device))
        assert known.verity is not None
        signed = known.verity.replace(signature=layer.layer_id.encode(), preset="strict")
        assert sent == known.replace(verity=signed)
    assert batch.overlay is not None
    assert batch.overlay.layers == ids
    assert batch.overlay.scratch is not None
    agent.asked.clear()
    assert f"signed: {', '.join(ids)}" in ctl("pack", "sign", path, *more[:2]).stdout
    ctl("pack", "mount", path, *words)  # the manifest has them now
    for sent in LayersMount.from_wire(request(agent, "layers.mount")).layers:
        assert sent.verity is not None
        assert sent.verity.signature == sent.layer_id.encode()
    agent.asked.clear()
    ctl("pack", "mount", path, *words, "--no-signatures")
    for sent in LayersMount.from_wire(request(agent, "layers.mount")).layers:
        assert sent.verity is not None
        assert sent.verity.signature is None
    assert ctl("pack", "mount", path, "--no-signatures", *more[:2]).exit_code == 2
    ctl("pack", "unmount", path, "--overlay", "root", "--force")
    assert request(agent, "layers.unmount") == {
        "layers": list(ids),
        "overlay": "root",
        "force": True,
    }


@pytest.mark.parametrize(
    ("kind", "option", "is_sent"),
    [
        ("trusted", (), True),
        ("trusted", ("--userxattr",), False),
        ("user", (), False),
        ("user", ("--userxattr",), True),
        ("both", ("--userxattr",), False),
        ("none", ("--userxattr",), True),
    ],
)
def test_a_pack_is_overlaid_only_as_its_whiteouts_are(
    agent: Recorder,
    ctl: Ctl,
    manifest: Manifest,
    tmp_path: Path,
    kind: str,
    option: tuple[str, ...],
    is_sent: bool,
) -> None:
    layers = tuple(dataclasses.replace(layer, whiteouts=kind) for layer in manifest.layers)
    path = tmp_path / "p.img.json"
    dataclasses.replace(manifest, layers=layers).save(path)
    ctl("pack", "mount", str(path), "--overlay", "root", *option)
    assert ("layers.mount" in [name for name, _ in agent.asked]) == is_sent
    agent.asked.clear()
    if not option:
        ctl("pack", "mount", str(path))  # without an overlay every layer can be mounted
        assert request(agent, "layers.mount")


def test_a_pack_needs_an_agent_and_a_right_device(
    ctl: Ctl, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = str(tmp_path / "p.img")
    assert CliRunner().invoke(collect(), ["pack", "mount", path]).exit_code == 2
    assert ctl("pack", "mount", path, "--device", "pmem").exit_code == 2
    assert ctl("pack", "mount", path, "--target", "/x").exit_code == 2
