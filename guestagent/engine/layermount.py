"""The devices and the mount of one layer, from the bottom up; every step registers its undo.

device -> journal -> superblock and root digest -> linear -> verity -> first block -> mount ->
deferred removal. What can be refused is refused before anything is made.
"""

import contextlib
import errno
from collections.abc import Iterator, Sequence

from guestagent.api import LayerSpec
from guestagent.api.devices import TREE_FIELDS
from guestagent.engine.arrivals import find_device
from guestagent.engine.inventory import LayerClaim, LiveLayer, Reservation
from guestagent.engine.plan import (
    LayerPlan,
    LinearStep,
    VerityStep,
    Version,
    check_target,
    dm_names,
    plan_layer,
    signature_description,
    source_of,
    verity_options,
)
from guestagent.engine.protection import is_ignored, protect
from guestagent.engine.readback import verity_status
from guestagent.engine.reader import Reader
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import (
    remove_directories,
    undo_deadline,
    unmount_target,
)
from guestagent.engine.transaction import Transaction
from guestagent.engine.verity import open_proved, read_parameters
from guestagent.policy.decision import Allowed
from guestagent.storage import syscalls
from guestagent.storage.blockdev import BlockDevice
from guestagent.storage.devicemapper import devices
from guestagent.storage.devicemapper.control import DeviceInfo
from guestagent.storage.devicemapper.targets import Target, is_same_table
from guestagent.storage.filesystems import check_superblock, layer_type, mount_options, refusal
from guestagent.storage.keyring import ThreadKey, require_signature_checks
from guestagent.storage.mount import READONLY_FLAGS, TargetDirectory, mount_filesystem
from vsock.errors import CallError

__all__ = ("LayerMount",)


