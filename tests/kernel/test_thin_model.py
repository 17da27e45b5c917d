"""Any order of requests for volumes: a real pool against a model of a few dictionaries."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests.beds.dmbed import run
from tests.beds.thinbed import MIB, ThinBed, pool_disks
from vsock.errors import CallError

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "8"))
names = st.sampled_from(("a", "b", "c"))
holders = st.sampled_from(("h1", "h2"))
steps = st.one_of(st.none(), st.integers(1, 12))


@dataclass
class Volume:
    """What the model knows of a volume."""

    content: bytes = b""
    holders: set[str] = field(default_factory=set)
    deleting: bool = False


class VolumeMachine(RuleBasedStateMachine):
    """Faults change nothing, but for a deletion that the kernel has done already."""

    @initialize()
    def begin(self) -> None:
        self.stack = contextlib.ExitStack()
        directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.disks = self.stack.enter_context(pool_disks(directory / "disks", data_bytes=128 * MIB))
        self.bed = self.stack.enter_context(ThinBed(directory / "state"))
        self.bed.open(self.disks.spec())
        self.volumes: dict[str, Volume] = {}

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.bed.faults.arm("")
            for name, volume in self.volumes.items():
                for holder in volume.holders:
                    self.bed.unmount(name, holder)
            left = [name for name, each in self.volumes.items() if not each.deleting]
            self.bed.close()
            self.disks.thin_check()
            assert len(self.disks.thin_ids()) == len(left) + 1
            self.stack.close()

    def ask(self, work: Callable[[], Any], step: int | None = None) -> tuple[Any, str]:
        """Return (reply, "") or (None, code of the error)."""
        self.bed.faults.arm("" if step is None else f"#{step}:EIO")
        try:
            return work(), ""
        except CallError as error:
            return None, "injected" if "injected" in error.message else error.code
        finally:
            self.bed.faults.arm("")

    @rule(name=names, step=steps)
    def create(self, name: str, step: int | None) -> None:
        reply, code = self.ask(lambda: self.bed.create(name), step)
        there = self.volumes.get(name)
        if there is not None and reply is not None:
            assert reply.already == (not there.deleting)
        elif there is not None:
            assert code == "conflict"
        elif reply is not None:
            self.volumes[name] = Volume()
        else:
            assert code == "injected"

    @rule(name=names, of=names, step=steps)
    def snapshot(self, name: str, of: str, step: int | None) -> None:
        there, origin = self.volumes.get(name), self.volumes.get(of)
        reply, code = self.ask(lambda: self.bed.snapshot(name, of), step)
        if origin is None or origin.deleting:
            assert code == "not_found"
        elif there is not None:
            assert code == "conflict" or (reply.already and not there.deleting)
        elif reply is None:
            assert code == "injected"
        else:
            self.volumes[name] = Volume(content=origin.content)

    @rule(name=names, deferred=st.booleans(), step=steps)
    def delete(self, name: str, deferred: bool, step: int | None) -> None:
        there = self.volumes.get(name)
        reply, code = self.ask(lambda: self.bed.delete(name, deferred=deferred), step)
        if there is None:
            assert reply.already
        elif there.holders and not deferred:
            assert code == "busy"
        elif there.holders:
            there.deleting |= reply is not None
        elif reply is not None:
            assert reply.deleted
            del self.volumes[name]
        elif name not in self.bed.volumes():  # it failed after the kernel had done it
            del self.volumes[name]

    @rule(name=names, holder=holders, step=steps)
    def mount(self, name: str, holder: str, step: int | None) -> None:
        there = self.volumes.get(name)
        reply, code = self.ask(lambda: self.bed.mount(name, holder=holder), step)
        if there is None:
            assert code == "not_found"
        elif there.deleting:
            assert code == "conflict"
        elif reply is None:
            assert code == "injected"
        else:
            assert reply.already == (holder in there.holders)
            there.holders.add(holder)
            file = Path(reply.root, "x")
            assert (file.read_bytes() if file.exists() else b"") == there.content

    @rule(name=names, holder=holders, step=steps)
    def unmount(self, name: str, holder: str, step: int | None) -> None:
        there = self.volumes.get(name)
        reply, code = self.ask(lambda: self.bed.unmount(name, holder), step)
        if there is None or holder not in there.holders:
            assert reply.already
        elif reply is None:
            assert code == "injected"
        else:
            there.holders.discard(holder)
            assert bool(reply.unmounted) == (not there.holders)
            if not there.holders and there.deleting and name not in self.bed.volumes():
                del self.volumes[name]

    @rule(name=names, content=st.binary(min_size=1, max_size=64))
    def write(self, name: str, content: bytes) -> None:
        there = self.volumes.get(name)
        if there is not None and there.holders:
            Path(f"/run/volumes/{name}/x").write_bytes(content)
            there.content = content

    @rule()
    def restart(self) -> None:
        self.bed.reopen()
        gone = [name for name, each in self.volumes.items() if each.deleting and not each.holders]
        for name in gone:
            del self.volumes[name]

    @rule()
    def close_and_adopt(self) -> None:
        reply, code = self.ask(lambda: self.bed.close())
        if any(each.holders for each in self.volumes.values()):
            assert code == "busy"
            return
        assert reply is not None
        self.bed.open(self.disks.matching())

    @invariant()
    def the_agent_and_the_kernel_say_what_the_model_says(self) -> None:
        if not hasattr(self, "bed"):
            return
        found = self.bed.volumes()
        assert {name: (set(each.holders), each.deleting) for name, each in found.items()} == {
            name: (each.holders, each.deleting) for name, each in self.volumes.items()
        }
        mounts = {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()}
        is_held = {name for name, each in self.volumes.items() if each.holders}
        assert {path for path in mounts if path.startswith("/run/volumes/")} == {
            f"/run/volumes/{name}" for name in is_held
        }
        lines = run("dmsetup", "ls").splitlines()
        assert sum(line.startswith("thin-p-") for line in lines) == 3 + len(is_held)
        status = self.bed.status()
        assert (status.mode, status.foreign_ids) == ("rw", ())


@pytest.mark.timeout(300)
def test_any_order_of_requests() -> None:
    run_state_machine_as_test(
        VolumeMachine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
