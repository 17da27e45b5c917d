"""A vsock device with a guest behind it, in User Mode Linux or in QEMU, for tests on the host."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import cached_kernel
from rootfs.machine.accelerator import choose_accelerator, qemu_program
from rootfs.machine.qemu_command import MachineSpec, PmemSpec, Runtime, qemu_command
from rootfs.machine.qmp import QmpClient
from scripts.uml_bed.kernels import kernel_cache
from vsock.deadline import Deadline
from vsock.device.process import DeviceProcess, start_device

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
CONTROL = 900
BOOT_SECONDS = 90.0
ANSWER_SECONDS = 60.0


class Bed:
    """A device and the sockets around it; one guest at a time. A context manager."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = contextlib.ExitStack()
        self.device: DeviceProcess = self._stack.enter_context(
            start_device(directory / "vhost", directory / "v", 3, options=("--log-level", "info"))
        )
        self.control_listener = self.listen(CONTROL)
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def command(self) -> tuple[list[str], tuple[int, ...]]:
        """Return what starts a guest, and the descriptors that it inherits."""
        raise NotImplementedError

    def start_guest(self) -> None:
        argv, fds = self.command()
        with open(self.directory / "console", "ab") as console:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=console, stderr=console, pass_fds=fds,
                start_new_session=True,
            )  # fmt: skip
        for fd in fds:
            os.close(fd)
        self._meet_guest()

    def rebind(self) -> None:
        """Have the guest reload its driver, which ends all connections."""
        assert self._control is not None
        self._control.sendall(b"rebind\n")
        assert self._control.recv(64) == b""
        self._control.close()
        self._meet_guest()

    def order(self, *words: object) -> bytes:
        """Have the guest do something; return its answer."""
        assert self._control is not None
        self._control.sendall(" ".join(map(str, words)).encode() + b"\n")
        return self._line()

    def kill_guest(self) -> None:
        """End the guest as a power failure would."""
        self._end(signal.SIGTERM)

    def listen(self, port: int, backlog: int = 256) -> socket.socket:
        path = Path(f"{self.device.uds_path}_{port}")
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(backlog)
        listener.settimeout(ANSWER_SECONDS)
        self._stack.callback(path.unlink, missing_ok=True)
        return listener

    def dial(self, port: int) -> socket.socket:
        """Connect to a port of the guest; raises ConnectionRefusedError."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(ANSWER_SECONDS)
        sock.connect(self.device.uds_path)
        sock.sendall(b"CONNECT %d\n" % port)
        answer = b""
        while not answer.endswith(b"\n"):
            byte = sock.recv(1)
            if not byte:
                sock.close()
                raise ConnectionRefusedError(f"port {port}")
            answer += byte
        assert answer.startswith(b"OK "), answer
        return sock

    def console(self) -> str:
        return (self.directory / "console").read_text(errors="replace")

    def __enter__(self) -> "Bed":
        return self

    def __exit__(self, *_: object) -> None:
        self._end(signal.SIGTERM)
        self._stack.close()

    def _meet_guest(self) -> None:
        self.control_listener.settimeout(BOOT_SECONDS)
        self._control, _ = self.control_listener.accept()
        self._control.settimeout(ANSWER_SECONDS)
        assert self._line() == b"ready", self.console()

    def _line(self) -> bytes:
        assert self._control is not None
        line = b""
        while not line.endswith(b"\n"):
            part = self._control.recv(4096)
            assert part, f"the guest is gone\n{self.console()}"
            line += part
        return line[:-1]

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(20)
            self._process = None
        # last: a guest that sees its control connection end makes another one, which would then be
        # taken for the next guest's
        if self._control is not None:
            self._control.close()
            self._control = None


class UmlBed(Bed):
    def command(self) -> tuple[list[str], tuple[int, ...]]:
        uml = [sys.executable, str(PROJECT / "scripts/uml"), "--vsock", self.device.socket_path]
        guest = [os.path.realpath(sys.executable), "-IS", str(HERE / "vsock_guest.py")]
        return [*uml, "--", *guest], ()


class QemuBed(Bed):
    """With an NVDIMM that cannot be written, because its memory goes to the device as well."""

    def __init__(self, directory: Path) -> None:
        kernel = cached_kernel(kernel_cache())
        image = build_initramfs(
            InitramfsSpec(
                kernel=kernel, features=("vsock",), entry="vsock_guest:main", compression="lz4",
                project=HERE,
            ),
            cache_dir=PROJECT / ".cache",
        )  # fmt: skip
        pmem = directory / "pmem"
        with open(pmem, "wb") as file:
            file.truncate(4 << 20)
        self._spec = MachineSpec(
            kernel=kernel.image, initrd=image.path, pmem=(PmemSpec(path=pmem),)
        )
        self._accel, _ = choose_accelerator("auto", kernel.image, PROJECT / ".cache")
        super().__init__(directory)

    def command(self) -> tuple[list[str], tuple[int, ...]]:
        path = self.directory / "qmp"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            fd = os.dup(listener.fileno())
        runtime = Runtime(
            program=qemu_program(), accel=self._accel, run_dir=self.directory,
            console_path=self.directory / "serial", qmp_fd=fd,
            vhost_socket=Path(self.device.socket_path),
        )  # fmt: skip
        return qemu_command(self._spec, runtime), (fd,)

    def qmp(self, command: str) -> None:
        with contextlib.closing(Deadline(ANSWER_SECONDS)) as deadline:
            client = QmpClient.open(self.directory / "qmp", deadline)
            with contextlib.closing(client):
                client.execute(command, deadline=deadline)

    def console(self) -> str:
        serial = self.directory / "serial"
        return super().console() + (serial.read_text(errors="replace") if serial.exists() else "")
