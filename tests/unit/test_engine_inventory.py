"""Claims: what is spoken for is refused with the owner's name, and is free again after."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_engine_journal import layer

from guestagent.api import ByteRange, OverlaySpec
from guestagent.engine.claims import PathClaims, SharedRanges
from guestagent.engine.inventory import Inventory, LiveOverlay
from vsock.errors import CallError

STATE = "/run/guestagent"


@pytest.fixture
def inventory():
    return Inventory(reserved=STATE)


@pytest.mark.parametrize(
    "target", ["/run/a", "/run/a/b", "/run", STATE, f"{STATE}/x", "/run/guestagent/links/o"]
)
def test_targets_must_not_lie_on_in_or_above_each_other(inventory, target):
    inventory.claim_target("/run/a", ("layer", "first"))
    with pytest.raises(CallError) as caught:
        inventory.claim_target(target, ("layer", "second"))
    assert (caught.value.code, caught.value.object) == ("conflict", target)


paths = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(
    lambda names: "/".join(["", *names])
)


@given(st.lists(st.tuples(paths, st.booleans()), max_size=20))
def test_paths_in_the_way_are_those_found_one_by_one(steps):
    claims, claimed = PathClaims(), set()
    for path, is_dropped in steps:
        if is_dropped:
            claims.drop(path)
            claimed.discard(path)
            continue
        on_the_way = {
            other
            for other in claimed
            if f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/")
        }
        found = claims.conflicting_path(path)
        if found is None:
            assert not on_the_way
            claims.add(path, ("layer", path))
            claimed.add(path)
        else:
            assert found[0] in on_the_way
            assert found[1] == ("layer", found[0])
    for path in claimed:
        assert claims.get(path) == ("layer", path)
        claims.drop(path)
    assert all(claims.conflicting_path(path) is None for path in claimed | {"/a", "/b", "/c"})


def test_names_that_only_begin_alike_are_apart(inventory):
    inventory.claim_target("/run/a", ("layer", "first"))
    inventory.claim_target("/run/ab", ("layer", "second"))
    inventory.claim_target("/run/guestagent2", ("layer", "third"))
    inventory.release_target("/run/a")
    inventory.claim_target("/run/a/b", ("layer", "fourth"))


@pytest.mark.parametrize("key", ["/run/s", "/run/s/upper", "/run", "/run/t/x", STATE])
def test_scratches_must_not_overlap_each_other_or_targets(inventory, key):
    inventory.claim_scratch("/run/s", "o")
    inventory.claim_target("/run/t", ("layer", "first"))
    with pytest.raises(CallError) as caught:
        inventory.claim_scratch(key, "p")
    assert caught.value.code == "conflict"


def test_an_overlay_cannot_be_mounted_into_its_own_scratch(inventory):
    inventory.claim_target("/run/s/merged", ("overlay", "o"))
    with pytest.raises(CallError, match="overlay 'o'"):
        inventory.claim_scratch("/run/s", "o")


def test_a_target_cannot_lie_in_a_scratch(inventory):
    inventory.claim_scratch("/run/s", "o")
    with pytest.raises(CallError, match="scratch of overlay 'o'"):
        inventory.claim_target("/run/s/upper/etc", ("layer", "first"))
    inventory.release_scratch("/run/s")
    inventory.claim_target("/run/s/upper/etc", ("layer", "first"))


def test_directories_belong_to_all_that_share_them(inventory):
    first, second = ("layer", "a"), ("layer", "b")
    missing = ["/run/layers", "/run/layers/a"]
    assert inventory.claim_directories(first, "/run/layers/a", missing) == missing
    shared = inventory.claim_directories(second, "/run/layers/b", ["/run/layers/b"])
    assert shared == ["/run/layers", "/run/layers/b"]
    inventory.release_directories(first)
    third = inventory.claim_directories(("layer", "c"), "/run/layers/c", ["/run/layers/c"])
    assert third == ["/run/layers", "/run/layers/c"]


def test_directories_that_were_there_belong_to_nobody(inventory):
    assert inventory.claim_directories(("layer", "a"), "/run/there/a", ["/run/there/a"]) == [
        "/run/there/a"
    ]


def test_dm_names_are_the_preferred_unless_taken(inventory):
    assert inventory.claim_dm_names("a", ("l", "v"), lambda: ("l-a", "v-a")) == ("l", "v")
    assert inventory.claim_dm_names("a", ("l", "v"), lambda: ("l-a", "v-a")) == ("l", "v")
    assert inventory.claim_dm_names("b", ("x", "v"), lambda: ("l-b", "v-b")) == ("l-b", "v-b")
    inventory.release_dm_names("a")
    assert inventory.claim_dm_names("c", ("l", "v"), lambda: ("l-c", "v-c")) == ("l", "v")


@pytest.mark.parametrize(
    ("offset", "size", "overlaps"),
    [(0, 4096, True), (4096, 512, False), (3584, 1024, True), (0, 512, True), (8192, 512, False)],
)
def test_overlapping_ranges(inventory, offset, size, overlaps):
    inventory.add_layer(layer("a"))
    other = layer("b")
    area = ByteRange(offset_bytes=offset, size_bytes=size)
    other = other.replace(source=other.source.replace(range=area))
    assert inventory.overlapping(other) == (("a",) if overlaps else ())
    inventory.add_layer(other)
    inventory.add_layer(other)
    assert inventory.overlapping(other) == (("a",) if overlaps else ())
    device = other.source.device.replace(dev="7:1")
    elsewhere = other.replace(source=other.source.replace(device=device))
    assert inventory.overlapping(elsewhere) == ()
    inventory.add_layer(elsewhere)
    assert inventory.overlapping(layer("a")) == ()
    inventory.drop_layer("a")
    inventory.drop_layer("a")
    assert inventory.overlapping(other) == ()


extents = st.builds(
    lambda offset, size: ByteRange(offset_bytes=512 * offset, size_bytes=512 * size),
    st.integers(0, 40),
    st.integers(1, 20) | st.just(100),
)


@given(st.lists(extents, max_size=12), st.sets(st.integers(0, 11)), extents)
def test_ranges_that_share_bytes_are_those_that_meet_one_by_one(areas, dropped, wanted):
    ranges = SharedRanges()
    for number, area in enumerate(areas):
        ranges.add(area, str(number))
    left = {}
    for number, area in enumerate(areas):
        if number in dropped:
            ranges.drop(area, str(number))
        else:
            left[str(number)] = area
    end = wanted.offset_bytes + wanted.size_bytes
    assert len(ranges) == len(left)
    assert set(ranges.sharing(wanted)) == {
        owner
        for owner, area in left.items()
        if area.offset_bytes < end and wanted.offset_bytes < area.offset_bytes + area.size_bytes
    }


def test_users_and_holders_of_a_layer(inventory):
    inventory.add_layer(layer("a"))
    spec = OverlaySpec(overlay_id="o", layers=("a", "b"))
    live = LiveOverlay(spec=spec, lowerdirs=(), method="", links=None, scratch=None, created=())
    inventory.add_overlay(live)
    assert inventory.users_of("a") == ("o",)
    assert [holder.name for holder in inventory.holders_of_layer("b")] == ["o"]
    inventory.drop_overlay("o")
    assert inventory.users_of("a") == ()


def test_a_state_is_news_once(inventory):
    assert not inventory.set_layer_state("a", "corrupted")
    inventory.add_layer(layer("a"))
    assert inventory.set_layer_state("a", "corrupted")
    assert not inventory.set_layer_state("a", "corrupted")
    found = inventory.layer("a")
    assert found is not None
    assert found.state == "corrupted"
