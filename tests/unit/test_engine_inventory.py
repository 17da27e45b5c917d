"""Reservations: a conflict is refused with the owner's name, and released paths are free again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.api import ByteRange, OverlaySpec
from guestagent.engine.claims import PathClaims
from guestagent.engine.inventory import Inventory, LiveOverlay
from tests.beds.calls import call_error
from tests.beds.enginebed import layer
from vsock.errors import CallError

STATE = "/run/guestagent"


@pytest.fixture
def inventory():
    return Inventory(reserved=STATE)


@pytest.mark.parametrize(
    "target", ["/run/a", "/run/a/b", "/run", STATE, f"{STATE}/x", "/run/guestagent/links/o"]
)
def test_targets_must_not_lie_on_in_or_above_each_other(inventory, target):
    inventory.reserve(("layer", "first"), "/run/a")
    with call_error("conflict", object=target):
        inventory.reserve(("layer", "second"), target)


paths = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(
    lambda names: "/".join(["", *names])
)


@given(st.lists(st.tuples(paths, st.booleans()), max_size=20))
def test_conflicting_path_agrees_with_a_linear_search(steps):
    claims, claimed = PathClaims(), set()
    for path, is_dropped in steps:
        if is_dropped:
            claims.drop(path)
            claimed.discard(path)
            continue
        conflicting = {
            other
            for other in claimed
            if f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/")
        }
        found = claims.conflicting_path(path)
        if found is None:
            assert not conflicting
            claims.add(path, "target", ("layer", path))
            claimed.add(path)
        else:
            assert found in conflicting
            with pytest.raises(CallError, match="conflict"):
                claims.add(path, "target", ("layer", path))
    for path in claimed:
        assert claims.get(path) == ("target", ("layer", path))
        claims.drop(path)
    assert all(claims.conflicting_path(path) is None for path in claimed | {"/a", "/b", "/c"})


def test_names_that_only_begin_alike_are_apart(inventory):
    inventory.reserve(("layer", "first"), "/run/a")
    inventory.reserve(("layer", "second"), "/run/ab")
    inventory.reserve(("layer", "third"), "/run/guestagent2")
    inventory.release(("layer", "first"))
    inventory.reserve(("layer", "first"), "/run/a/b")


@pytest.mark.parametrize("key", ["/run/s", "/run/s/upper", "/run", "/run/t/x", STATE])
def test_scratches_must_not_overlap_each_other_or_targets(inventory, key):
    inventory.reserve_scratch(("overlay", "o"), "/run/s")
    inventory.reserve(("layer", "first"), "/run/t")
    with call_error("conflict"):
        inventory.reserve_scratch(("overlay", "p"), key)


def test_an_overlay_cannot_be_mounted_into_its_own_scratch(inventory):
    inventory.reserve(("overlay", "o"), "/run/s/merged")
    with pytest.raises(CallError, match="overlay 'o'"):
        inventory.reserve_scratch(("overlay", "o"), "/run/s")


def test_a_target_cannot_lie_in_a_scratch(inventory):
    inventory.reserve_scratch(("overlay", "o"), "/run/s")
    assert inventory.scratch_owner("/run/s") == "o"
    with pytest.raises(CallError, match="scratch of overlay 'o'"):
        inventory.reserve(("layer", "first"), "/run/s/upper/etc")
    inventory.release(("overlay", "o"))
    assert inventory.scratch_owner("/run/s") is None
    inventory.reserve(("layer", "first"), "/run/s/upper/etc")


def test_scratch_device_is_shared_only_by_overlays_that_ask_for_it(inventory):
    first, second, third = (("overlay", name) for name in "abc")
    inventory.reserve_scratch(first, "7:1", is_shared=True)
    inventory.reserve_scratch(second, "7:1", is_shared=True)
    with pytest.raises(CallError, match="scratch of overlay 'a'"):
        inventory.reserve_scratch(third, "7:1")
    assert inventory.users_of_scratch("7:1") == ("a", "b")
    inventory.leave_scratch(first)
    assert (inventory.scratch_owner("7:1"), inventory.users_of_scratch("7:1")) == ("b", ("b",))
    inventory.release(second)
    assert (inventory.scratch_owner("7:1"), inventory.users_of_scratch("7:1")) == (None, ())
    inventory.reserve_scratch(third, "7:1")
    with pytest.raises(CallError, match="scratch of overlay 'c'"):
        inventory.reserve_scratch(first, "7:1", is_shared=True)


def directories(inventory, name, *there):
    """Reserve a target; return what is to be made where so much is there."""
    target = f"/run/layers/{name}"
    return inventory.reserve(("layer", name), target, exists=there.__contains__).directories


def test_shared_missing_directories_are_reserved_until_the_last_release(inventory):
    there = ("/run", "/run/layers")
    assert directories(inventory, "a", "/run") == ("/run/layers", "/run/layers/a")
    assert directories(inventory, "b", *there) == ("/run/layers", "/run/layers/b")
    inventory.release(("layer", "a"))
    assert directories(inventory, "c", *there) == ("/run/layers", "/run/layers/c")
    # the last that held it removes it before its release
    inventory.release(("layer", "b"))
    inventory.release(("layer", "c"))
    assert directories(inventory, "d", "/run") == ("/run/layers", "/run/layers/d")


def test_directories_that_existed_are_not_reserved(inventory):
    assert directories(inventory, "a", "/run", "/run/layers") == ("/run/layers/a",)
    assert directories(inventory, "b", "/run", "/run/layers", "/run/layers/b") == ()


def test_dm_names_are_the_preferred_unless_taken(inventory):
    def names(name, *preferred):
        unique = (f"l-{name}", f"v-{name}")
        reservation = inventory.reserve(
            ("layer", name), f"/run/{name}", dm_names=preferred, unique_dm_names=unique
        )
        return reservation.dm_names

    assert names("a", "l", "v") == ("l", "v")
    assert names("b", "x", "v") == ("l-b", "v-b")
    inventory.release(("layer", "a"))
    assert names("c", "l", "v") == ("l", "v")


def test_release_gives_back_everything_and_may_be_repeated(inventory):
    before = {name: repr(part) for name, part in vars(inventory).items()}
    owner = ("overlay", "o")
    there = ("/run",).__contains__
    inventory.reserve(owner, "/run/x/o", exists=there, dm_names=("l", "v"))
    inventory.reserve_scratch(owner, "7:1")
    inventory.release(owner)
    inventory.release(owner)
    assert {name: repr(part) for name, part in vars(inventory).items()} == before


sectors = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=6)


@given(sectors, sectors)
def test_lists_of_ranges_overlap_where_they_share_a_sector(some, others):
    def on(layer_id, places):
        mapping = tuple(
            ByteRange(offset_bytes=start * 512, size_bytes=count * 512) for start, count in places
        )
        live = layer(layer_id)
        return live.replace(spec=live.spec.replace(mapping=mapping))

    taken, wanted = (
        {sector for start, count in places for sector in range(start, start + count)}
        for places in (some, others)
    )
    inventory = Inventory(reserved=STATE)
    inventory.add_layer(on("a", some))
    assert inventory.overlapping(on("b", others)) == (("a",) if taken & wanted else ())
    assert inventory.overlapping(on("a", others)) == ()


@pytest.mark.parametrize(
    ("offset", "size", "overlaps"),
    [(0, 4096, True), (4096, 512, False), (3584, 1024, True), (0, 512, True), (8192, 512, False)],
)
def test_overlapping_ranges(inventory, offset, size, overlaps):
    inventory.add_layer(layer("a"))
    area = ByteRange(offset_bytes=offset, size_bytes=size)
    other = layer("b")
    other = other.replace(spec=other.spec.replace(mapping=area))
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


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("/run/layers/a", "/run/layers/a"),
        ("/run/layers", "/run/layers/a"),
        ("/run/layers/a/dev", None),
        ("/run/other", None),
        ("/run/guestagent", "/run/guestagent"),
        ("/run/guestagent/x", "/run/guestagent"),
        ("/run", "/run/guestagent"),
    ],
)
def test_a_mount_may_lie_in_a_target_and_hide_none(path: str, hidden: str | None) -> None:
    claims = PathClaims()
    claims.add("/run/guestagent", "target", ("agent", "state"))
    claims.add("/run/layers/a", "target", ("layer", "a"))
    if hidden is None:
        claims.refuse_hiding(path)
        return
    with call_error("conflict", match=f"would hide '{hidden}'"):
        claims.refuse_hiding(path)
