"""The journal: what a killed agent leaves behind is read back, or put aside, never guessed."""

import errno
import os
from pathlib import Path

import pytest

from guestagent.api import OverlaySpec
from guestagent.engine.inventory import LiveOverlay
from guestagent.engine.journal import Begun, Journal, Written
from tests.beds.enginebed import layer


@pytest.fixture
def journal(tmp_path):
    return Journal(str(tmp_path / "state"))


def overlay(overlay_id="o", **changes):
    spec = OverlaySpec(overlay_id=overlay_id, layers=("a",))
    live = LiveOverlay(
        spec=spec, lowerdirs=("/l",), method="", links=None, scratch=None, created=("/run/o",)
    )
    return live.replace(**changes)


def begin(journal, name, *layers, overlay=None):
    journal.begin(name, Begun(layers=tuple(live.traces for live in layers), overlay=overlay))


NOTHING = Written(layers=(), overlays=(), begun_layers=(), begun_overlays=())


def test_journal_reads_begun_layer_as_traces_until_decided(journal):
    begin(journal, "layer-a", layer())
    assert journal.read() == NOTHING.replace(begun_layers=(layer().traces,))
    made = layer(dev="254:1")
    journal.write_layers([made], "layer-a")
    assert journal.read() == NOTHING.replace(begun_layers=(layer().traces,))
    journal.decide("layer-a")
    assert journal.read() == NOTHING.replace(layers=(made,))
    journal.decide("layer-a")
    journal.remove_layer("a")
    journal.remove_layer("a")
    assert journal.read() == NOTHING


def test_a_batch_becomes_whole_in_one_moment(journal):
    begin(journal, "batch-1", layer("a"), layer("b"))
    begin(journal, "overlay-o", overlay=overlay())
    journal.write_layers([layer("a"), layer("b")], "batch-1")
    journal.write_overlay(overlay(dev="0:9"), "batch-1")
    written = journal.read()
    assert (written.layers, written.overlays) == ((), ())
    assert [traces.layer_id for traces in written.begun_layers] == ["a", "b"]
    assert written.begun_overlays == (overlay(),)
    journal.decide("batch-1")
    # killed before the overlay's own note of its beginning is dropped
    whole = NOTHING.replace(layers=(layer("a"), layer("b")), overlays=(overlay(dev="0:9"),))
    assert journal.read() == whole
    journal.decide("overlay-o")
    assert journal.read() == whole


def ids(journal):
    return [live.spec.layer_id for live in journal.read().layers]


def test_layers_that_were_written_together_go_one_by_one(journal, tmp_path):
    made = [layer(name) for name in ("a", "b", "c")]
    journal.write_layers(made, "batch-1")
    files = sorted((tmp_path / "state").iterdir())
    assert [file.name for file in files] == [f"layer-{name}.entry" for name in "abc"]
    assert len({file.stat().st_ino for file in files}) == 1
    assert journal.read() == NOTHING.replace(layers=tuple(made))
    journal.remove_layer("a")
    assert journal.read() == NOTHING.replace(layers=tuple(made[1:]))
    journal.strike_layer("c")
    assert ids(journal) == ["b"]
    journal.remove_layer("b")
    assert list((tmp_path / "state").iterdir()) == []


def test_an_entry_that_is_written_again_leaves_those_beside_it(journal):
    journal.write_layers([layer("a"), layer("b")], "batch-1")
    journal.write_layers([layer("a", dev="9:9")], "")
    assert [live.dev for live in journal.read().layers] == ["9:9", ""]


def test_new_journal_entry_replaces_old_entry_of_layer(journal):
    journal.write_layers([layer("a", dev="1:1"), layer("b", dev="1:2")], "batch-1")
    journal.write_layers([layer("b", dev="2:2"), layer("a", dev="2:1")], "batch-2")
    assert [live.dev for live in journal.read().layers] == ["2:1", "2:2"]


def test_a_draft_of_a_process_that_was_killed_is_not_written_into(journal, tmp_path):
    """It may have further names already, which say what they say."""
    journal.write_layers([layer("a"), layer("b")], "batch-1")
    entry = tmp_path / "state/layer-a.entry"
    entry.rename(tmp_path / "state/layer-a.entry.new")
    journal.write_layers([layer("a", dev="9:9")], "")
    assert journal.read() == NOTHING.replace(layers=(layer("a", dev="9:9"), layer("b")))


def test_a_name_that_its_file_does_not_speak_of_is_put_aside(journal, tmp_path):
    journal.write_layers([layer("a"), layer("b")], "batch-1")
    (tmp_path / "state/layer-c.entry").hardlink_to(tmp_path / "state/layer-a.entry")
    assert ids(journal) == ["a", "b"]
    assert journal.damaged() == (f"{tmp_path}/state/layer-c.entry.damaged",)


def test_an_entry_that_is_replaced_while_it_is_read_harms_no_other(journal):
    """Who reconciles reads beside requests that are at work."""
    journal.write_layers([layer(name) for name in "abcd"], "batch-1")
    journal.write_layers([layer("0")], "")
    reading = journal._read_layers()
    assert next(reading)[1].spec.layer_id == "0"
    journal.write_layers([layer("a", dev="9:9")], "")
    journal.remove_layer("d")  # which is told as it was listed
    found = {live.spec.layer_id: live.dev for _, live in reading}
    assert found == {"a": "9:9", "b": "", "c": "", "d": ""}
    assert journal.damaged() == ()


class Killed(BaseException):
    pass


def killed(*_arguments, **_named):
    raise Killed


