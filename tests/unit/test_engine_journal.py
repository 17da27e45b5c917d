"""The journal: what a killed agent leaves behind is read back, or put aside, never guessed."""

import pytest

from guestagent.api import ByteRange, LayerSpec, PathDevice, Verity
from guestagent.engine.inventory import LiveLayer
from guestagent.engine.journal import BEGUN, WHOLE, Decision, Journal
from guestagent.engine.plan import VerityOptions, plan_layer
from guestagent.observe.leftovers import left_behind
from guestagent.storage.blockdev import BlockDevice

DEVICE = BlockDevice(
    node="/dev/loop0",
    dev="7:0",
    name="loop0",
    size_bytes=1 << 20,
    logical_block_size=512,
    readonly=True,
    serial=None,
    kind="loop",
)


def layer(layer_id="a", **changes):
    whole = ByteRange(offset_bytes=0, size_bytes=4096)
    spec = LayerSpec(
        layer_id=layer_id,
        device=PathDevice(path="/dev/loop0"),
        mapping=whole,
        verity=Verity(root_digest=bytes(range(32))),
        filesystem="erofs",
    )
    live = LiveLayer(
        spec=spec,
        device=DEVICE,
        range=whole,
        plan=plan_layer(spec, DEVICE, filesystem="erofs", names=("l", "v")),
        verity_source="superblock",
        verity_options=VerityOptions(),
        created=("/run/layers", "/run/layers/a"),
        timings_ms={"mount": 1.5},
    )
    return live.replace(**changes)


@pytest.fixture
def journal(tmp_path):
    return Journal(str(tmp_path / "state"))


def test_entries_come_back_as_they_were(journal):
    journal.write_layer(layer(), BEGUN, batch="b")
    (entry,) = journal.read_layers()
    assert (entry.state, entry.batch, entry.live) == (BEGUN, "b", layer())
    journal.write_layer(layer(dev="254:1"), WHOLE)
    (entry,) = journal.read_layers()
    assert (entry.state, entry.batch, entry.live.dev) == (WHOLE, None, "254:1")
    journal.remove("layer", "a")
    journal.remove("layer", "a")
    assert journal.read_layers() == ()


def test_a_damaged_entry_is_put_aside(journal, tmp_path):
    journal.write_layer(layer("a"), WHOLE)
    journal.write_layer(layer("b"), WHOLE)
    path = tmp_path / "state/layer-a.entry"
    path.write_bytes(path.read_bytes()[:20])
    assert [entry.live.spec.layer_id for entry in journal.read_layers()] == ["b"]
    assert journal.damaged() == (f"{path}.damaged",)
    assert [entry.live.spec.layer_id for entry in journal.read_layers()] == ["b"]


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x80", b"\x93\x01\x02\x03", b"\x81\xa1a\x01"])
def test_what_is_no_entry_is_put_aside(journal, tmp_path, content):
    (tmp_path / "state/layer-x.entry").write_bytes(content)
    (tmp_path / "state/batch-1.commit").write_bytes(content)
    assert journal.read_layers() == ()
    journal.settle_all()
    assert len(journal.damaged()) == 2


def test_a_draft_of_a_killed_writer_is_dropped(tmp_path):
    directory = tmp_path / "state"
    Journal(str(directory))
    (directory / "layer-a.entry.new").write_bytes(b"half")
    assert Journal(str(directory)).read_layers() == ()
    assert list(directory.iterdir()) == []


def test_a_full_disk_leaves_the_old_entry_and_no_draft(journal, tmp_path, monkeypatch):
    journal.write_layer(layer(), BEGUN)
    monkeypatch.setattr("os.write", lambda fd, data: len(data) // 2)
    with pytest.raises(OSError, match="No space left") as caught:
        journal.write_layer(layer(dev="1:1"), WHOLE)
    assert caught.value.filename
    monkeypatch.undo()
    (entry,) = journal.read_layers()
    assert entry.state == BEGUN
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["layer-a.entry"]


def test_a_decision_makes_begun_entries_whole_with_what_they_became(journal):
    journal.write_layer(layer("a"), BEGUN, batch="batch-1")
    journal.commit_batch("batch-1", Decision(layers=(layer("a", dev="9:9"),), overlay=None))
    journal.settle_all()
    (entry,) = journal.read_layers()
    assert (entry.state, entry.live.dev) == (WHOLE, "9:9")
    journal.settle_all()


def test_an_old_decision_does_not_touch_what_came_later(journal):
    """Its layer was unmounted, and another request has begun one of the same id."""
    decision = Decision(layers=(layer("a", dev="9:9"), layer("b")), overlay=None)
    journal.commit_batch("batch-1", decision)
    journal.write_layer(layer("a"), BEGUN, batch=None)
    journal.settle_all()
    (entry,) = journal.read_layers()
    assert (entry.state, entry.live.dev) == (BEGUN, "")


def test_counters_outlive_their_object(journal):
    counter = journal.counter("events")
    assert counter.value == 0
    counter.store(41)
    counter.close()
    counter.close()
    again = journal.counter("events")
    assert again.value == 41
    again.close()


def test_what_a_life_left_is_told_without_changing_it(journal, tmp_path):
    elsewhere = layer("b")
    elsewhere = elsewhere.replace(spec=elsewhere.spec.replace(target="/run/elsewhere"))
    journal.write_layer(layer("a"), WHOLE)
    journal.write_layer(elsewhere, WHOLE)
    journal.write_layer(layer("c"), BEGUN)
    (tmp_path / "state/layer-d.entry").write_bytes(b"\x81\xa1a\x01")
    (tmp_path / "state/overlay-e.entry").write_bytes(b"\xc1")
    files = sorted((tmp_path / "state").iterdir())
    assert left_behind(str(tmp_path / "state")) == {
        "layers": ("a at /run/layers/a", "b at /run/elsewhere"),
        "overlays": (),
        "unfinished": ("c at /run/layers/c",),
    }
    assert sorted((tmp_path / "state").iterdir()) == files
    assert left_behind(str(tmp_path / "none"))["layers"] == ()
