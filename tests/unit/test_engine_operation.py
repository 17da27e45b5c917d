"""Operations: undone in reverse unless committed, timed, and honest about what is left."""

import errno

import pytest

from guestagent.engine.transaction import Transaction, code_of_errno
from tests.beds.calls import call_error
from vsock.deadline import Deadline
from vsock.errors import CallError


@pytest.fixture
def op():
    deadline = Deadline(60.0)
    yield Transaction(deadline)
    deadline.close()


def fail(error: Exception):
    raise error


def end_with(op: Transaction, error: Exception, undos: dict, records: tuple = ()) -> CallError:
    """Leave an operation that has registered ``undos`` by an error; return it."""

    def work():
        with op:
            for what, undo in undos.items():
                op.on_rollback(what, undo, is_record=what in records)
            raise error

    with pytest.raises(CallError) as caught:
        work()
    return caught.value


def test_an_error_undoes_in_reverse(op):
    done = []
    undos = {"first": lambda: done.append(1), "second": lambda: done.append(2)}
    end_with(op, CallError("busy", "no"), undos)
    assert done == [2, 1]
    assert op.roll_back() == ()


def test_commit_keeps_everything(op):
    done = []
    with op:
        op.on_rollback("first", lambda: done.append(1))
        op.commit()
    assert done == []


def test_without_commit_even_success_is_undone(op):
    done = []
    with op:
        op.on_rollback("first", lambda: done.append(1))
    assert done == [1]


def test_failed_undo_is_reported_and_keeps_its_record():
    left, done = [], []
    deadline = Deadline(60.0)
    undos = {
        "record": lambda: done.append("record"),
        "directory": lambda: done.append("directory"),
        "device": lambda: fail(OSError(errno.EBUSY, "busy")),
    }
    op = Transaction(deadline, on_left=left.append)
    error = end_with(op, CallError("mount", "no", hint="try again"), undos, ("record",))
    assert done == ["directory"], "the record of a thing that is still there must stay"
    assert left == ["device: [Errno 16] busy"]
    assert error.hint == "try again; not undone: device: [Errno 16] busy"
    deadline.close()


def test_a_step_names_itself_and_its_object(op):
    with pytest.raises(CallError) as caught, op.step("mount", "/run/x", code="mount"):
        raise OSError(errno.EINVAL, "Invalid argument", "/dev/dm-0")
    error = caught.value
    assert (error.code, error.step, error.object) == ("mount", "mount", "/run/x")
    assert error.errno == errno.EINVAL
    assert "'/dev/dm-0'" in error.message
    assert "EINVAL" in error.message


def test_the_innermost_step_counts(op):
    with pytest.raises(CallError) as caught, op.step("outer", "a"), op.step("inner", "b"):
        raise CallError("busy", "no")
    assert (caught.value.step, caught.value.object) == ("inner", "b")


def test_a_step_entered_again_adds_up(op):
    with op.step("one", "x"):
        pass
    first = op.timings_ms["one"]
    with op.step("one", "x"):
        pass
    assert op.timings_ms["one"] >= first
    assert list(op.timings_ms) == ["one"]


@pytest.mark.parametrize("how", ["timeout", "cancelled"])
def test_no_step_begins_after_the_end(how):
    deadline = Deadline(0.0 if how == "timeout" else 60.0)
    if how == "cancelled":
        deadline.cancel()
    entered = []
    with pytest.raises(CallError) as caught, Transaction(deadline).step("mount", "x"):
        entered.append(1)
    assert (caught.value.code, caught.value.step, entered) == (how, "mount", [])
    deadline.close()


def test_children_hand_over_what_they_would_undo(op):
    done = []
    child = op.child()
    child.on_rollback("of the child", lambda: done.append("child"))
    op.adopt(child)
    assert child.roll_back() == ()
    assert op.roll_back() == ()
    assert done == ["child"]


def test_a_full_disk_is_named(op, tmp_path):
    with call_error("resource") as caught, op.step("journal", "layer", code="mount"):
        raise OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/not/there")
    assert "bytes free" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOMEM, "resource"),
        (errno.ENOSPC, "resource"),
        (errno.EPERM, "denied"),
        (errno.EKEYREJECTED, "denied"),
        (errno.EBUSY, "busy"),
        (errno.EIO, "device"),
        (None, "device"),
    ],
)
def test_code_of_errno(number, code):
    assert code_of_errno(number, "device") == code