class LayerMount:
    """Makes the stacks of layers. Thread-safe for different layers."""

    def __init__(self, state: EngineState) -> None:
        self._state = state

    # --- before anything is made

    def reserve(self, spec: LayerSpec, op: Transaction) -> Reservation:
        """Reserve names and target, and find the devices.

        Raises:
            DeviceAbsentError: one is not there, and ``op`` may be left.
        """
        self._check_rules(spec)
        inventory = self._state.inventory
        owner = ("layer", spec.layer_id)
        reservation = inventory.reserve(
            owner,
            spec.mount_point,
            exists=op.sees_directory,
            dm_names=dm_names(spec, unique=False),
            unique_dm_names=dm_names(spec, unique=True),
        )
        op.on_rollback("reservation", lambda: inventory.release(owner))
        find_device(spec.device, op)
        if spec.verity is not None and spec.verity.hash_device is not None:
            find_device(spec.verity.hash_device, op)
        return reservation

    def claim(self, spec: LayerSpec, reservation: Reservation, op: Transaction) -> LayerClaim:
        """Check the range on the devices, and make these read-only."""
        device = find_device(spec.device, op)
        self._refuse_scratch(device)
        source = source_of(spec.ranges, device)
        if spec.verity is not None:
            if spec.verity.hash_device is not None:
                hash_device = find_device(spec.verity.hash_device, op)
                self._refuse_scratch(hash_device)
                source = source.replace(hash_device=hash_device)
            self._verity_version(op)  # a kernel without it is told before anything is begun
        if is_ignored(self._state, spec, source):
            self._state.inventory.release(("layer", spec.layer_id))
            return LayerClaim(spec=spec, source=source, reservation=reservation, is_ignored=True)
        source = protect(self._state, spec, source, op)
        return LayerClaim(
            spec=spec,
            source=source,
            reservation=reservation,
            uuid_prefix=self._state.uuid_prefix,
        )

    def plan(self, claim: LayerClaim, op: Transaction) -> LiveLayer:
        """Read what verity needs, and decide everything that can be decided."""
        spec, parameters, parameters_from, options = claim.spec, None, "", None
        if spec.verity is not None:
            version = self._verity_version(op)
            parameters, parameters_from = read_parameters(claim, spec.verity, op)
            signature_key = None
            if spec.verity.signature:
                require_signature_checks()
                signature_key = signature_description(spec.layer_id)
            options = verity_options(spec.verity.preset, version, signature_key)
        plan = plan_layer(
            spec,
            claim.source,
            names=claim.reservation.dm_names,
            uuid_prefix=claim.uuid_prefix,
            parameters=parameters,
            parameters_from=parameters_from,
            options=options,
        )
        return LiveLayer(
            spec=spec,
            source=claim.source,
            plan=plan,
            created=claim.reservation.directories,
            timings_ms=op.timings_ms,
        )

    # --- what is made of the kernel's

    def make(self, planned: LiveLayer, op: Transaction) -> LiveLayer:
        """Make the devices and the mount; return the layer as it became."""
        verity, size_bytes = planned.plan.verity, planned.source.size_bytes
        parameters = None if verity is None else verity.parameters
        permit = self._state.gate.layer(planned.spec, parameters, size_bytes)
        dev, node = self._make_devices(planned, op, permit)
        # open until it is mounted, so that what was read and verified stays cached
        with self._open(planned, node, op) as reader:
            plan = self._mount(planned, reader, op, permit)
            _, mount_id = syscalls.mount_of(planned.spec.mount_point)
        self._defer_removal(plan, op)
        return planned.replace(dev=dev, mount_id=mount_id, plan=plan)

    def _check_rules(self, spec: LayerSpec) -> None:
        check_target(spec.mount_point, self._state.rules.target_roots)
        if (spec.mapping or spec.verity) and not self._state.control.is_there:
            raise CallError(
                "unsupported",
                f"layer {spec.layer_id!r} needs device-mapper, which this kernel does not have",
                step="claim",
                object="params.mapping" if spec.mapping else "params.verity",
                hint="without a mapping and a root digest the whole device can be mounted",
            )
        rule, verity = self._state.rules.require_verity, spec.verity
        if rule == "no":
            return
        if verity is None:
            raise _denied(
                f"layer {spec.layer_id!r} is not verified, and this agent requires it",
                "give a root_digest",
            )
        left_out = [
            name for name in (*TREE_FIELDS, "hash_offset_bytes") if getattr(verity, name) is None
        ]
        if rule == "full" and left_out:
            raise _denied(
                f"layer {spec.layer_id!r} leaves {', '.join(left_out)} to the superblock, for "
                "which the root digest does not vouch",
                f"give {', '.join(left_out)}",
            )

    def _refuse_scratch(self, device: BlockDevice) -> None:
        owner = self._state.inventory.scratch_owner(device.dev)
        if owner is not None:
            raise CallError(
                "conflict",
                f"{device.node} is the scratch of overlay {owner!r}, which is written to",
                step="claim",
                object=device.node,
            )

    def _verity_version(self, op: Transaction) -> Version:
        version = self._state.known_verity_version
        if version is not None:
            return version
        with op.step("version", "verity target"):
            version = self._state.verity_version()
        if version is None:
            raise CallError(
                "unsupported",
                "this kernel has no verity target",
                step="version",
                object="verity target",
                hint="load the module dm-verity",
            )
        return version

    def _make_devices(self, live: LiveLayer, op: Transaction, _permit: Allowed) -> tuple[str, str]:
        """Create the linear and the verity device as planned; return what to mount, as MAJOR:MINOR
        and as node."""
        plan = live.plan
        dev, node = live.source.dev, live.source.node
        if plan.linear is not None:
            with op.step("linear", plan.linear.name):
                targets = plan.linear.targets(live.spec.ranges)
                info = self._device(plan.linear, targets, plan, op)
                op.loaded_tables[plan.linear.name] = targets
            self._undo_device(plan.linear.name, op)
            dev, node = info.dev, info.node
        if plan.verity is not None:
            with op.step("verity", plan.verity.name), _signature(live):
                targets = (plan.verity.target(dev),)
                info = self._device(plan.verity, targets, plan, op)
            self._undo_device(plan.verity.name, op)
            dev, node = info.dev, info.node
        return dev, node

    def _open(self, live: LiveLayer, node: str, op: Transaction) -> Reader:
        """Open what is to be mounted; where that is a verity device, see that it lets a block
        through."""
        verity = live.plan.verity
        if verity is None:
            with op.step("filesystem", node, code="mount"):
                return Reader(node, size_bytes=live.source.size_bytes)
        with op.step("prove", verity.name):
            try:
                return open_proved(node, verity.parameters.data_size_bytes)
            except OSError as error:
                # the target alone can tell a block that does not verify from a disk that fails
                if not self._is_corrupt(live.plan):
                    raise
                raise CallError(
                    "integrity",
                    f"the first block of layer {live.spec.layer_id!r} does not verify",
                    errno=error.errno,
                    kernel_log=op.kernel_lines(),
                ) from error

    def _device(
        self,
        step: LinearStep | VerityStep,
        targets: Sequence[Target],
        plan: LayerPlan,
        op: Transaction,
    ) -> DeviceInfo:
        """Create a device. A device left by a failed unmount is used again if it is exactly as
        planned, and removed if it is not.

        Raises:
            CallError: ``busy``, a device that is not the agent's has the name.
        """
        control = self._state.control
        try:
            return devices.create_device(control, name=step.name, uuid=step.uuid, targets=targets)
        except OSError as error:
            there = self._left_behind(step, error)
            if self._is_planned(there, step, targets):
                return there
        # what stands on it has to go first
        above = plan.verity if plan.verity is not None and step is plan.linear else None
        left = control.find(uuid=above.uuid) if above is not None else None
        for device in (left, there):
            if device is not None:
                devices.remove_device(control, device.name, op.deadline)
        return devices.create_device(control, name=step.name, uuid=step.uuid, targets=targets)

    def _left_behind(self, step: LinearStep | VerityStep, error: OSError) -> DeviceInfo:
        """Return the agent's own device that is in the way, or raise ``error``."""
        control = self._state.control
        if error.errno != errno.EBUSY:
            raise error
        there = control.find(name=step.name) or control.find(uuid=step.uuid)
        if there is None:
            raise error
        if there.uuid != step.uuid:
            raise CallError(
                "busy",
                f"the name {step.name!r} is another device's",
                errno=error.errno,
                object=step.name,
                hint=f"a dm device {there.name!r} with the uuid {there.uuid!r} is there, which is "
                f"not of this layer; it can be removed by: dmsetup remove {there.name}",
            ) from error
        return there

    def _is_planned(
        self, there: DeviceInfo, step: LinearStep | VerityStep, targets: Sequence[Target]
    ) -> bool:
        if there.name != step.name or not there.readonly or there.suspended:
            return False
        return is_same_table(targets, self._state.control.table(there.name))

    def _undo_device(self, name: str, op: Transaction) -> None:
        def undo() -> None:
            with undo_deadline(self._state) as deadline:
                devices.remove_device(self._state.control, name, deadline)

        op.on_rollback(f"dm device {name}", undo)

    def _mount(
        self, planned: LiveLayer, reader: Reader, op: Transaction, _permit: Allowed
    ) -> LayerPlan:
        spec, node = planned.spec, reader.node
        root = check_target(spec.mount_point, self._state.rules.target_roots)
        with op.step("target", spec.mount_point, code="mount"):
            target = TargetDirectory(spec.mount_point, root=root)
        with target:
            op.on_rollback("target directory", lambda: remove_directories(planned.created))
            with op.step("filesystem", node, code="mount"):
                plan = _with_filesystem(planned.plan, reader)
            with op.step("mount", spec.mount_point, code="mount"):
                self._mount_at(plan, node, target, op)
            op.on_rollback("mount", lambda: self._undo_mount(spec.mount_point))
            if plan.linear is None and plan.verity is None:
                self._check_still_whole(planned.source.device, reader, op)
        return plan

    def _check_still_whole(self, device: BlockDevice, reader: Reader, op: Transaction) -> None:
        """See that the disk is as large as it was when it was checked.

        A mapping need not be looked at: device-mapper compares sizes when a table is loaded.
        """
        with op.step("size", device.node):
            now_bytes = reader.device_bytes()
        if now_bytes != device.size_bytes:
            raise CallError(
                "device",
                f"{device.node} changed from {device.size_bytes} to {now_bytes} bytes "
                "while it was mounted",
                step="size",
                object=device.node,
            )

    def _mount_at(
        self, plan: LayerPlan, node: str, target: TargetDirectory, op: Transaction
    ) -> None:
        step = plan.mount
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
            if self._is_corrupt(plan):
                raise CallError(
                    "integrity",
                    f"mounting layer {plan.layer_id!r} read a block that does not verify",
                    errno=error.errno,
                    kernel_log=op.kernel_lines(),
                ) from error
            refused = refusal(step.filesystem, node, error)
            if refused is None:
                raise
            refused.kernel_log = op.kernel_lines()
            raise refused from error

    def _is_corrupt(self, plan: LayerPlan) -> bool:
        return (
            plan.verity is not None and verity_status(self._state.control, plan.verity.name) == "C"
        )

    def _undo_mount(self, target: str) -> None:
        with undo_deadline(self._state) as deadline:
            unmount_target(target, Transaction(deadline))

    def _defer_removal(self, plan: LayerPlan, op: Transaction) -> None:
        """From here on the kernel removes the devices when the mount goes, whatever we do."""
        for name in plan.dm_names:
            with op.step("defer", name):
                if devices.set_deferred_remove(self._state.control, name):
                    # gone already: nothing held it open, so it was not mounted
                    raise OSError(errno.ENXIO, "device vanished while it was mounted", name)


