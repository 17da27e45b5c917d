"""Any order of requests: a real engine on a real kernel against a model of a few sets."""

import contextlib
import os
import tempfile
from collections.abc import Callable
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

from guestagent.api import LayersMount, LayersUnmount, TmpfsScratch
from guestagent.engine.transaction import Transaction
from tests.beds.agentbed import EngineBed, Pack, World, attached_pack, overlay, settled_world
from vsock.errors import CallError

LAYERS = 5
OVERLAYS = ("o0", "o1")
EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "25"))
numbers = st.integers(0, LAYERS - 1)
some = st.lists(numbers, min_size=1, max_size=4, unique=True)


class EngineMachine(RuleBasedStateMachine):
    """``mounted`` and ``overlays`` are all there is to the model; faults must not change it."""

    pack: Pack

    @initialize()
    def begin(self) -> None:
        self.stack = contextlib.ExitStack()
        directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.before = World.now()
        self.bed = self.stack.enter_context(EngineBed(directory / "state"))
        self.mounted: set[int] = set()
        self.overlays: dict[str, tuple[tuple[int, ...], bool]] = {}

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()
            assert settled_world(self.before) == self.before

    def ask(self, work: Callable[[Transaction], Any], faults: str = "") -> tuple[Any, CallError]:
        """Return (reply, None) or (None, error)."""
        self.bed.faults.arm(faults)
        try:
            with self.bed.operation() as op:
                return work(op), None  # type: ignore[return-value]
        except CallError as error:
            return None, error
        finally:
            self.bed.faults.arm("")

    # --- requests

    @rule(number=numbers, step=st.one_of(st.none(), st.integers(1, 16)))
    def mount(self, number: int, step: int | None) -> None:
        spec = self.pack.spec(number)
        faults = "" if step is None else f"#{step}:EIO"
        report, error = self.ask(lambda op: self.bed.engine.layers.mount(spec, op), faults)
        if report is None:
            assert "injected" in error.message
            assert number not in self.mounted
            return
        assert report.already == (number in self.mounted)
        self.mounted.add(number)

    @rule(number=numbers, force=st.booleans())
    def unmount(self, number: int, force: bool) -> None:
        used = any(number in stacked for stacked, _ in self.overlays.values())
        layers = self.bed.engine.layers
        reply, error = self.ask(lambda op: layers.unmount(f"layer{number}", op, force=force))
        if used:
            assert error.code == "busy"
            return
        assert reply.already == (number not in self.mounted)
        self.mounted.discard(number)

    @rule(name=st.sampled_from(OVERLAYS), layers=some, writable=st.booleans())
    def mount_overlay(self, name: str, layers: list[int], writable: bool) -> None:
        fields = {"scratch": TmpfsScratch(size_bytes=65536)} if writable else {}
        spec = overlay(name, *(f"layer{number}" for number in layers), **fields)
        report, error = self.ask(lambda op: self.bed.engine.overlays.mount(spec, op))
        if name in self.overlays:
            same = self.overlays[name] == (tuple(layers), writable)
            assert same == (error is None)
            assert report.already if same else error.code == "conflict"
        elif not self.mounted.issuperset(layers):
            assert error.code == "not_found"
        else:
            assert not report.already
            assert report.lowerdirs == tuple(f"/run/layers/layer{n}" for n in layers)
            self.overlays[name] = (tuple(layers), writable)

    @rule(name=st.sampled_from(OVERLAYS))
    def unmount_overlay(self, name: str) -> None:
        reply, _ = self.ask(lambda op: self.bed.engine.overlays.unmount(name, op))
        assert reply.already == (name not in self.overlays)
        self.overlays.pop(name, None)

    @rule(layers=some, step=st.one_of(st.none(), st.integers(1, 40)))
    def mount_batch(self, layers: list[int], step: int | None) -> None:
        request = LayersMount(layers=tuple(self.pack.spec(number) for number in layers))
        faults = "" if step is None else f"#{step}:ENOMEM"
        reply, error = self.ask(lambda op: self.bed.engine.batches.mount(request, op), faults)
        if reply is None:
            assert "injected" in error.message
            return
        assert [r.already for r in reply.layers] == [number in self.mounted for number in layers]
        self.mounted.update(layers)

    @rule(layers=some, name=st.one_of(st.none(), st.sampled_from(OVERLAYS)))
    def unmount_batch(self, layers: list[int], name: str | None) -> None:
        rest = [stacked for other, (stacked, _) in self.overlays.items() if other != name]
        used = any(number in stacked for stacked in rest for number in layers)
        names = tuple(f"layer{number}" for number in layers)
        request = LayersUnmount(layers=names, overlay=name)
        _, error = self.ask(lambda op: self.bed.engine.batches.unmount(request, op))
        if used:
            assert error.code == "busy"
            return
        assert error is None
        self.mounted.difference_update(layers)
        self.overlays.pop(name or "", None)

    @rule()
    def restart(self) -> None:
        self.bed.reopen()

    # --- what always holds

    @invariant()
    def the_engine_says_what_the_model_says(self) -> None:
        if not hasattr(self, "bed"):
            return
        layers = {report.layer_id for report in self.bed.engine.layers.list()}
        assert layers == {f"layer{number}" for number in self.mounted}
        overlays = {report.overlay_id for report in self.bed.engine.overlays.list()}
        assert overlays == set(self.overlays)
        assert self.bed.engine.problems() == ()

    @invariant()
    def the_kernel_has_what_the_model_says(self) -> None:
        if not hasattr(self, "bed"):
            return
        world = World.now()
        assert len(world.dm) - len(self.before.dm) == 2 * len(self.mounted)
        targets = [line.split()[0] for line in world.mounts]
        assert sum(t.startswith("/run/layers/") for t in targets) == len(self.mounted)
        assert sum(t.startswith("/run/overlays/") for t in targets) == len(self.overlays)


@pytest.mark.timeout(300)
def test_any_order_of_requests(tmp_path: Path) -> None:
    with attached_pack(tmp_path / "pack", LAYERS) as pack:
        EngineMachine.pack = pack
        run_state_machine_as_test(
            EngineMachine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
            ),
        )
