"""PID 1 of a utility VM: mounts the API file systems, loads modules, supervises the agent, ends.

PID 1 itself does little, so that it cannot fail: it starts the agent in a child, reaps whatever
is orphaned, starts the agent again when it dies, and powers the machine off when the agent says
so. Whatever happens here, the kernel is not left to panic: the last resort is a power-off.
"""

import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from functools import partial

import guestagent.agent as agent
from guestagent.boot.plan import BootPlan
from guestagent.boot.root import enter_root, mount_root
from guestagent.boot.switch import exec_init
from guestagent.config import Config, Problem, parse_command_line, read_settings
from guestagent.observe.crashes import note_death
from guestagent.observe.sinks import open_sinks
from guestagent.storage import syscalls
from guestagent.supervisor import SIGNALS, Life, start, supervise
from vsock.errors import CallError
from vsock.log import fd_sink, log

__all__ = ("main",)

MODULE_LIST = "/etc/guestagent/modules"

_MOUNTS = (
    # source, target, type, flags, options; what is there already (an outer init's) stays
    ("proc", "/proc", "proc", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC, ""),
    ("sysfs", "/sys", "sysfs", syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC, ""),
    ("devtmpfs", "/dev", "devtmpfs", syscalls.MS_NOSUID, "mode=0755"),
    ("tmpfs", "/run", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=1777"),
    ("devpts", "/dev/pts", "devpts", syscalls.MS_NOSUID | syscalls.MS_NOEXEC, "ptmxmode=0666"),
)

# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def main() -> None:
    """Run as PID 1. Never returns."""
    try:
        _end(_boot_and_supervise())
    except BaseException as error:  # PID 1 must never end: the kernel would panic
        import traceback

        log.error("init failed", error=str(error), traceback=traceback.format_exc())
        _end("poweroff")


def _boot_and_supervise() -> str:
    begin = time.perf_counter()
    steps: dict[str, float] = {}
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _mount_api_filesystems()
    _open_console()
    steps["api_filesystems_ms"] = _ms_since(begin)
    try:
        config, problems = _configuration()
    except OSError:  # nobody can say where the log goes: to the console
        log.add_sink(fd_sink(2), replay=True)
        raise
    open_sinks(config, is_machine=True)
    begin = time.perf_counter()
    problems += _load_modules(config.modules)
    steps["modules_ms"] = _ms_since(begin)
    _bring_up_loopback()
    if config.rcu_expedited:
        _expedite_rcu()
    for problem in problems:
        log.error("bad setting", key=problem.key, problem=problem.text)
    if any(problem.fatal for problem in problems):
        log.error("a setting that guards security is wrong: powering off")
        return "poweroff"
    boot: dict[str, object] = {"pid1": True, "boot_id": _boot_id(), **steps}
    boot["init_uptime_ms"] = round(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000, 1)
    try:
        plan = mount_root(config, boot)
    except (CallError, OSError) as error:
        log.error("the root cannot be mounted", error=str(error), then=config.on_failure)
        if config.on_failure != "serve":
            return config.on_failure
        text = f"the root cannot be mounted: {error}"
        problems += (Problem(key="guestagent.layer", text=text, fatal=False),)
        plan = None
    if plan is not None:
        _become_init(plan, config, problems, boot)
    on_death = partial(note_death, config.state_directory)
    return supervise(_life_of(config, problems, boot), on_death)


def _become_init(
    plan: BootPlan, config: Config, problems: tuple[Problem, ...], boot: dict[str, object]
) -> None:
    """Switch to the root that is mounted and execute its init, with the agent beside it if asked.

    Does not return; an error on the way ends the machine.
    """
    enter_root(plan, config, boot)
    if config.agent == "stay":
        start(_life_of(config, problems, {**boot, "pid1": False}), 0)
    # what the kernel did not understand of its command line is for the init: a run level
    exec_init(config.init, tuple(sys.argv[1:]))


def _life_of(config: Config, problems: tuple[Problem, ...], boot: dict[str, object]) -> Life:
    def life(restarts: int, on_ready: Callable[[], None]) -> int:
        return agent.run(config, problems=problems, boot=boot, restarts=restarts, on_ready=on_ready)

    return life


def _mount_api_filesystems() -> None:
    for source, target, kind, flags, options in _MOUNTS:
        os.makedirs(target, mode=0o755, exist_ok=True)
        try:
            syscalls.mount(source, target, kind, flags, options)
        except OSError as error:
            # EBUSY: the kernel has mounted devtmpfs by itself
            log.debug("not mounted", target=target, error=str(error))


def _open_console() -> None:
    """Put the console on the standard descriptors, where the kernel could not."""
    try:
        fd = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
    except OSError:
        fd = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        if fd != standard:
            os.dup2(fd, standard)
    if fd > 2:
        os.close(fd)


def _configuration() -> tuple[Config, tuple[Problem, ...]]:
    with open("/proc/cmdline", encoding="utf-8", errors="replace") as stream:
        return read_settings(parse_command_line(stream.read()))


def _load_modules(extra: tuple[str, ...]) -> tuple[Problem, ...]:
    """Load the modules that the initramfs lists, in its order, then those asked for by path."""
    problems: list[Problem] = []
    parameters = _module_parameters()
    for path in (*_module_list(), *extra):
        try:
            _load_module(path, parameters.get(_module_name(path), ""))
        except OSError as error:
            text = f"module {path}: {error.strerror or error}"
            problems.append(Problem(key="modules", text=text, fatal=False))
    return tuple(problems)


def _module_list() -> tuple[str, ...]:
    try:
        with open(MODULE_LIST, encoding="utf-8") as stream:
            return tuple(line.strip() for line in stream if line.strip())
    except FileNotFoundError:
        return ()


def _module_parameters() -> dict[str, str]:
    """Return what the kernel's command line says for each module, as MODULE.NAME=VALUE: the kernel
    heeds that for what is built in and leaves the rest to whoever loads modules."""
    with open("/proc/cmdline", encoding="utf-8", errors="replace") as stream:
        words = stream.read().split()
    found: dict[str, str] = {}
    for word in words:
        module, dot, parameter = word.partition(".")
        if dot and parameter and "=" not in module:
            name = module.replace("-", "_")
            found[name] = f"{found.get(name, '')} {parameter}".lstrip()
    return found


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _load_module(path: str, parameters: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.finit_module(fd, parameters, filename=path)
    except FileExistsError:
        return
    finally:
        os.close(fd)


def _bring_up_loopback() -> None:
    """Set IFF_UP on ``lo`` by ioctl: netlink would cost a library for one bit."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH14x", b"lo", 0)
        try:
            flags = struct.unpack_from("16sH", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
            fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))
        except OSError as error:
            log.warning("lo is not up", error=str(error))


def _expedite_rcu() -> None:
    """Removing a dm device waits for RCU grace periods, 40 ms each under an emulated CPU; in a VM
    whose one job is to mount and unmount, the extra interrupts of hurrying are the better price."""
    try:
        with open("/sys/kernel/rcu_expedited", "w", encoding="ascii") as stream:
            stream.write("1")
    except OSError as error:
        log.debug("rcu_expedited cannot be set", error=str(error))


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
        return stream.read().strip()


def _ms_since(begin: float) -> float:
    return round((time.perf_counter() - begin) * 1000, 3)


def _end(mode: str) -> None:
    """Write everything out and end the machine."""
    log.info("ending", mode=mode)
    os.sync()
    if os.getpid() != 1:
        sys.exit(0 if mode == "poweroff" else 1)
    command = {
        "reboot": syscalls.LINUX_REBOOT_CMD_RESTART,
        "poweroff": syscalls.LINUX_REBOOT_CMD_POWER_OFF,
    }.get(mode, syscalls.LINUX_REBOOT_CMD_POWER_OFF)
    syscalls.reboot(command)


if __name__ == "__main__":
    main()
