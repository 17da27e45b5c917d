"""PID 1 of a utility VM: boots what ``guestagent.boot.early`` began, supervises the agent, ends.

PID 1 itself does little, so that little can fail: it runs the agent in a child, reaps orphans,
starts the agent again when it dies, and powers the machine off when the agent says so. An error in
PID 1 powers the machine off, so that the kernel does not panic.
"""

import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable

import guestagent.agent as agent
from guestagent.boot.modules import Loading, load_module
from guestagent.boot.plan import BootPlan
from guestagent.boot.root import enter_root, mount_root
from guestagent.boot.supervisor import SIGNALS, RunAgent, start, supervise
from guestagent.boot.switch import exec_init
from guestagent.config import Config, Problem, machine_settings
from guestagent.listeners import HeldSockets
from guestagent.observe.crashes import note_death
from guestagent.observe.sinks import open_sinks
from guestagent.policy.binding.keeper import PolicyKeeper
from guestagent.policy.gate import Gate
from guestagent.storage import syscalls
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.log import fd_sink, log

__all__ = ("main",)

# linux/sockios.h, linux/if.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1

_MODULES_SECONDS = 60.0


def main(loading: Loading | OSError) -> None:
    """Run as PID 1, with what ``guestagent.boot.early`` has begun. Never returns."""
    try:
        _end(_boot_and_supervise(loading))
    except BaseException as error:  # PID 1 must never end: the kernel would panic
        import traceback

        log.error("init failed", error=str(error), traceback=traceback.format_exc())
        _end("poweroff")


def _boot_and_supervise(loading: Loading | OSError) -> str:
    steps = {"imported_uptime_ms": _uptime_ms()}
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _open_console()
    try:
        if isinstance(loading, OSError):
            raise loading
        config, problems = machine_settings()
    except OSError:  # without settings the log goes to the console
        log.add_sink(fd_sink(2), replay=True)
        raise
    open_sinks(config, is_machine=True)
    since = time.perf_counter()
    told, steps["modules_ms"] = loading.finish(_MODULES_SECONDS)
    steps["modules_wait_ms"] = round((time.perf_counter() - since) * 1000, 3)
    problems += tuple(Problem(key="modules", text=text, fatal=False) for text in told)
    problems += _load_modules(config.modules)
    _bring_up_loopback()
    if config.rcu_expedited:
        _expedite_rcu()
    for problem in problems:
        log.error("bad setting", key=problem.key, problem=problem.text)
    if any(problem.fatal for problem in problems):
        log.error("a setting that guards security is wrong: powering off")
        return "poweroff"
    try:
        policy = PolicyKeeper(config.policy, is_held=True, faults=config.fault)
    except (CallError, OSError) as error:
        log.error("there is no policy to go by: powering off", error=str(error))
        return "poweroff"
    boot: dict[str, object] = {"pid1": True, **steps}
    boot["init_uptime_ms"] = _uptime_ms()
    try:
        plan = mount_root(config, boot, policy.gate)
    except (CallError, OSError) as error:
        log.error("the root cannot be mounted", error=str(error), then=config.on_failure)
        if config.on_failure != "serve":
            return config.on_failure
        text = f"the root cannot be mounted: {error}"
        problems += (Problem(key="guestagent.layer", text=text, fatal=False),)
        plan = None
    problems += _set_up_network(
        config, "/" if plan is None else plan.root_target, boot, policy.gate
    )
    if plan is not None:
        _become_init(plan, config, problems, boot, policy)
    sockets = HeldSockets((*config.listen, *config.console))

    def on_death(pid: int, status: int) -> None:
        note_death(config.state_directory, pid, status)
        sockets.open_missing()

    return supervise(_agent_of(config, problems, boot, sockets, policy), on_death)


def _set_up_network(
    config: Config, root: str, boot: dict[str, object], gate: Gate
) -> tuple[Problem, ...]:
    """Do what ``guestagent.net=`` says, with the files in the root that is to be. The boot goes on
    where that fails: the host can still reach the agent, whose status tells of it."""
    if not config.net:
        return ()
    from guestagent.api.nettexts import network_from_texts
    from guestagent.net.network import configure_network

    begin = time.perf_counter()
    try:
        with Deadline(config.deadline_seconds) as deadline:
            request = network_from_texts(config.net)
            configure_network(
                request,
                config.state_directory,
                deadline,
                gate.request(request.method, request),
                faults=config.fault,
                root=root,
            )
    except (CallError, ValueError) as error:
        log.error("the network cannot be set up", error=str(error))
        text = f"the network cannot be set up: {error}"
        return (Problem(key="guestagent.net", text=text, fatal=False),)
    finally:
        boot["network_ms"] = round((time.perf_counter() - begin) * 1000, 3)
    return ()


def _become_init(
    plan: BootPlan,
    config: Config,
    problems: tuple[Problem, ...],
    boot: dict[str, object],
    policy: PolicyKeeper,
) -> None:
    """Switch to the root that is mounted and execute its init, with the agent beside it if asked.

    Does not return; an error on the way ends the machine.
    """
    enter_root(plan, config, boot)
    if config.agent == "stay":
        sockets = HeldSockets((*config.listen, *config.console))
        start(_agent_of(config, problems, {**boot, "pid1": False}, sockets, policy), 0)
    # what the kernel did not understand of its command line is for the init: a run level
    exec_init(config.init, tuple(sys.argv[1:]))


def _agent_of(
    config: Config,
    problems: tuple[Problem, ...],
    boot: dict[str, object],
    sockets: HeldSockets,
    policy: PolicyKeeper,
) -> RunAgent:
    def run_agent(restarts: int, on_ready: Callable[[], None]) -> int:
        return agent.run(
            config,
            problems=problems,
            boot=boot,
            restarts=restarts,
            on_ready=on_ready,
            sockets=sockets,
            policy=policy,
        )

    return run_agent


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


def _load_modules(paths: tuple[str, ...]) -> tuple[Problem, ...]:
    """Load the modules that a setting names, beside those of the boot image."""
    problems: list[Problem] = []
    for path in paths:
        try:
            load_module(path, {})
        except OSError as error:
            text = f"module {path}: {error.strerror or error}"
            problems.append(Problem(key="modules", text=text, fatal=False))
    return tuple(problems)


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


def _uptime_ms() -> float:
    return round(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000, 1)


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
