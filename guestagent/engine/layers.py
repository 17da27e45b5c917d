"""Bringing a layer up and taking it down: the one path that every mount request goes.

device -> superblock and root digest -> linear -> verity -> first block -> mount -> deferred
removal -> read back. Each step registers its undo; what is made is kept only when all of it is.
"""

import errno

from guestagent.api import ByteRange, LayerReport, LayerSpec, UnmountReply, VerifyReply
from guestagent.engine.inventory import LiveLayer
from guestagent.engine.operation import Operation
from guestagent.engine.plan import (
    LayerPlan,
    VerityOptions,
    Version,
    check_range,
    dm_names,
    plan_layer,
)
from guestagent.engine.readback import layer_report, verity_status
from guestagent.engine.state import EngineState
from guestagent.engine.takedown import (
    busy,
    nothing_to_unmount,
    remove_devices,
    remove_directories,
    undo_deadline,
    unmount_target,
)
from guestagent.engine.verified import Reader, prove_first_block, read_parameters
from guestagent.engine.verifying import Progress, verify_layer
from guestagent.storage import blockdev
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.devicemapper import devices
from guestagent.storage.devicemapper.control import DeviceInfo
from guestagent.storage.devicemapper.targets import Target
from guestagent.storage.filesystems import check_size, detect, mount_options
from guestagent.storage.mount import READONLY_FLAGS, TargetDirectory, mount_filesystem
from vsock.errors import CallError

__all__ = ("Layers",)