def _denied(message: str, hint: str) -> CallError:
    return CallError(
        "denied",
        message,
        step="claim",
        object="params.verity",
        hint=f"{hint}; the rule is guestagent.require_verity",
    )


def _with_filesystem(plan: LayerPlan, reader: Reader) -> LayerPlan:
    """Look at the file system through the device that will be mounted: what verity does not let
    through is never parsed, here or in the kernel."""
    filesystem = layer_type(plan.mount.filesystem, reader.read_padded)
    check_superblock(filesystem, reader.read_padded, reader.size_bytes)
    if filesystem == plan.mount.filesystem:
        return plan
    return plan.replace(mount=plan.mount.replace(filesystem=filesystem))


@contextlib.contextmanager
def _signature(live: LiveLayer) -> Iterator[None]:
    """Hold the signature of a layer's root digest in the keyring while its table is loaded."""
    verity = live.spec.verity
    if verity is None or verity.signature is None:
        yield
        return
    with ThreadKey("user", signature_description(live.spec.layer_id), verity.signature):
        try:
            yield
        except OSError as error:
            if error.errno != errno.EBADMSG:
                raise
            raise CallError(
                "denied",
                f"the signature of layer {live.spec.layer_id!r} is no PKCS#7 that the kernel reads",
                errno=error.errno,
                object="params.verity.signature",
            ) from error
