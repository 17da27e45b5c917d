"""Shares when a step fails or is the last of the agent's life; runs in a machine with the tag host.

Each request leaves the world as it was before or as it is afterwards, and then succeeds. Prints how
many steps each request has.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from guestagent.api.share import ShareList, ShareMount, ShareUnmount
from guestagent.engine.engine import Engine
from guestagent.engine.faults import Faults
from guestagent.engine.state import Rules
from guestagent.engine.transaction import Transaction
from guestagent.share.shares import Shares
from guestagent.storage import syscalls
from guestagent.storage.mountinfo import read_mounts
from vsock.deadline import Deadline
from vsock.errors import CallError

ROOT, STATE = "/run/bed", "/run/bed-state"
#: virtiofs or 9p
KIND = sys.argv[1]
SPEC = ShareMount(share_id="s", tag="host", kind=KIND, target=f"{ROOT}/deep/er", read_only=False)
MAX_STEPS = 40
Request = Callable[[Shares, Transaction], object]


class Bed:
    """An engine with shares, upon what an earlier one has left. A context manager."""

    def __enter__(self) -> "Bed":
        self.faults = Faults()
        rules = Rules(target_roots=(ROOT,))
        self.engine = Engine(state_directory=STATE, rules=rules, faults=self.faults)
        self.shares = Shares(self.engine.state)
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    @contextmanager
    def operation(self) -> Iterator[Transaction]:
        with closing(Deadline(20.0)) as deadline:
            yield self.engine.operation(deadline)

    def do(self, request: Request) -> None:
        with self.operation() as op:
            request(self.shares, op)

    def refusal(self, request: Request) -> CallError | None:
        """Do a request; return the error that it is refused with."""
        try:
            self.do(request)
        except CallError as error:
            return error
        return None

    def world(self) -> tuple[object, ...]:
        """Return what the kernel, the journal and the shares have, without numbers."""
        mounts = [(m.target, m.options) for m in read_mounts() if m.filesystem == KIND]
        places = [ROOT, *(f"{ROOT}/{name}" for name in ("deep", "deep/er"))]
        directories = [place for place in places if os.path.exists(place)]
        journal = sorted(name for name in os.listdir(STATE) if name.startswith("share"))
        reports = [
            report.as_dict() | {"dev": "", "mount_id": 0, "timings_ms": {}}
            for report in self.shares.list(ShareList(), Transaction(Deadline())).shares
        ]
        return mounts, directories, journal, reports, self.engine.problems()


def mount(shares: Shares, op: Transaction) -> None:
    shares.mount(SPEC, op)


def unmount(shares: Shares, op: Transaction) -> None:
    shares.unmount(ShareUnmount(share_id="s"), op)


def fail_at_every_step(request: Request, kind: str) -> int:
    """Fail at each step, or have the deadline pass there; leave ``request`` done."""
    with Bed() as bed:
        before = bed.world()
        for number in range(1, MAX_STEPS):
            bed.faults.arm(f"#{number}:{kind}")
            error = bed.refusal(request)
            if error is None:
                assert bed.faults.struck == number - 1
                return number - 1
            assert kind != "LATE" or error.code == "timeout", error
            assert error.step, error
            assert "not undone" not in (error.hint or ""), error
            assert bed.world() == before, (number, bed.world(), before)
    raise AssertionError("the request never succeeds")


def die_at_every_step(request: Request, undo: Request) -> int:
    """Leave ``request`` done."""
    with Bed() as bed:
        before = bed.world()
        bed.do(request)
        after = bed.world()
        bed.do(undo)
    outcomes = []
    for number in range(1, MAX_STEPS):
        died = die_in(request, number)
        with Bed() as bed:
            found = bed.world()
            assert found in (before, after), (number, found)
            outcomes.append(found == after)
            bed.do(request)
            assert bed.world() == after, (number, bed.world())
            if not died:
                assert outcomes == sorted(outcomes)
                return number - 1
            bed.do(undo)
            assert bed.world() == before, (number, bed.world())
    raise AssertionError("the request never ends")


def die_in(request: Request, number: int) -> bool:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with Bed() as bed:
                bed.faults.arm(f"#{number}:KILL")
                bed.do(request)
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def refuse_to_leave_a_superblock() -> None:
    """A copy of the mount that is mounted nowhere keeps the file system: the unmount is undone."""
    with Bed() as bed:
        bed.do(mount)
        before = bed.world()
        copy_fd = syscalls.open_tree(syscalls.AT_FDCWD, SPEC.mount_point, syscalls.OPEN_TREE_CLONE)
        error = bed.refusal(unmount)
        assert error is not None
        assert (error.code, "not undone" in (error.hint or "")) == ("busy", False), error
        assert bed.world() == before
        os.close(copy_fd)
    with Bed() as bed:
        assert bed.world() == before
        bed.do(unmount)


def main() -> None:
    if KIND == "virtiofs":  # 9p cannot be mounted again as long as the file system is there
        refuse_to_leave_a_superblock()
    for kind in ("LATE", "EIO"):
        failed = {
            "mount": fail_at_every_step(mount, kind),
            "unmount": fail_at_every_step(unmount, kind),
        }
    died = {"mount": die_at_every_step(mount, unmount), "unmount": 0}
    died["unmount"] = die_at_every_step(unmount, mount)
    assert failed == died, (failed, died)
    sys.stdout.write("{mount} {unmount}\n".format(**failed))


if __name__ == "__main__":
    main()
