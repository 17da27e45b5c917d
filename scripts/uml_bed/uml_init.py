"""PID 1 inside User Mode Linux: makes a throw-away root, runs one command, powers off.

Started by the kernel as ``python3 -I -S -B uml_init.py CONFIG``, on the host's own root directory
mounted read-only. ``scripts.uml_bed.uml`` writes CONFIG (a marshalled dict) and holds the other
ends of the consoles: console 0 is this process's output (and the kernel's), 1 the command's output,
2 its errors, and on console 3 this process reports (a line ``ready``, a line ``status N``) and sees
a hang-up when the host is gone.
"""

import ctypes
import fcntl
import marshal
import os
import select
import signal
import struct
import sys
import termios

TYPE_CHECKING = False  # this process starts for every run: what it does not import is time saved
if TYPE_CHECKING:
    from types import TracebackType
    from typing import NoReturn

# linux/mount.h, linux/reboot.h, asm/unistd_64.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND = 1, 2, 4, 4096
MNT_DETACH = 2
SYS_PIVOT_ROOT, SYS_FINIT_MODULE = 155, 313
POWER_OFF = 0x4321FEDC
# linux/sockios.h, linux/if.h
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

_CHUNK_BYTES = 4096
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Boot, run the command, report its status and power off. Never returns."""
    sys.excepthook = _report_and_power_off
    with open(sys.argv[1], "rb") as file:
        config = marshal.load(file)
    _mount("devtmpfs", "/dev", "devtmpfs", may_be_there=True)
    _mount("proc", "/proc", "proc", may_be_there=True)
    channel = _open_console(3)
    _load_modules(config["modules"])
    _enter_overlay(config["scratch"])
    _mount_api_file_systems(config["keep"])
    for path in config["make"]:
        os.makedirs(path, exist_ok=True)
    _bind(config["binds"])
    _link_modules(config["modules_dir"])
    _bring_up_loopback()
    _report(channel, "ready")
    status = _run_command(config, channel)
    _report(channel, f"status {status}")
    os.sync()
    _power_off()


def _report_and_power_off(
    kind: type[BaseException], value: BaseException, trace: "TracebackType | None"
) -> None:
    """Print what went wrong; PID 1 must not exit, or the kernel panics and hides the cause."""
    import traceback

    traceback.print_exception(kind, value, trace)
    sys.stderr.flush()
    _power_off()


def _power_off() -> "NoReturn":
    _libc.reboot(POWER_OFF)
    os._exit(1)  # reached only when reboot(2) is refused; the panic that follows ends the kernel


def _check(result: int, step: str, path: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{step}: {os.strerror(number)}", path)


def _mount(
    source: str,
    target: str,
    kind: str | None,
    flags: int = 0,
    options: str = "",
    *,
    may_be_there: bool = False,
) -> None:
    result = _libc.mount(
        source.encode(),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        os.fsencode(options) or None,
    )
    if may_be_there and result < 0 and ctypes.get_errno() == 16:  # EBUSY: the kernel mounted it
        return
    _check(result, f"mount {kind or 'bind'}", target)


def _load_modules(paths: list[str]) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        result = _libc.syscall(SYS_FINIT_MODULE, fd, b"", 0)
        os.close(fd)
        if result < 0 and ctypes.get_errno() != 17:  # EEXIST: loaded already
            _check(result, "load module", path)


def _enter_overlay(scratch: str) -> None:
    """Put an overlay over the host's root, all writes in memory, and make it the root."""
    _mount("scratch", scratch, "tmpfs", 0, "mode=0755,size=75%")
    upper, work, root = (f"{scratch}/{name}" for name in ("upper", "work", "root"))
    for directory in (upper, work, root):
        os.mkdir(directory, 0o755)
    options = f"lowerdir=/,upperdir={upper},workdir={work}"
    _mount("overlay", root, "overlay", 0, options)
    os.chdir(root)
    _check(_libc.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root", root)
    # the old root now lies over the new one: drop it, so that nothing reaches the host by it
    _check(_libc.umount2(b".", MNT_DETACH), "unmount the old root", "/")
    os.chdir("/")


def _mount_api_file_systems(keep: list[str]) -> None:
    """Mount /proc, /sys, /dev and the memory file systems.

    ``keep`` are directories below /tmp or /run that the command needs (its checkout, for one):
    they are carried over into the empty ones. /tmp must not be on the overlay, because an overlay
    cannot be the upper layer of another.
    """
    held = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in keep]
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)
    _mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV)
    _mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID)
    for directory, options in (
        ("/dev/shm", "mode=1777"),
        ("/run", "mode=0755"),
        ("/tmp", "mode=1777,size=75%"),
    ):
        os.makedirs(directory, exist_ok=True)
        _mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.makedirs("/dev/pts", exist_ok=True)
    _mount("devpts", "/dev/pts", "devpts", MS_NOSUID, "mode=0620,ptmxmode=0666")
    for path, fd in held:
        os.makedirs(path, exist_ok=True)
        _mount(f"/proc/self/fd/{fd}", path, None, MS_BIND)
        os.close(fd)


