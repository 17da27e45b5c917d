"""Plans: pure decisions, refusals before anything exists, and lines that can be read."""

import hashlib

import pytest

from guestagent.api import ByteRange, LayerSpec, PathDevice, PmemDevice, ScsiDevice, VirtioBlkDevice
from guestagent.api import Verity as VerityRequest
from guestagent.api.agent import FEATURES
from guestagent.engine.features import missing_of
from guestagent.engine.plan import (
    check_target,
    device_tag,
    dm_names,
    plan_layer,
    source_of,
    verity_options,
)
from guestagent.storage.verity import VerityParameters
from tests.beds.calls import call_error
from tests.beds.enginebed import DEVICE
from vsock.rpc import Decoder, Limits, Request, encode_request

ROOT = bytes(range(32))


def spec(**changes):
    base = LayerSpec(
        layer_id="base",
        device=PmemDevice(number=0),
        mapping=ByteRange(offset_bytes=1 << 20, size_bytes=8192),
        verity=VerityRequest(root_digest=ROOT),
        filesystem="erofs",
    )
    return base.replace(**changes)


SOURCE = source_of((), DEVICE)
PARAMETERS = VerityParameters(
    root_digest=ROOT,
    salt=b"\xab",
    algorithm="sha256",
    hash_type=1,
    data_blocks=1,
    data_block_size=4096,
    hash_block_size=4096,
    hash_offset_bytes=4096,
    superblock=True,
)


def test_a_dry_run_prints_every_step():
    plan = plan_layer(spec(), SOURCE, names=("l", "v"), parameters=PARAMETERS)
    assert plan.describe(spec().ranges) == (
        "create l: 0 16 linear 7:0 2048",
        f"create v: 0 8 verity 1 l l 4096 4096 1 2 sha256 {ROOT.hex()} ab",
        "mount erofs on /run/layers/base (ro,nodev,nosuid)",
    )
    assert plan.dm_names == ("v", "l")


def test_without_mapping_and_without_verity():
    plain = plan_layer(spec(mapping=None, verity=None, filesystem="ext4"), SOURCE, names=("l", "v"))
    assert plain.describe(()) == ("mount ext4 on /run/layers/base (ro,nodev,nosuid)",)
    assert plain.dm_names == ()


@pytest.mark.parametrize(
    ("device", "tag"),
    [
        (PmemDevice(number=3), "pmem3"),
        (ScsiDevice(controller=1, lun=2, partition=3), "scsi-contr1-lun2-p3"),
        (VirtioBlkDevice(serial="disk.7"), "virtio-blk-disk.7"),
        (PathDevice(path="/dev/mapper/a=b"), "mapper_a_b"),
        (PathDevice(path="/dev/" + "x" * 100), "x" * 32),
    ],
)
def test_device_tags_are_plain_words(device, tag):
    assert device_tag(device) == tag


def test_dm_names_follow_hcsshim():
    assert dm_names(spec(), unique=False) == (
        "dm-linear-pmem0-1048576-8192",
        f"dm-verity-pmem0-{ROOT.hex()}",
    )
    assert dm_names(spec(), unique=True) == (
        "dm-linear-base",
        f"dm-verity-base-{ROOT.hex()[:16]}",
    )


def pages(*numbers):
    return tuple(ByteRange(offset_bytes=number * 4096, size_bytes=4096) for number in numbers)


def test_dm_names_of_a_list_tell_its_ranges():
    linear, verity = dm_names(spec(mapping=pages(3, 1)), unique=False)
    digest = hashlib.sha256(b"12288+4096:4096+4096").hexdigest()[:16]
    assert linear == f"dm-linear-pmem0-2x-{digest}"
    assert verity == f"dm-verity-pmem0-2x-{digest}-{ROOT.hex()}"
    assert dm_names(spec(mapping=pages(1, 3)), unique=False)[0] != linear
    assert dm_names(spec(mapping=pages(1, 3)), unique=True)[0] == "dm-linear-base"


def test_a_list_of_one_range_is_that_range():
    assert spec(mapping=pages(7)) == spec(mapping=pages(7)[0])


def test_a_list_of_ranges_is_one_table_in_its_order():
    ranges = pages(9, 2, 2)
    wanted = spec(mapping=ranges, verity=None)
    assert source_of(wanted.ranges, DEVICE).size_bytes == 3 * 4096
    plan = plan_layer(wanted, SOURCE, names=("l", "v"))
    assert plan.describe(wanted.ranges)[0] == (
        "create l: 0 8 linear 7:0 72; 8 8 linear 7:0 16; 16 8 linear 7:0 16"
    )
    long = plan.describe(pages(*range(100)))[0]
    assert long.count("linear 7:0") == 16
    assert long.endswith("and 84 more targets")