@pytest.mark.parametrize("call", ["os.write", "os.link", "os.rename"])
def test_killed_while_entries_are_written(journal, tmp_path, monkeypatch, call):
    made = [layer(name) for name in "abc"]
    begin(journal, "batch-1", *made)
    with monkeypatch.context() as patch:
        patch.setattr(call, killed)
        with pytest.raises(Killed):
            journal.write_layers(made, "batch-1")
    # of a process of a batch, which others outlive: the same names again
    journal.write_layers(made, "batch-1")
    with monkeypatch.context() as patch:
        patch.setattr(call, killed)
        with pytest.raises(Killed):
            journal.write_layers(made, "batch-1")
    journal = Journal(str(tmp_path / "state"))
    traces = tuple(live.traces for live in made)
    assert journal.read() == NOTHING.replace(begun_layers=traces)
    for name in "abc":
        journal.strike_layer(name)
    assert list((tmp_path / "state").iterdir()) == []


def test_names_that_cannot_be_had_leave_no_draft(journal, tmp_path, monkeypatch):
    def full(path, name):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path, None, name)

    monkeypatch.setattr("os.link", full)
    with pytest.raises(OSError, match="No space left"):
        journal.write_layers([layer("a"), layer("b")], "batch-1")
    assert list((tmp_path / "state").iterdir()) == []


def test_traces_name_what_may_be_there(journal):
    traces = layer().traces
    assert traces.dm == {"l": "guestagent-linear-a"}
    assert (traces.mount_point, traces.dev) == ("/run/layers/a", "7:0")
    assert traces.created == ("/run/layers", "/run/layers/a")


def test_a_note_left_by_a_failed_undoing_does_not_touch_what_came_later(journal):
    """The layer was mounted by another request since."""
    begin(journal, "batch-1", layer("a"), layer("b"))
    journal.write_layers([layer("a", dev="9:9")], "layer-a")
    written = journal.read()
    assert [live.dev for live in written.layers] == ["9:9"]
    assert [traces.layer_id for traces in written.begun_layers] == ["b"]


def test_struck_layers_and_overlays_are_gone_from_all_records(journal, tmp_path):
    begin(journal, "batch-1", layer("a"), layer("b"))
    begin(journal, "overlay-o", overlay=overlay())
    journal.write_layers([layer("a")], "batch-1")
    journal.strike_layer("a")
    assert [traces.layer_id for traces in journal.read().begun_layers] == ["b"]
    journal.strike_layer("b")
    journal.strike_overlay("o")
    assert list((tmp_path / "state").iterdir()) == []


def test_a_damaged_entry_is_put_aside(journal, tmp_path):
    journal.write_layers([layer("a"), layer("c")], "")
    journal.remove_layer("c")
    journal.write_layers([layer("b")], "")
    path = tmp_path / "state/layer-a.entry"
    path.write_bytes(path.read_bytes()[:20])
    assert [live.spec.layer_id for live in journal.read().layers] == ["b"]
    assert journal.damaged() == (f"{path}.damaged",)
    assert [live.spec.layer_id for live in journal.read().layers] == ["b"]


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x80", b"\x93\x01\x02\x03", b"\x81\xa1a\x01"])
@pytest.mark.parametrize("file", ["layer-x.entry", "overlay-x.entry"])
def test_invalid_entry_file_is_put_aside(journal, tmp_path, content, file):
    (tmp_path / "state" / file).write_bytes(content)
    assert journal.read() == NOTHING
    assert len(journal.damaged()) == 1


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x81\xa1a\x01"])
def test_invalid_begun_file_is_put_aside(journal, tmp_path, content):
    (tmp_path / "state/batch-1.begun").write_bytes(content)
    assert journal.read() == NOTHING
    assert len(journal.damaged()) == 1


def test_an_entry_of_any_size_or_kind_is_put_aside(journal, tmp_path):
    with open(tmp_path / "state/layer-x.entry", "wb") as file:
        file.truncate(1 << 40)  # more than there is memory
    (tmp_path / "state/overlay-x.entry").mkdir()
    assert journal.read() == NOTHING
    assert len(journal.damaged()) == 2


def test_a_draft_of_a_killed_writer_is_dropped(tmp_path):
    directory = tmp_path / "state"
    Journal(str(directory))
    (directory / "layer-a.entry.new").write_bytes(b"half")
    assert Journal(str(directory)).read() == NOTHING
    assert list(directory.iterdir()) == []


def test_a_full_disk_leaves_the_old_entry_and_no_draft(journal, tmp_path, monkeypatch):
    journal.write_layers([layer()], "")
    monkeypatch.setattr("os.write", lambda fd, data: len(data) // 2)
    with pytest.raises(OSError, match="No space left") as caught:
        journal.write_layers([layer(dev="1:1")], "")
    assert caught.value.filename
    monkeypatch.undo()
    assert journal.read() == NOTHING.replace(layers=(layer(),))
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["layer-a.entry"]


def test_counters_outlive_their_object(journal):
    counter = journal.counter("events")
    assert counter.value == 0
    counter.store(41)
    counter.close()
    counter.close()
    again = journal.counter("events")
    assert again.value == 41
    again.close()


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    state = tmp_path / "shared"
    state.mkdir()
    state.chmod(mode)
    with pytest.raises(PermissionError, match="others may write to it"):
        Journal(str(state))


def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    state = Path("/usr")  # another user's, unless we are root
    if os.geteuid() == 0:
        state = tmp_path / "foreign"
        state.mkdir(mode=0o700)
        os.chown(state, 65534, 65534)
    with pytest.raises(PermissionError, match="belongs to user"):
        Journal(str(state))


def test_a_link_is_no_state_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "state").symlink_to("real")
    with pytest.raises(PermissionError, match="is a link"):
        Journal(str(tmp_path / "state"))
