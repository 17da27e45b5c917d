"""Virtual machines in QEMU, started and ended by a ``with`` block.

with Machine(MachineSpec(kernel=..., initrd=...)) as machine:
    agent = GuestAgent(machine.agent_address())
"""

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from guestagent.api.agent import AGENT_PORT
from rootfs.bootimage.places import CACHE_DIR
from rootfs.machine.accelerator import (
    choose_accelerator,
    has_kernel_vsock,
    has_steady_tsc,
    qemu_program,
)
from rootfs.machine.console import ConsoleFile
from rootfs.machine.lifetime import ending_with_us
from rootfs.machine.qemu_command import (
    DiskSpec,
    MachineSpec,
    PmemSpec,
    Runtime,
    blockdev,
    disk_device,
    pmem_backend,
    pmem_device,
    port_path,
    qemu_command,
    tty_path,
)
from rootfs.machine.qmp import QmpClient, QmpClosedError
from rootfs.machine.rundir import run_directory
from vsock.deadline import Deadline
from vsock.device.process import DeviceProcess, start_device
from vsock.errors import CallError, ConnectionClosed, RpcError
from vsock.threads import start_thread

__all__ = ("DiskSpec", "Machine", "MachineError", "MachineSpec", "PmemSpec")

_PANIC = "Kernel panic - not syncing"
_START_SECONDS = 20.0
_END_SECONDS = 1.0
_STOP_SECONDS = 5.0


class MachineError(Exception):
    """QEMU did not start, or ended when it should not have. ``console`` is its console's tail."""

    def __init__(self, message: str, console: str = "") -> None:
        super().__init__(f"{message}\n{console}" if console else message)
        self.console = console


