"""Overlays of mounted layers: read-only, or writable with a scratch of their own."""

import errno
import os
from collections.abc import Mapping

from guestagent.api import OverlayReport, OverlaySpec
from guestagent.api.layers import UnmountReply
from guestagent.api.overlays import DeviceScratch, ScratchReport, ThinScratch, TrimReply
from guestagent.engine.arrivals import find_device
from guestagent.engine.inventory import LiveLayer, LiveOverlay, LiveScratch, refuse_other_spec
from guestagent.engine.journal import Begun
from guestagent.engine.plan import check_target
from guestagent.engine.state import EngineState, layer_action
from guestagent.engine.teardown import (
    nothing_to_unmount,
    refuse_held,
    refuse_mounts_elsewhere,
    refuse_other_mounts,
    remove_directories,
    undo_deadline,
    unmount_target,
)
from guestagent.engine.transaction import Transaction
from guestagent.policy.decision import Allowed
from guestagent.storage import syscalls
from guestagent.storage.mount import TargetDirectory, open_mounted
from guestagent.storage.mountinfo import Mount, find_mount, whereabouts
from guestagent.storage.overlayfs import (
    OverlayMount,
    lowerdirs_of,
    mount_overlay,
    open_plain,
    remove_links,
)
from vsock.errors import CallError

__all__ = ("Overlays",)


