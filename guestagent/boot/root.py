"""The way from settings to a root that can be switched to, or to a clear refusal."""

import errno
import os
import signal
import time
from collections.abc import Callable

from guestagent.boot.mounting import mount_plan
from guestagent.boot.plan import BootPlan, plan_boot
from guestagent.boot.switch import check_root, keep_modules, move_out, rename_root, switch_root
from guestagent.config import Config
from guestagent.policy.gate import Gate
from guestagent.storage.filesystems import has_flattened_erofs
from vsock.errors import CallError
from vsock.log import log

__all__ = ("enter_root", "mount_root")

_NEW_ROOT = "/newroot"
#: What a child that mounts gets beyond its deadline, to undo what it has made.
_UNDO_SECONDS = 15.0


def mount_root(config: Config, boot: dict[str, object], gate: Gate) -> BootPlan | None:
    """Mount what the settings name; return what to switch to, or None to stay in the boot image.

    ``boot`` gets ``root_ms``.

    Raises:
        CallError, OSError: something is missing, unverified or contradictory.
    """
    plan = plan_boot(
        config.layers,
        config.overlay,
        config.manifests,
        flattens_erofs=bool(config.manifests) and has_flattened_erofs(),
    )
    if plan is None:
        return None
    begin = time.perf_counter()
    _in_a_child(lambda: mount_plan(plan, config, gate), "mounting", config.deadline_seconds)
    boot["root_ms"] = round((time.perf_counter() - begin) * 1000, 3)
    if config.init == "/":
        return None
    check_root(plan.root_target, config.init)
    return plan


def enter_root(plan: BootPlan, config: Config, boot: dict[str, object]) -> None:
    """Make what is mounted the root of this process.

    From the first move on there is no way back; an error here ends the machine.
    """
    if config.agent == "stay":
        keep_modules(config.state_directory)
    move_out(plan.root_target, _NEW_ROOT)
    rename_root(config.state_directory, plan.root_target)
    switch_root(_NEW_ROOT)
    boot["switch_root_uptime_ms"] = round(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000, 1)
    log.info("switching to the root", init=config.init, agent=config.agent)


def _in_a_child(work: Callable[[], None], what: str, seconds: float) -> None:
    """Do ``work`` in a process of its own, so that no thread or descriptor of it stays here.

    ``work`` has a deadline of its own; a process that outlives it hangs in the kernel.

    Raises:
        OSError: it failed; its own log lines say why. ETIMEDOUT: it hangs.
    """
    was_blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
    try:
        status = _wait(_start(work, what), seconds + _UNDO_SECONDS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, was_blocked)
    if status is None:
        raise OSError(errno.ETIMEDOUT, f"{what} hangs in the kernel")
    if status != 0:
        raise OSError(errno.EIO, f"{what} failed; the lines above say why")


def _start(work: Callable[[], None], what: str) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except (CallError, OSError) as error:
        log.error("failed", what=what, error=str(error), hint=getattr(error, "hint", None))
    except BaseException:  # whatever it is, it must not run on as a second parent
        import traceback

        log.error("failed", what=what, traceback=traceback.format_exc())
    finally:
        os._exit(status)


def _wait(child: int, seconds: float) -> int | None:
    """Return the status of a child, None if it has to be killed. SIGCHLD is blocked."""
    until = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        left = max(0.0, until - time.monotonic())
        if signal.sigtimedwait((signal.SIGCHLD,), left) is None:
            os.kill(child, signal.SIGKILL)
            return None