class Layers:
    """Mounts and unmounts single layers. Thread-safe: requests for other layers run beside."""

    def __init__(self, state: EngineState) -> None:
        self._state = state

    # --- mount

    def mount(self, spec: LayerSpec, op: Operation) -> LayerReport:
        """Mount a layer, or say that it is mounted already.

        Raises:
            CallError: any code of the contract; nothing is left behind.
        """
        with self._state.locks.hold([("layer", spec.layer_id)], op.deadline):
            if self.is_mounted(spec):
                return self.get(spec.layer_id, already=True)
            try:
                with op:
                    live = self.bring_up(spec, op)
                    report = layer_report(self._state, live, timings_ms=op.timings_ms)
                    self.keep(live)
                    op.commit()
            except CallError as error:
                self.announce_failure(spec, error, op)
                raise
        self.announce(live, op)
        return report

    def is_mounted(self, spec: LayerSpec) -> bool:
        """Return whether exactly this layer is there.

        Raises:
            CallError: ``conflict``, the id is taken by a layer of another specification.
        """
        live = self._state.inventory.layer(spec.layer_id)
        if live is None:
            return False
        wanted, has = spec.as_dict(), live.spec.as_dict()
        differing = [name for name in wanted if wanted[name] != has[name]]
        if differing:
            raise CallError(
                "conflict",
                f"layer {spec.layer_id!r} is mounted with another {', '.join(differing)}",
                step="claim",
                object=spec.layer_id,
                hint="unmount it first, or use another layer_id",
            )
        return True

    def bring_up(self, spec: LayerSpec, op: Operation) -> LiveLayer:
        """Do every step of a mount but ``keep``; the caller holds the layer's lock and commits."""
        self._check_rules(spec)
        self._claim(spec, op)
        with op.step("device", blockdev.describe(spec.device)):
            device = blockdev.wait_for(spec.device, op.deadline)
        live = self._plan(spec, device, op)
        self._begin(live, op)
        node = self._make_devices(live.plan, device, op)
        live = self._mount(live, node, op)
        self._defer_removal(live.plan, op)
        return live.replace(timings_ms=op.timings_ms)

    def keep(self, live: LiveLayer) -> None:
        """Make a mounted layer official: in the journal, then in the inventory."""
        self._state.journal.write_layer(live, "whole")
        self._state.inventory.add_layer(live)

    def announce(self, live: LiveLayer, op: Operation) -> None:
        self._state.events.publish(
            "layer_mounted",
            layer_id=live.spec.layer_id,
            device=live.device.node,
            detail=live.spec.mount_point,
            traceparent=op.traceparent,
        )

    def announce_failure(self, spec: LayerSpec, error: CallError, op: Operation) -> None:
        self._state.events.publish(
            "layer_failed",
            layer_id=spec.layer_id,
            detail=str(error),
            traceparent=op.traceparent,
        )

    # --- unmount

    def unmount(self, layer_id: str, op: Operation, *, force: bool = False) -> UnmountReply:
        """Unmount a layer and see its devices gone.

        ``force`` also cleans up a layer that somebody else unmounted or whose device is lost.

        Raises:
            CallError: ``busy``, naming the holders; the layer stays as it was.
        """
        with self._state.locks.hold([("layer", layer_id)], op.deadline):
            live = self._state.inventory.layer(layer_id)
            if live is None:
                return nothing_to_unmount(op)
            with op:
                reply = self.take_down(live, op, force=force)
                op.commit()
            self.forget(live, op)
        return reply

    def take_down(
        self, live: LiveLayer, op: Operation, *, force: bool, ignore_user: str | None = None
    ) -> UnmountReply:
        """Do every step of an unmount but ``forget``; the caller holds the lock and commits.

        The undo mounts the layer again, so that an unmount, too, is all or nothing.
        ``ignore_user`` is an overlay that the same request has just unmounted.
        """
        layer_id, target = live.spec.layer_id, live.spec.mount_point
        users = self._state.inventory.users_of(layer_id)
        if any(user != ignore_user for user in users):
            raise busy(target, "", op, self._state.inventory.holders_of_layer(layer_id))
        was_mounted = unmount_target(target, op)
        if was_mounted and not force:
            op.undo_by(f"unmount of {target}", lambda: self._restore(live))
        removed = remove_devices(self._state, live.plan.dm_names, op)
        return UnmountReply(
            unmounted=(target,) if was_mounted else (),
            removed_devices=removed,
            timings_ms=op.timings_ms,
            already=False,
        )

    def forget(self, live: LiveLayer, op: Operation) -> None:
        """Drop a layer that is taken down from the books."""
        layer_id = live.spec.layer_id
        remove_directories(live.created)
        self._state.journal.remove("layer", layer_id)
        self._state.inventory.drop_layer(layer_id)
        self._state.inventory.release_target(live.spec.mount_point)
        self._state.inventory.release_dm_names(layer_id)
        self._state.events.publish(
            "layer_unmounted",
            layer_id=layer_id,
            detail=live.spec.mount_point,
            traceparent=op.traceparent,
        )

    def _restore(self, live: LiveLayer) -> None:
        """Mount a layer again whose unmount failed half-way."""
        deadline = undo_deadline(self._state)
        with Operation(deadline) as op:
            node = self._make_devices(live.plan, live.device, op)
            self._mount(live, node, op)
            self._defer_removal(live.plan, op)
            op.commit()
        deadline.close()

    # --- look

    def get(self, layer_id: str, *, already: bool = False) -> LayerReport:
        """Describe a layer as the kernel has it.

        Raises:
            CallError: ``not_found``.
        """
        live = self._state.inventory.layer(layer_id)
        if live is None:
            raise CallError("not_found", f"there is no layer {layer_id!r}", object=layer_id)
        return layer_report(self._state, live, already=already)

    def list(self) -> tuple[LayerReport, ...]:
        """Describe all layers; one that vanishes meanwhile is left out."""
        reports = []
        for live in self._state.inventory.layers():
            try:
                reports.append(layer_report(self._state, live))
            except CallError as error:
                if error.code != "not_found":
                    raise
        return tuple(reports)

    def verify(self, layer_id: str, op: Operation, progress: Progress) -> VerifyReply:
        """Read a whole layer through verity; ``progress`` gets (done_bytes, total_bytes)."""
        live = self._state.inventory.layer(layer_id)
        if live is None:
            raise CallError("not_found", f"there is no layer {layer_id!r}", object=layer_id)
        return verify_layer(self._state, live, op, progress)

    # --- the steps

    def _check_rules(self, spec: LayerSpec) -> None:
        if self._state.rules.require_verity and spec.verity is None:
            raise CallError(
                "denied",
                f"layer {spec.layer_id!r} is not verified, and this agent requires it",
                step="claim",
                object="params.verity",
                hint="give a root_digest; the rule is guestagent.require_verity",
            )

    def _claim(self, spec: LayerSpec, op: Operation) -> None:
        inventory = self._state.inventory
        inventory.claim_target(spec.mount_point, ("layer", spec.layer_id))
        op.undo_by("target claim", lambda: inventory.release_target(spec.mount_point))

    def _plan(self, spec: LayerSpec, device: BlockDevice, op: Operation) -> LiveLayer:
        """Decide everything that can be decided before anything is made."""
        area = check_range(spec.mapping, device)
        hash_device = None
        if spec.verity is not None and spec.verity.hash_device is not None:
            with op.step("device", "hash device"):
                hash_device = blockdev.wait_for(spec.verity.hash_device, op.deadline)
        verified = None
        if spec.verity is not None:
            version = self._verity_version(op)
            verified = read_parameters(spec, spec.verity, device, area, hash_device, version, op)
        inventory = self._state.inventory
        names = inventory.claim_dm_names(
            spec.layer_id, dm_names(spec, unique=False), dm_names(spec, unique=True)
        )
        op.undo_by("dm names", lambda: inventory.release_dm_names(spec.layer_id))
        plan = plan_layer(
            spec,
            device,
            filesystem=spec.filesystem,
            names=names,
            parameters=verified.parameters if verified else None,
            hash_device=hash_device,
            options=verified.options.arguments if verified else (),
        )
        return LiveLayer(
            spec=spec,
            device=device,
            range=area,
            plan=plan,
            verity_source=verified.source if verified else "",
            verity_options=verified.options if verified else VerityOptions(),
            created=(),
            timings_ms={},
        )

    def _verity_version(self, op: Operation) -> Version:
        with op.step("version", "verity target"):
            version = self._state.control.list_versions().get("verity")
        if version is None:
            raise CallError(
                "unsupported",
                "this kernel has no verity target",
                step="version",
                object="verity target",
                hint="load the module dm-verity",
            )
        return version

    def _begin(self, live: LiveLayer, op: Operation) -> None:
        """Write down what is about to be made, so that a restart can undo it."""
        with op.step("journal", live.spec.layer_id, code="resource"):
            self._state.journal.write_layer(live, "begun", batch=op.batch)
        layer_id = live.spec.layer_id
        op.undo_by("journal entry", lambda: self._state.journal.remove("layer", layer_id))

    def _make_devices(self, plan: LayerPlan, device: BlockDevice, op: Operation) -> str:
        """Create the linear and the verity device as planned; return the node to mount."""
        dev, node = device.dev, device.node
        if plan.linear is not None:
            with op.step("linear", plan.linear.name):
                info = self._device(plan.linear.name, plan.linear.uuid, plan.linear.target())
            self._undo_device(plan.linear.name, op)
            dev, node = info.dev, info.node
        if plan.verity is not None:
            with op.step("verity", plan.verity.name):
                info = self._device(plan.verity.name, plan.verity.uuid, plan.verity.target(dev))
            self._undo_device(plan.verity.name, op)
            node = info.node
            with op.step("prove", plan.verity.name, code="integrity"):
                prove_first_block(node)
        return node

    def _device(self, name: str, uuid: str, target: Target) -> DeviceInfo:
        """Create a device; one of ours that is still there from an unmount half done will do."""
        control = self._state.control
        there = control.find(name=name)
        if there is not None and there.uuid == uuid:
            return there
        return devices.create_device(control, name=name, uuid=uuid, targets=[target])

    def _undo_device(self, name: str, op: Operation) -> None:
        def undo() -> None:
            deadline = undo_deadline(self._state)
            devices.remove_device(self._state.control, name, deadline)
            deadline.close()

        op.undo_by(f"dm device {name}", undo)

    def _mount(self, live: LiveLayer, node: str, op: Operation) -> LiveLayer:
        spec = live.spec
        with op.step("target", spec.mount_point, code="mount"):
            target = TargetDirectory(spec.mount_point, root=self._state.rules.target_root)
        with target:
            op.undo_by("target directory", lambda: remove_directories(target.created))
            live = live.replace(created=target.created)
            with op.step("filesystem", node, code="mount"):
                live = self._with_filesystem(live, node)
            with op.step("mount", spec.mount_point, code="mount"):
                self._mount_at(live, node, target, op)
            op.undo_by("mount", lambda: self._undo_mount(spec.mount_point))
        return live

    def _with_filesystem(self, live: LiveLayer, node: str) -> LiveLayer:
        """Look at the file system through the device that will be mounted: what verity does not
        let through is never parsed, here or in the kernel."""
        verity = live.plan.verity
        size_bytes = verity.parameters.data_size_bytes if verity else live.range.size_bytes
        with Reader(node, ByteRange(offset_bytes=0, size_bytes=size_bytes)) as reader:
            filesystem = live.spec.filesystem
            if filesystem == "auto":
                filesystem = detect(reader.read_padded) or "unknown"
            check_size(filesystem, reader.read_padded, size_bytes)
        mount = live.plan.mount.replace(filesystem=filesystem)
        return live.replace(plan=live.plan.replace(mount=mount))

    def _mount_at(self, live: LiveLayer, node: str, target: TargetDirectory, op: Operation) -> None:
        step = live.plan.mount
        options = mount_options(step.filesystem, dax="dax" in step.options)
        flags = (*READONLY_FLAGS, *(option for option in step.options if option != "dax"))
        try:
            mount_filesystem(
                source=node,
                target=target.fd,
                filesystem=step.filesystem,
                flags=flags,
                options=options,
            )
        except OSError as error:
            if self._is_corrupt(live.plan):
                raise CallError(
                    "integrity",
                    f"mounting layer {live.spec.layer_id!r} read a block that does not verify",
                    errno=error.errno,
                    kernel_log=op.kernel_lines(),
                ) from error
            raise

    def _is_corrupt(self, plan: LayerPlan) -> bool:
        return (
            plan.verity is not None and verity_status(self._state.control, plan.verity.name) == "C"
        )

    def _undo_mount(self, target: str) -> None:
        deadline = undo_deadline(self._state)
        unmount_target(target, Operation(deadline))
        deadline.close()

    def _defer_removal(self, plan: LayerPlan, op: Operation) -> None:
        """From here on the kernel removes the devices when the mount goes, whatever we do."""
        for name in plan.dm_names:
            with op.step("defer", name):
                if devices.set_deferred_remove(self._state.control, name):
                    # gone already: nobody held it, so it was not mounted
                    raise OSError(errno.ENXIO, "device vanished while it was mounted", name)