class Overlays:
    """Mounts and unmounts overlays. Thread-safe."""

    def __init__(self, state: EngineState) -> None:
        self._state = state

    # --- mount

    def mount(self, spec: OverlaySpec, op: Transaction) -> OverlayReport:
        """Overlay layers, or say that just this overlay is there already.

        Raises:
            CallError: any code of the contract; nothing is left behind.
        """
        with self._state.hold(self.keys(spec), op):
            self._state.gate.overlay(spec)
            if self.is_mounted(spec):
                return self.get(spec.overlay_id, already=True)
            try:
                with op:
                    live = self.bring_up(spec, op)
                    with op.step("read back", spec.mount_point):
                        report = self.report(live, timings_ms=op.timings_ms)
                    begun = _begun(spec.overlay_id)
                    with op.step("commit", spec.overlay_id, code="resource"):
                        self.write(live, begun, op)
                        self._state.journal.decide(begun)
                    op.commit()
                self._state.inventory.add_overlay(live)
            except CallError as error:
                self.announce_failure(spec, error, op)
                raise
        self.announce(live, op)
        return report

    def keys(self, spec: OverlaySpec) -> list[tuple[str, str]]:
        """Return what a mount must hold: the overlay, and its layers so that none goes away."""
        return [("overlay", spec.overlay_id), *(("layer", layer) for layer in spec.layers)]

    def is_mounted(self, spec: OverlaySpec) -> bool:
        """Return whether exactly this overlay is there.

        Raises:
            CallError: ``conflict``, the id is taken by an overlay of another specification.
        """
        live = self._state.inventory.overlay(spec.overlay_id)
        if live is None:
            return False
        refuse_other_spec("overlay", spec.overlay_id, spec, live.spec)
        return True

    def bring_up(
        self, spec: OverlaySpec, op: Transaction, fresh: Mapping[str, LiveLayer] | None = None
    ) -> LiveOverlay:
        """Do every step but ``write``; the caller holds the locks of ``keys``, and decides.

        ``fresh`` has the layers that the same request has just mounted, by id.
        """
        check_target(spec.mount_point, self._state.rules.target_roots)
        layers = self._layers_of(spec, fresh or {})
        inventory = self._state.inventory
        owner = ("overlay", spec.overlay_id)
        exists = op.sees_directory
        created = inventory.reserve(owner, spec.mount_point, exists=exists).directories
        op.on_rollback("reservation", lambda: inventory.release(owner))
        permit = self._permit(spec, layers, self.find_scratch(spec, op))
        live = LiveOverlay(
            spec=spec, lowerdirs=tuple(layers), method="", links=None, scratch=None, created=created
        )
        self._state.begin(_begun(spec.overlay_id), Begun(overlay=live), op)
        if spec.scratch is not None:
            from guestagent.engine.scratch import make_scratch  # a part that many never use

            top = layers[live.lowerdirs[0]]
            scratch = make_scratch(self._state, spec, spec.scratch, top, op, permit)
            live = live.replace(scratch=scratch)
        return self._mount(live, layers, op, permit).replace(timings_ms=op.timings_ms)

    def _permit(
        self, spec: OverlaySpec, layers: Mapping[str, LiveLayer], scratch_bytes: int | None
    ) -> Allowed:
        """Have the policy judge an overlay of layers that are mounted.

        Raises:
            CallError: ``denied``.
        """
        return self._state.gate.overlay(
            spec, lambda: tuple(map(layer_action, layers.values())), scratch_bytes
        )

    def find_scratch(self, spec: OverlaySpec, op: Transaction) -> int | None:
        """Find the device of the scratch, if it is on one, and return its bytes; see
        ``find_device``."""
        if not isinstance(spec.scratch, DeviceScratch):
            return None
        return find_device(spec.scratch.device, op).size_bytes

    def write(self, live: LiveOverlay, begun: str, op: Transaction) -> None:
        """Write the entry of an overlay that is mounted; it counts once ``begun`` is decided.

        Raises:
            OSError: it cannot be written.
        """
        journal, overlay_id = self._state.journal, live.spec.overlay_id
        # it must be gone before what was begun is forgotten, or it would count
        op.on_rollback("journal entry", lambda: journal.remove_overlay(overlay_id))
        journal.write_overlay(live, begun)

    def settle(self, overlay_id: str) -> None:
        """Forget that an overlay was begun, once the request that it is part of is decided."""
        self._state.journal.decide(_begun(overlay_id))

    def announce(self, live: LiveOverlay, op: Transaction) -> None:
        self._state.events.publish(
            "overlay_mounted",
            overlay_id=live.spec.overlay_id,
            detail=live.spec.mount_point,
            traceparent=op.traceparent,
        )

    def announce_failure(self, spec: OverlaySpec, error: CallError, op: Transaction) -> None:
        self._state.events.publish(
            "overlay_failed",
            overlay_id=spec.overlay_id,
            detail=str(error),
            traceparent=op.traceparent,
        )

    # --- unmount

    def unmount(self, overlay_id: str, op: Transaction, *, force: bool = False) -> UnmountReply:
        """Unmount an overlay and its scratch; its layers stay.

        Raises:
            CallError: ``busy``, naming the holders; the overlay stays as it was.
        """
        with self._state.hold([("overlay", overlay_id)], op):
            live = self._state.inventory.overlay(overlay_id)
            if live is None:
                return nothing_to_unmount(op)
            with op:
                reply = self.take_down(live, op, force=force)
                self.take_scratch_down(live, op)
                op.commit()
            self.forget(live, op)
        return reply

    def take_down(self, live: LiveOverlay, op: Transaction, *, force: bool) -> UnmountReply:
        """Unmount an overlay; the caller holds its lock, sees to the scratch, and commits."""
        target = live.spec.mount_point
        with op.step("look", target):
            refuse_other_mounts(self._state, live.dev, target, op)
            file_systems = {live.dev}
            mount = self._scratch_mount(live)
            if mount is not None:
                path, dev = mount
                refuse_other_mounts(self._state, dev, path, op)
                file_systems.add(dev)
            refuse_mounts_elsewhere(frozenset(file_systems), target, op)
        was_mounted = unmount_target(target, op, dev=live.dev)
        held: list[CallError] = []

        def restore() -> None:
            # what is still held cannot be mounted again: two overlays must not share a scratch
            if not held:
                self._restore(live)

        if was_mounted and not force:
            op.on_rollback(f"unmount of {target}", restore)
        try:
            refuse_held(self._state, live.dev, target, op, filesystem="overlay")
        except CallError as error:
            if error.code == "busy":
                held.append(error)
            raise
        unmounted = [target] if was_mounted else []
        unmounted += [mount[0]] if mount is not None else []
        disk = live.scratch.disk if live.scratch is not None else None
        is_removed = mount is not None and disk is not None and disk.crypt
        return UnmountReply(
            unmounted=tuple(unmounted),
            removed_devices=(disk.crypt,) if disk is not None and is_removed else (),
            timings_ms=op.timings_ms,
            already=False,
        )

    def _scratch_mount(self, live: LiveOverlay) -> tuple[str, str] | None:
        """Return the mount point and the number of the file system that goes with the overlay."""
        if live.scratch is None:
            return None
        users = self._state.inventory.users_of_scratch(live.scratch.key)
        is_last = users in ((), (live.spec.overlay_id,))
        return live.scratch.mount if is_last else None

    def take_scratch_down(self, live: LiveOverlay, op: Transaction) -> None:
        """Unmount the scratch, if no other overlay is on it. What was on a tmpfs or an encrypted
        disk is lost here, so nothing may fail after this."""
        scratch = live.scratch
        if scratch is None:
            return
        if live.spec.options.volatile and scratch.kind != "tmpfs":
            from guestagent.engine.scratch import settle_volatile

            with op.step("sync", scratch.path, code="mount"):
                settle_volatile(scratch)
        if scratch.disk is not None:
            from guestagent.engine.scratchdisk import leave_disk

            leave_disk(self._state, live.spec.overlay_id, scratch.disk, op)
        elif scratch.mount_dev:
            unmount_target(scratch.path, op, dev=scratch.mount_dev)
        if isinstance(live.spec.scratch, ThinScratch) and self._state.pool_scratches is not None:
            what = f"the scratch volume of overlay {live.spec.overlay_id}"
            release = self._state.pool_scratches.release_scratch
            self._state.tidy(what, release, live.spec.scratch.pool_id, live.spec.overlay_id, op)

    def trim(self, overlay_id: str, op: Transaction) -> TrimReply:
        """Tell the device of a scratch which blocks are unused.

        Raises:
            CallError: ``not_found``; ``unsupported``, it has no scratch device, or one that does
                not take discards.
        """
        with self._state.locks.hold([("overlay", overlay_id)], op.deadline):
            live = self._state.inventory.overlay(overlay_id)
            if live is None:
                raise _no_overlay(overlay_id)
            disk = live.scratch.disk if live.scratch is not None else None
            if disk is None:
                text = f"overlay {overlay_id!r} has no scratch device"
                raise CallError("unsupported", text, step="trim", object=overlay_id)
            from guestagent.engine.scratchdisk import trim_disk

            trimmed_bytes = trim_disk(disk, op)
        return TrimReply(trimmed_bytes=trimmed_bytes, timings_ms=op.timings_ms)

    def forget(self, live: LiveOverlay, op: Transaction) -> None:
        """Drop an unmounted overlay from inventory and journal."""
        overlay_id, target = live.spec.overlay_id, live.spec.mount_point
        state = self._state
        state.inventory.drop_overlay(overlay_id)
        if live.links is not None:
            state.tidy(f"the links of overlay {overlay_id}", remove_links, live.links)
        state.tidy(f"the directories of overlay {overlay_id}", remove_directories, live.created)
        if live.scratch is not None and live.scratch.created:
            what = f"the scratch directory of overlay {overlay_id}"
            state.tidy(what, remove_directories, live.scratch.created)
        what = f"the journal of overlay {overlay_id}"
        state.tidy(what, state.journal.remove_overlay, overlay_id)
        state.inventory.release(("overlay", overlay_id))
        state.inventory.settle_problem(f"overlay {overlay_id}")
        state.events.publish(
            "overlay_unmounted", overlay_id=overlay_id, detail=target, traceparent=op.traceparent
        )

    def _restore(self, live: LiveOverlay) -> None:
        """Mount an overlay again whose unmount failed half-way."""
        with undo_deadline(self._state) as deadline, Transaction(deadline) as op:
            layers = self._layers_of(live.spec, {})
            again = self._mount(live, layers, op, self._permit(live.spec, layers, None))
            self._state.journal.write_overlay(again, begun="")
            self._state.inventory.add_overlay(again)
            op.commit()

    # --- look

    def list(self) -> tuple[OverlayReport, ...]:
        """Describe all overlays. An overlay that is being mounted or unmounted may be left out.

        An overlay whose mount is gone, moved or covered has the state ``unmounted``.
        """
        reports = []
        inventory = self._state.inventory
        for live in inventory.overlays():
            overlay_id = live.spec.overlay_id
            try:
                reports.append(self.report(live))
            except (CallError, OSError) as error:
                if self._state.locks.is_held(("overlay", overlay_id)):
                    continue
                if inventory.overlay(overlay_id) is not live:
                    continue
                inventory.note_problem(f"overlay {overlay_id}", str(error))
                reports.append(_absent_report(live))
            else:
                self._note_state(reports[-1])
        return tuple(reports)

    def get(self, overlay_id: str, *, already: bool = False) -> OverlayReport:
        """Describe an overlay as the kernel has it.

        Raises:
            CallError: ``not_found``.
        """
        live = self._state.inventory.overlay(overlay_id)
        if live is None:
            raise _no_overlay(overlay_id)
        return self.report(live, already=already)

    def report(
        self,
        live: LiveOverlay,
        *,
        timings_ms: Mapping[str, float] | None = None,
        already: bool = False,
    ) -> OverlayReport:
        """Describe an overlay as the kernel has it now.

        Raises:
            CallError: ``not_found``, its mount is not there any more.
        """
        spec = live.spec
        mount = find_mount(spec.mount_point)
        if mount is None or (mount.dev, mount.mount_id) != (live.dev, live.mount_id):
            what = whereabouts(spec.mount_point, live.dev, live.mount_id)
            raise CallError(
                "not_found",
                f"overlay {spec.overlay_id!r} is {what}",
                step="read back",
                object=spec.overlay_id,
                hint="another program unmounted it; unmount it here to clean up",
            )
        return OverlayReport(
            overlay_id=spec.overlay_id,
            state=self._state_of(live, mount),
            target=mount.target,
            layers=spec.layers,
            lowerdirs=_shown_lowerdirs(live, mount),
            scratch=self._scratch_report(live),
            method=live.method,
            mount_id=mount.mount_id,
            options=(*mount.options, *_short_options(mount)),
            timings_ms=live.timings_ms if timings_ms is None else timings_ms,
            already=already,
        )

    def _scratch_report(self, live: LiveOverlay) -> ScratchReport | None:
        if live.scratch is None:
            return None
        from guestagent.engine.scratch import scratch_report

        return scratch_report(self._state, live.spec.overlay_id, live.scratch)

    def _note_state(self, report: OverlayReport) -> None:
        key = f"overlay {report.overlay_id}"
        if report.state == "mounted":
            self._state.inventory.settle_problem(key)
        else:
            text = f"overlay {report.overlay_id!r} is {report.state}"
            self._state.inventory.note_problem(key, text)

    def _state_of(self, live: LiveOverlay, mount: Mount) -> str:
        layers = [self._state.inventory.layer(layer_id) for layer_id in live.spec.layers]
        if live.state != "mounted" or any(each and each.state == "device_lost" for each in layers):
            return "device_lost"
        if live.scratch is not None and is_read_only(live.scratch, mount):
            return "read_only"
        return live.state

    # --- the steps

    def _layers_of(self, spec: OverlaySpec, fresh: Mapping[str, LiveLayer]) -> dict[str, LiveLayer]:
        """Return the layers by where they are mounted, topmost first.

        Raises:
            CallError: ``not_found``, naming the layer that is not there; ``invalid``, one whose
                whiteouts the overlay would not see.
        """
        found = {}
        for layer_id in spec.layers:
            live = fresh.get(layer_id) or self._state.inventory.layer(layer_id)
            if live is None:
                raise CallError(
                    "not_found",
                    f"overlay {spec.overlay_id!r} needs layer {layer_id!r}, which is not mounted",
                    step="claim",
                    object=layer_id,
                )
            try:
                live.spec.check_whiteouts(userxattr=spec.options.userxattr)
            except ValueError as error:
                raise CallError("invalid", str(error), step="claim", object=layer_id) from None
            found[live.spec.mount_point] = live
        return found

    def _mount(
        self, live: LiveOverlay, layers: Mapping[str, LiveLayer], op: Transaction, permit: Allowed
    ) -> LiveOverlay:
        spec = live.spec
        with op.step("target", spec.mount_point, code="mount"):
            root = check_target(spec.mount_point, self._state.rules.target_roots)
            target = TargetDirectory(spec.mount_point, root=root)
        with target:
            op.on_rollback("target directory", lambda: remove_directories(live.created))
            with op.step("overlay", live.scratch_path or spec.mount_point, code="mount"):
                mounted = self._mount_at(live, layers, target, permit)
            op.on_rollback(
                "overlay mount", lambda: self._undo_mount(spec.mount_point, mounted.links)
            )
        self._refuse_read_only(live, op)
        dev, mount_id = syscalls.mount_of(spec.mount_point)
        return live.replace(
            lowerdirs=mounted.lowerdirs,
            method=mounted.method,
            links=mounted.links,
            dev=dev,
            mount_id=mount_id,
        )

    def _mount_at(
        self,
        live: LiveOverlay,
        layers: Mapping[str, LiveLayer],
        target: TargetDirectory,
        _permit: Allowed,
    ) -> OverlayMount:
        scratch = live.scratch

        def open_directory(path: str) -> int:
            """Open a directory of the overlay; of a layer it must be the layer's own mount."""
            layer = layers.get(path)
            if layer is None:
                return open_plain(path)
            return open_mounted(path, layer.dev, layer.mount_id)

        return mount_overlay(
            name=live.spec.overlay_id,
            lowerdirs=live.lowerdirs[: len(live.spec.layers)],
            target=target.fd,
            upperdir=f"{scratch.path}/upper" if scratch else None,
            workdir=f"{scratch.path}/work" if scratch else None,
            options=live.spec.options,
            runtime_directory=self._state.directory,
            open_directory=open_directory,
            flags=_flags(live.spec),
        )

    def _refuse_read_only(self, live: LiveOverlay, op: Transaction) -> None:
        """The kernel mounts an overlay read-only, without an error, where it cannot use its work
        directory."""
        if live.scratch is None:
            return
        mount = find_mount(live.spec.mount_point)
        if mount is None or "ro" not in mount.super_options:
            return
        raise CallError(
            "mount",
            f"the kernel cannot write to the scratch of overlay {live.spec.overlay_id!r}, and "
            "mounted it read-only",
            errno=errno.EROFS,
            step="overlay",
            object=live.scratch.path,
            hint="the kernel's log says why; a fresh scratch has no work directory of before",
            kernel_log=op.kernel_lines(),
        )

    def _undo_mount(self, target: str, links: str | None) -> None:
        with undo_deadline(self._state) as deadline:
            unmount_target(target, Transaction(deadline))
        if links is not None:
            remove_links(links)