def _bind(directories: list[str]) -> None:
    """Make directories of the host writable: each is a mount of the host's own file system."""
    for directory in directories:
        os.makedirs(directory, exist_ok=True)
        _mount("host", directory, "hostfs", MS_NOSUID | MS_NODEV, directory)


def _link_modules(modules_dir: str) -> None:
    """Let modprobe, and with it the kernel's own requests, find the modules."""
    os.makedirs("/lib/modules", exist_ok=True)
    link = f"/lib/modules/{os.uname().release}"
    if not os.path.lexists(link):
        os.symlink(modules_dir, link)


def _bring_up_loopback() -> None:
    import _socket  # the module socket builds enums that nothing here needs

    _socket.sethostname("uml")
    control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    answer = fcntl.ioctl(control.fileno(), SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
    flags = struct.unpack_from("16sh", answer)[1] | IFF_UP
    fcntl.ioctl(control.fileno(), SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags))
    control.close()


def _open_console(number: int) -> int:
    """Open a console and take all processing of characters off it."""
    fd = os.open(f"/dev/tty{number}", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    attributes = termios.tcgetattr(fd)
    attributes[0] = attributes[1] = attributes[3] = 0
    attributes[2] = (attributes[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
    attributes[6][termios.VMIN], attributes[6][termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSANOW, attributes)
    return fd


def _report(channel: int, line: str) -> None:
    _write(channel, line.encode() + b"\n")
    termios.tcdrain(channel)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _run_command(config: dict[str, object], channel: int) -> int:
    """Run the command to its end; return its status as a shell would give it."""
    if config["terminal"]:
        pid = _spawn_on_terminal(config)
        pumps: dict[int, int] = {}
    else:
        pid, pumps = _spawn_on_pipes(config)
    _wait(pid, pumps, channel)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code if code >= 0 else 128 - code


def _spawn_on_pipes(config: dict[str, object]) -> tuple[int, dict[int, int]]:
    """Start the command; return its pid and the pipes to copy to which console."""
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    err_read, err_write = os.pipe2(os.O_CLOEXEC)
    stdin = os.open(str(config["stdin"]), os.O_RDONLY | os.O_CLOEXEC)
    pumps = {out_read: _open_console(1), err_read: _open_console(2)}
    pid = os.fork()
    if pid == 0:
        _exec(config, (stdin, out_write, err_write))
    for fd in (stdin, out_write, err_write):
        os.close(fd)
    return pid, pumps


def _spawn_on_terminal(config: dict[str, object]) -> int:
    size = config["terminal"]
    assert isinstance(size, list)
    terminal = os.open("/dev/tty1", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
    pid = os.fork()
    if pid == 0:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        _exec(config, (terminal, terminal, terminal))
    return pid


def _exec(config: dict[str, object], descriptors: tuple[int, int, int]) -> "NoReturn":
    """Become the command. A failure is told as a shell tells it: 127 not found, 126 not allowed."""
    argv, env = config["argv"], config["env"]
    assert isinstance(argv, list)
    assert isinstance(env, dict)
    for number, fd in enumerate(descriptors):
        os.dup2(fd, number)
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signum, signal.SIG_DFL)  # Python ignores these
    try:
        os.chdir(str(config["cwd"]))
        os.execvpe(argv[0], argv, env)
    except OSError as problem:
        os.write(2, f"uml: cannot run {argv[0]!r}: {problem.strerror}\n".encode())
        os._exit(127 if isinstance(problem, FileNotFoundError) else 126)


def _wait(pid: int, pumps: dict[int, int], channel: int) -> None:
    """Copy output until the command has ended and what it had written has been passed on.

    Processes that it left behind may hold the pipes open: they are not waited for.
    """
    ended = os.pidfd_open(pid)
    poller = select.poll()
    for fd in (ended, channel, *pumps):
        poller.register(fd, select.POLLIN)
    ready: set[int] = set()
    while ended not in ready:
        ready = {fd for fd, _ in poller.poll()}
        if channel in ready:
            raise EOFError("the host end of the console is gone")
        for fd in ready & pumps.keys():
            if not _copy(fd, pumps[fd], _CHUNK_BYTES):
                poller.unregister(fd)
    os.close(ended)
    for fd, console in pumps.items():
        waiting_bytes = fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0")
        _copy(fd, console, int.from_bytes(waiting_bytes, sys.byteorder))
        termios.tcdrain(console)


def _copy(source: int, sink: int, at_most_bytes: int) -> bool:
    """Copy what is there; say whether more can come."""
    data = os.read(source, at_most_bytes)
    _write(sink, data)
    return bool(data)


if __name__ == "__main__":
    main()
