"""The fault seam: what its texts mean, where it strikes, and that it is silent by default."""

import errno
import threading

import pytest

from guestagent.config import read_settings
from guestagent.engine.faults import Fault, Faults
from tests.beds.calls import call_error
from vsock.deadline import Deadline


def reach(faults: Faults, *steps: str) -> list[int | None]:
    """Reach the steps in turn; return the errno of each, None where nothing struck."""
    deadline = Deadline(10.0)
    found: list[int | None] = []
    for step in steps:
        try:
            faults.reach(step, deadline)
            found.append(None)
        except OSError as error:
            found.append(error.errno)
    deadline.close()
    return found


def test_nothing_strikes_unless_configured():
    assert reach(Faults(), "mount", "mount") == [None, None]
    assert reach(Faults.parse(""), "mount") == [None]


def test_by_name_at_every_coming():
    assert reach(Faults.parse("mount:EIO"), "verity", "mount", "mount") == [None, 5, 5]


def test_by_name_at_one_coming():
    steps = ("mount", "verity", "mount", "mount")
    assert reach(Faults.parse("mount:ENOMEM:2"), *steps) == [None, None, errno.ENOMEM, None]


def test_by_number_of_any_name():
    assert reach(Faults.parse("#2:EIO"), "a", "b", "c") == [None, errno.EIO, None]


def test_several_and_armed_again():
    faults = Faults.parse("#1:EIO,c:ENOSPC")
    assert reach(faults, "a", "b", "c") == [errno.EIO, None, errno.ENOSPC]
    assert faults.struck == 2
    faults.arm("#1:ENOMEM")
    assert reach(faults, "a", "b") == [errno.ENOMEM, None]


@pytest.mark.parametrize("how", ["timeout", "cancelled"])
def test_a_block_lasts_until_the_deadline_or_a_cancel(how):
    deadline = Deadline(0.01 if how == "timeout" else 10.0)
    if how == "cancelled":
        threading.Timer(0.01, deadline.cancel).start()
    with call_error(how, step="mount"):
        Faults.parse("mount:BLOCK").reach("mount", deadline)
    deadline.close()


def test_fault_that_lets_the_deadline_pass():
    """It has passed for what comes after the step, too."""
    with Deadline(1000) as deadline:
        faults = Faults.parse("mount:LATE:2")
        faults.reach("mount", deadline)
        assert not deadline.expired
        with call_error("timeout", step="mount"):
            faults.reach("mount", deadline)
        assert deadline.expired


@pytest.mark.parametrize(
    "text", ["mount", "mount:", "mount:EWHAT", "mount:EIO:x", "mount:EIO:", "#:EIO", "#0:EIO",
             "#x:EIO", "#1:EIO:2", ":EIO", "mount:EIO:-1", "mount:EIO:²", "mount:errorcode"],
)  # fmt: skip
def test_fault_parse_refuses_invalid_text(text):
    with pytest.raises(ValueError, match="fault"):
        Fault.parse(text)
    _, problems = read_settings((("fault", text),))
    assert problems[0].fatal