def test_a_range_of_a_list_must_lie_on_the_device():
    with call_error(
        "invalid", match=r"mapping\[2\] ends at byte 1052672", object="params.mapping[2]"
    ):
        source_of(pages(0, 255, 256, 1), DEVICE)


@pytest.mark.parametrize(
    ("mapping", "problem"),
    [
        ((), "1 to 4096 ranges, got 0"),
        (pages(*range(4097)), "1 to 4096 ranges, got 4097"),
        ((ByteRange(offset_bytes=0, size_bytes=1 << 62),) * 2, "together exceed 63 bits"),
    ],
)
def test_lists_that_no_layer_can_have(mapping, problem):
    with pytest.raises(ValueError, match=problem):
        spec(mapping=mapping)


def test_the_longest_request_fits_the_wire():
    longest = spec(
        mapping=tuple(
            ByteRange(offset_bytes=(1 << 62) + number * 512, size_bytes=1 << 40)
            for number in range(4096)
        ),
        verity=VerityRequest(root_digest=bytes(64), salt=bytes(256), signature=bytes(64 * 1024)),
        target="/run/layers/" + "t" * 200,
    )
    data = encode_request(1, "layer.mount", longest.to_wire())
    assert len(data) < Limits().max_request_bytes
    decoder = Decoder(Limits())
    decoder.feed(data)
    message = decoder.next()
    assert isinstance(message, Request)
    assert LayerSpec.from_wire(message.params) == longest


def test_the_longest_names_fit_the_kernel():
    verity = VerityRequest(root_digest=bytes(64))
    for mapping in (spec().mapping, pages(*range(4096))):
        device = VirtioBlkDevice(serial="s" * 20)
        long = spec(layer_id="i" * 64, device=device, verity=verity, mapping=mapping)
        for unique in (False, True):
            assert max(map(len, dm_names(long, unique=unique))) <= 127


def test_unique_names_differ_by_layer_id_alone():
    """Names with a whole sha512 digest are cut to 127 characters: two layers of one device whose
    digests end differently share them, and then get unique names."""
    device = VirtioBlkDevice(serial="s" * 20)
    layers = [
        spec(
            layer_id=f"layer{last}",
            device=device,
            verity=VerityRequest(root_digest=bytes(63) + bytes([last])),
        )
        for last in (1, 2)
    ]
    shared = {dm_names(layer, unique=False) for layer in layers}
    assert len(shared) == 1
    assert len({name for layer in layers for name in dm_names(layer, unique=True)}) == 4


@pytest.mark.parametrize(
    ("offset", "size", "fits"),
    [
        (0, 1 << 20, True),
        (512, 1 << 20, False),
        (1 << 20, 512, False),
        ((1 << 20) - 512, 512, True),
    ],
)
def test_a_mapping_must_lie_on_the_device(offset, size, fits):
    mapping = ByteRange(offset_bytes=offset, size_bytes=size)
    if fits:
        assert source_of((mapping,), DEVICE).size_bytes == size
    else:
        with call_error("invalid"):
            source_of((mapping,), DEVICE)


def test_no_mapping_is_the_whole_device():
    assert source_of((), DEVICE).size_bytes == 1 << 20


@pytest.mark.parametrize(
    ("target", "roots", "root"),
    [
        ("/run/a", ("/run",), "/run"),
        ("/run/a", ("/run/",), "/run/"),
        ("/run/b/a", ("/run/a", "/run/b"), "/run/b"),
        ("/a", ("/",), "/"),
        ("/run", ("/run",), None),
        ("/runa", ("/run",), None),
        ("/run/c", ("/run/a", "/run/b"), None),
    ],
)
def test_targets_lie_below_a_root(target, roots, root):
    if root is not None:
        assert check_target(target, roots) == root
    else:
        with call_error("invalid"):
            check_target(target, roots)