def is_read_only(scratch: LiveScratch, mount: Mount) -> bool:
    """Return whether the kernel refuses writes to an overlay or to its scratch."""
    flags = os.statvfs(scratch.path).f_flag
    return "ro" in mount.super_options or bool(flags & os.ST_RDONLY)


def _flags(spec: OverlaySpec) -> tuple[str, ...]:
    flags = {
        "ro": spec.scratch is None,
        "nodev": not spec.options.dev,
        "nosuid": not spec.options.suid,
    }
    return tuple(flag for flag, is_set in flags.items() if is_set)


def _absent_report(live: LiveOverlay) -> OverlayReport:
    """Report an overlay that is not mounted at its target any more."""
    return OverlayReport(
        overlay_id=live.spec.overlay_id,
        state="unmounted",
        target=live.spec.mount_point,
        layers=live.spec.layers,
        lowerdirs=live.lowerdirs[: len(live.spec.layers)],
        scratch=None,
        method=live.method,
        mount_id=live.mount_id,
        options=(),
        timings_ms=live.timings_ms,
        already=False,
    )


def _begun(overlay_id: str) -> str:
    return f"overlay-{overlay_id}"


def _no_overlay(overlay_id: str) -> CallError:
    return CallError("not_found", f"there is no overlay {overlay_id!r}", object=overlay_id)


def _shown_lowerdirs(live: LiveOverlay, mount: Mount) -> tuple[str, ...]:
    """Return the lower directories that the kernel shows, without the padding of a single one."""
    return lowerdirs_of(mount)[: len(live.spec.layers)]


def _short_options(mount: Mount) -> tuple[str, ...]:
    """Return the file system's options without the directories, which have fields of their own."""
    return tuple(
        option
        for option in mount.super_options
        if not option.startswith(("lowerdir", "upperdir=", "workdir="))
        and option not in mount.options
    )
