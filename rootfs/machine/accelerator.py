"""Whether KVM works here, found out by booting a kernel: that /dev/kvm exists is not enough."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from rootfs.bootimage.cpio import write_cpio

__all__ = ("choose_accelerator", "has_kernel_vsock", "has_steady_tsc", "qemu_program")

_PROBE_SECONDS = 20.0
_STEADY_TSC = frozenset(("constant_tsc", "nonstop_tsc"))
_VHOST_GET_FEATURES = 0x8008AF00  # linux/vhost.h: _IOR(0xAF, 0x00, __u64)


def qemu_program() -> str:
    """Return the path of QEMU.

    Raises:
        FileNotFoundError: it is not installed.
    """
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise FileNotFoundError("qemu-system-x86_64 is not installed (package qemu-system-x86)")
    return program


def choose_accelerator(wanted: str, kernel: Path, cache_dir: Path) -> tuple[str, str]:
    """Return (kvm or tcg, the reason for a person).

    ``wanted`` other than ``auto`` is taken as it is. The answer of a probe is kept in ``cache_dir``
    for as long as this machine is up and QEMU and the kernel stay the same.
    """
    if wanted != "auto":
        return wanted, "as asked for"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg", "/dev/kvm is missing, or this user may not use it"
    path = cache_dir / "accelerator.json"
    key = _key(kernel)
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = json.loads(path.read_text())
        if known["key"] == key:
            return str(known["accel"]), str(known["reason"])
    accel, reason = _probe(kernel)
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"key": key, "accel": accel, "reason": reason}))
    temporary.replace(path)
    return accel, reason


def has_steady_tsc(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Say whether this machine's TSC counts at a constant rate in every state of its processors."""
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return _STEADY_TSC.issubset(value.split())
    return False


def has_kernel_vsock() -> bool:
    """Say whether the kernel can serve vsock to machines (vhost-vsock)."""
    import fcntl

    try:
        fd = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.ioctl(fd, _VHOST_GET_FEATURES, bytes(8))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _key(kernel: Path) -> str:
    version = subprocess.run(
        [qemu_program(), "--version"], capture_output=True, check=True, timeout=30
    ).stdout
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    state = kernel.stat()
    text = repr((version, boot_id, str(kernel), state.st_size, state.st_mtime_ns))
    return hashlib.sha256(text.encode()).hexdigest()


def _probe(kernel: Path) -> tuple[str, str]:
    """Boot the kernel without a root: KVM works if the kernel says that it cannot mount one."""
    with tempfile.TemporaryDirectory(prefix="guestagent-kvm-") as name:
        console, initrd = Path(name, "console"), Path(name, "initrd")
        archive = io.BytesIO()
        write_cpio(archive, ())
        initrd.write_bytes(archive.getvalue())
        argv = [qemu_program(), "-nodefaults", "-no-user-config", "-display", "none"]
        argv += ["-no-reboot", "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256"]
        argv += ["-kernel", str(kernel), "-initrd", str(initrd), "-serial", f"file:{console}"]
        argv += ["-append", "console=ttyS0 panic=-1"]
        try:
            result = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "tcg", f"KVM does not work here: no end of a test boot in {_PROBE_SECONDS:g} s"
        if console.exists() and b"Unable to mount root fs" in console.read_bytes():
            return "kvm", "a test boot with KVM worked"
        error = result.stderr.decode(errors="replace").strip().splitlines()[:1]
        return "tcg", f"KVM does not work here: {error[0] if error else 'QEMU ended early'}"