@pytest.mark.parametrize(
    ("preset", "version", "arguments", "dropped"),
    [
        ("default", (1, 0, 0), (), ()),
        ("strict", (1, 6, 0), (), ("panic_on_corruption", "panic_on_error")),
        ("strict", (1, 7, 0), ("panic_on_corruption",), ("panic_on_error",)),
        ("strict", (1, 9, 0), ("panic_on_corruption",), ("panic_on_error",)),
        ("strict", (1, 10, 0), ("panic_on_corruption", "panic_on_error"), ()),
        ("fast", (1, 2, 0), (), ("try_verify_in_tasklet", "ignore_zero_blocks")),
        ("fast", (1, 8, 0), ("ignore_zero_blocks",), ("try_verify_in_tasklet",)),
        ("fast", (1, 9, 0), ("try_verify_in_tasklet", "ignore_zero_blocks"), ()),
    ],
)
def test_presets_are_gated_by_the_target_version(preset, version, arguments, dropped):
    options = verity_options(preset, version, None)
    assert options.arguments == arguments
    assert tuple(option.option for option in options.dropped) == dropped
    for option in options.dropped:
        assert ".".join(map(str, version)) in option.reason


def test_a_signature_is_never_dropped():
    assert verity_options("default", (1, 5, 0), "key").arguments == (
        "root_hash_sig_key_desc",
        "key",
    )
    with call_error("unsupported"):
        verity_options("default", (1, 4, 0), "key")


# --- the features that hello tells

VERITY = {"linear": (1, 4, 0), "verity": (1, 10, 0)}
OTHERS = {"crypt": (1, 24, 0), "thin-pool": (1, 22, 0)}
KNOWN = frozenset(("erofs", "squashfs", "ext4", "xfs", "tmpfs", "overlay", "virtiofs", "9p"))


def features(
    versions, known=KNOWN, ways=("fsconfig-fd", "fsconfig-path", "mount"), signed=True, flat=True
):
    missing = missing_of(versions, known, ways, knows_signatures=signed, flattens_erofs=flat)
    return set(FEATURES) - set(missing)


def test_every_feature_is_one_of_the_contract_and_can_be_had():
    assert features({**VERITY, **OTHERS}) == set(FEATURES)


def test_a_feature_that_is_missing_has_its_reason():
    kernel = {"verity": (1, 4, 0), "linear": (1, 4, 0), **OTHERS}
    found = missing_of(
        kernel, KNOWN - {"ext4"}, ("mount",), knows_signatures=True, flattens_erofs=False
    )
    assert found == {
        "erofs-flattened": "the kernel mounts no erofs image with a device table; Linux 6.4 and "
        "later do",
        "verity-signatures": "the kernel's verity target is 1.4.0, this needs 1.5.0",
        "preset-strict": "panic_on_corruption: the kernel's verity target is 1.4.0, this needs "
        "1.7.0; panic_on_error: the kernel's verity target is 1.4.0, this needs 1.10.0",
        "preset-fast": "try_verify_in_tasklet: the kernel's verity target is 1.4.0, this needs "
        "1.9.0",
        "fs-ext4": "the kernel has no file system ext4: load the module ext4",
        "overlay-fsconfig-fd": "the kernel cannot; Linux 6.13 and later can",
        "overlay-fsconfig-path": "the kernel cannot; Linux 6.5 and later can",
        "scratch-device-ext4": "the kernel has no file system ext4: load the module ext4",
    }
    nothing = missing_of({}, frozenset(), (), knows_signatures=False, flattens_erofs=False)
    own = {"batch", "events", "inspect", "verify", "reasons"}
    own |= {"device-labels", "readonly-policy", "whiteouts", "net-configure"}
    assert set(FEATURES) - set(nothing) == own
    assert all(nothing.values())
    assert nothing["dm-verity"].endswith(
        "no device-mapper target verity: load the module dm-verity"
    )
    assert nothing["overlay-mount"].endswith("file system overlay: load the module overlay")


def test_a_preset_is_a_feature_where_none_of_its_options_is_dropped():
    found = features({"verity": (1, 9, 0)})
    assert {"preset-default", "preset-fast"} <= found
    assert "preset-strict" not in found
    assert not any(name.startswith("preset-") for name in features({}))


def test_signatures_need_the_target_and_the_build_of_the_kernel():
    assert "verity-signatures" in features(VERITY)
    assert "verity-signatures" not in features({"verity": (1, 4, 0)})
    assert "verity-signatures" not in features(VERITY, signed=False)
    assert "verity-signatures" not in features({})


def test_scratches_need_overlayfs_and_their_file_system():
    found = features(VERITY, known=frozenset(("overlay", "tmpfs", "ext4")))
    scratches = {name for name in found if name.startswith("scratch-")}
    assert scratches == {"scratch-tmpfs", "scratch-directory", "scratch-device-ext4"}
    without = features(VERITY, known=KNOWN - {"overlay"}, ways=())
    assert not any(name.startswith(("scratch-", "overlay-")) for name in without)