class Machine:
    """One virtual machine. The end of the ``with`` block ends it, whatever state it is in.

    The machine also ends with this process, even if that is killed, and with the thread that
    entered the block: Linux ties a parent-death signal to a thread. So enter the block in a thread
    that lives for as long as the machine.

    ``accel`` is kvm or tcg, and ``accel_reason`` why. Not for use by several threads.
    """

    def __init__(self, spec: MachineSpec, *, cache_dir: Path = CACHE_DIR) -> None:
        self.spec = spec
        self.accel, self.accel_reason = choose_accelerator(spec.accel, spec.kernel, cache_dir)
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._device: DeviceProcess | None = None
        self._qmp: QmpClient | None = None
        self._pid_fd = -1
        self._plugged = 0
        self.run_dir = Path()
        self.console = ConsoleFile(Path())

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if value is not None and self.console.tail():
            value.add_note(f"console of the machine:\n{self.console.tail()}")
        self.close()

    def close(self) -> None:
        """End QEMU and the vsock device, and remove what they left behind. Idempotent."""
        self._stack.close()

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def qmp(self) -> QmpClient:
        """The control connection.

        Raises:
            MachineError: the machine has none, or is not running.
        """
        if self._qmp is None:
            raise MachineError("the machine has no QMP connection")
        return self._qmp

    @property
    def hybrid_path(self) -> Path | None:
        """The Unix socket of the guest's vsock, or None when the kernel serves it."""
        return None if self._device is None else Path(self._device.uds_path)

    def agent_address(self, port: int = AGENT_PORT) -> str:
        """Return where the host reaches ``port`` of the guest.

        Raises:
            MachineError: the machine has no vsock.
        """
        if self.spec.vsock_cid is None:
            raise MachineError("the machine has no vsock")
        if self.hybrid_path is None:
            return f"vsock://{self.spec.vsock_cid}:{port}"
        return f"hybrid://{self.hybrid_path}:{port}"

    def port_path(self, name: str) -> Path:
        """Return the Unix socket of a virtio-serial port: a plain byte stream.

        Raises:
            MachineError: the machine has no such port.
        """
        if name not in self.spec.serial_ports:
            raise MachineError(f"the machine has no serial port {name!r}")
        return port_path(self.run_dir, name)

    def tty_path(self, name: str) -> Path:
        """Return the Unix socket at the far end of a tty, hvc0 or ttyS1: a plain byte stream.

        One peer at a time. The guest does not see a peer connect or disconnect; what it writes
        while there is no peer is lost.

        Raises:
            MachineError: the machine has no such line.
        """
        if name not in self.spec.ttys:
            raise MachineError(f"the machine has no tty {name!r}")
        return tty_path(self.run_dir, name)

    def poll(self) -> int | None:
        """Return the exit status of QEMU (negative: the signal that ended it), None if it runs."""
        return self._running().poll()

    def wait(self, deadline: Deadline) -> int:
        """Wait for the machine to end; return the exit status of QEMU, 0 for a power-off.

        Raises:
            CallError: ``timeout`` or ``cancelled``.
        """
        deadline.wait([self._pid_fd], "waiting for the machine to end")
        return self._running().wait()

    def wait_console(self, text: str, deadline: Deadline) -> None:
        """Wait until ``text`` is on the console.

        Raises:
            CallError: ``timeout`` or ``cancelled``.
            MachineError: the machine ended without it.
        """
        if not self.console.wait_for(text, deadline, until=[self._pid_fd]):
            raise MachineError(f"the machine ended before it printed {text!r}", self.console.tail())

    @contextlib.contextmanager
    def while_up(self) -> Iterator[Deadline]:
        """Yield a deadline that is cancelled when the guest panics or QEMU ends.

        For what waits for the guest in the block: it need not wait for a guest that is gone.

        Raises:
            MachineError: the block raised, and the guest had panicked or QEMU had ended; with the
                tail of the console.
        """
        with contextlib.ExitStack() as stack:
            up = stack.enter_context(contextlib.closing(Deadline()))
            watched = stack.enter_context(contextlib.closing(Deadline()))
            watcher = threading.Thread(target=self._cancel_at_end, args=(up, watched), daemon=True)
            start_thread(watcher)
            stack.callback(watcher.join)
            stack.callback(watched.cancel)
            try:
                yield up
            except (OSError, RpcError) as problem:
                # a connection ends a little before QEMU does
                seconds = _END_SECONDS if isinstance(problem, ConnectionClosed) else 0.0
                with contextlib.suppress(CallError):
                    up.wait((), "the end of the machine", at_most=seconds)
                if not up.cancelled:
                    raise
                panicked = _PANIC in self.console.read()
                what = "the guest's kernel panicked" if panicked else "the machine ended"
                raise MachineError(what, self.console.tail()) from problem

    def _cancel_at_end(self, up: Deadline, watched: Deadline) -> None:
        with contextlib.suppress(CallError):
            self.console.wait_for(_PANIC, watched, until=[self._pid_fd])
            up.cancel()

    def powerdown(self, deadline: Deadline) -> int:
        """Press the power button, wait for the guest to end the machine, return QEMU's status.

        Raises:
            CallError: ``timeout`` when the guest does not react.
        """
        with contextlib.suppress(QmpClosedError):
            self.qmp.execute("system_powerdown", deadline=deadline)
        return self.wait(deadline)

    def plug_disk(self, disk: DiskSpec, deadline: Deadline, *, root_port: int = 0) -> str:
        """Plug in a disk while the machine runs; return the name for ``unplug``.

        A virtio disk takes the PCIe port ``root_port``; SCSI needs a SCSI disk from the start.

        Raises:
            QmpError: QEMU refused.
        """
        node = f"plugged{self._plugged}"
        self._plugged += 1
        self.qmp.execute("blockdev-add", blockdev(disk, node), deadline=deadline)
        bus = None if disk.bus == "scsi" else f"port{root_port}"
        self.qmp.execute("device_add", disk_device(disk, node, bus=bus), deadline=deadline)
        return node

    def plug_pmem(self, pmem: PmemSpec, deadline: Deadline) -> str:
        """Plug in an NVDIMM while the machine runs, into one of its ``pmem_slots``.

        Returns its name in QEMU. The guest numbers its pmem devices itself: this is the next one.

        Raises:
            QmpError: QEMU refused.
        """
        name = f"plugged{self._plugged}"
        self._plugged += 1
        self.qmp.execute("object-add", pmem_backend(pmem, name), deadline=deadline)
        self.qmp.execute("device_add", pmem_device(pmem, name), deadline=deadline)
        return name

    def unplug(self, node: str, deadline: Deadline) -> None:
        """Take a disk out again, and wait until the guest has released it.

        Raises:
            CallError: ``timeout`` when the guest keeps it.
            QmpError: QEMU refused.
        """
        device = f"{node}-device"
        self.qmp.execute("device_del", {"id": device}, deadline=deadline)
        self.qmp.wait_event("DEVICE_DELETED", deadline, data={"device": device})
        self.qmp.execute("blockdev-del", {"node-name": node}, deadline=deadline)

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise MachineError("the machine was not started")
        return self._process

    def _start(self) -> None:
        run = self._stack.enter_context(run_directory("guestagent-vm-"))
        self.run_dir = run.path
        console_path = self.spec.console_path or self.run_dir / "console"
        console_path.write_bytes(b"")
        self.console = ConsoleFile(console_path)
        listener = self._qmp_listener()
        runtime = Runtime(
            program=qemu_program(),
            accel=self.accel,
            run_dir=self.run_dir,
            console_path=console_path,
            qmp_fd=None if listener is None else listener.fileno(),
            vhost_socket=self._vhost_socket(),
            steady_tsc=has_steady_tsc(),
        )
        self._spawn(qemu_command(self.spec, runtime), listener, run.lock_fd)
        if listener is not None:
            self._qmp = self._connect_qmp()
            self._stack.callback(self._qmp.close)

    def _qmp_listener(self) -> socket.socket | None:
        """Listen in QEMU's place, so that a connection can be made before it is up."""
        if not self.spec.qmp:
            return None
        listener = socket.socket(socket.AF_UNIX)
        self._stack.callback(listener.close)
        listener.bind(str(self.run_dir / "qmp"))
        listener.listen(1)
        return listener

    def _vhost_socket(self) -> Path | None:
        """Start a vsock device of our own where the kernel has none."""
        if self.spec.vsock_cid is None or has_kernel_vsock():
            return None
        path = self.run_dir / "vhost"
        self._device = start_device(path, self.run_dir / "vsock", self.spec.vsock_cid)
        self._stack.callback(self._device.close)
        return path

    def _spawn(self, argv: list[str], listener: socket.socket | None, lock_fd: int) -> None:
        interactive = self.spec.console_stdio
        errors = open(self.run_dir / "qemu-errors", "wb")  # noqa: SIM115 (closed two lines below)
        with errors:
            self._process = subprocess.Popen(
                ending_with_us(argv),
                stdin=None if interactive else subprocess.DEVNULL,
                stdout=None if interactive else errors,
                stderr=errors,
                start_new_session=not interactive,
                pass_fds=(lock_fd,) if listener is None else (lock_fd, listener.fileno()),
            )
        if listener is not None:
            listener.close()  # now it goes away with QEMU, and with it our connection
        self._pid_fd = os.pidfd_open(self._process.pid)
        self._stack.callback(self._end)

    def _end(self) -> None:
        process = self._running()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        os.close(self._pid_fd)

    def _connect_qmp(self) -> QmpClient:
        """Wait for QEMU to answer.

        Raises:
            MachineError: it ended instead, or did nothing.
        """
        with contextlib.closing(Deadline(_START_SECONDS)) as deadline:
            try:
                return QmpClient.open(self.run_dir / "qmp", deadline)
            except (QmpClosedError, ConnectionRefusedError):
                status = self.wait(deadline)
                raise MachineError(f"QEMU ended with status {status}", self._errors()) from None
            except CallError as problem:
                raise MachineError(f"QEMU did not start: {problem}", self._errors()) from problem

    def _errors(self) -> str:
        return (self.run_dir / "qemu-errors").read_text(errors="replace").strip()
