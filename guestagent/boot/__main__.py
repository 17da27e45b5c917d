"""Mount the root inside a distribution's own initramfs, once, and leave the rest to it.

    python3 -I -S -m guestagent.boot --target DIRECTORY

(there as the command ``guestagent-mount-root``). The settings are those of the kernel command
line. When this returns with status 0, the root is mounted at DIRECTORY, layers and journal are
below /run, and an agent that is started in the new system adopts them. On a failure the machine
ends here, as ``guestagent.on_failure`` says; only with ``serve`` does the distribution get to
decide, by status 1.
"""

import contextlib
import os
import sys

from guestagent.boot.root import mount_root
from guestagent.boot.switch import rename_root
from guestagent.config import Config, machine_settings
from guestagent.policy.binding.keeper import PolicyKeeper
from guestagent.storage import syscalls
from vsock.errors import CallError
from vsock.log import fd_sink, log

__all__ = ("main", "mount_at")

_USAGE_STATUS = 2
_HALT = {
    "poweroff": syscalls.LINUX_REBOOT_CMD_POWER_OFF,
    "reboot": syscalls.LINUX_REBOOT_CMD_RESTART,
}


def main(arguments: list[str]) -> int:
    """Run the command; return its status, or end the machine."""
    if len(arguments) != 2 or arguments[0] != "--target" or not arguments[1].startswith("/"):
        os.write(2, b"usage: guestagent-mount-root --target DIRECTORY\n")
        return _USAGE_STATUS
    log.add_sink(fd_sink(2), replay=True)
    config, problems = machine_settings()
    log.set_level(config.log)
    for problem in problems:
        log.error("bad setting", key=problem.key, problem=problem.text)
    if any(problem.fatal for problem in problems):
        log.error("a setting that guards security is wrong: powering off")
        return _fail("poweroff")
    try:
        mount_at(arguments[1], config)
    except (CallError, OSError) as error:
        log.error("the root cannot be mounted", error=str(error), then=config.on_failure)
        return _fail(config.on_failure)
    return 0


def mount_at(target: str, config: Config) -> None:
    """Mount what the settings name at ``target``.

    Raises:
        CallError, OSError: something is missing, unverified or contradictory.
    """
    if config.init == "/":
        raise _contradiction("init=/ would stay in a boot image that is not the agent's")
    if config.agent == "stay":
        raise _contradiction("agent=stay: here the system starts its agent, which adopts the root")
    if config.net:
        raise _contradiction("net=: here the system sets up its network")
    policy = PolicyKeeper(config.policy, is_held=False, faults=config.fault)
    plan = mount_root(config, {}, policy.gate)
    if plan is None:
        raise _contradiction("no guestagent.layer= and no guestagent.manifest= names a root")
    # a mount that lies below a shared one cannot be moved (systemd shares all)
    parent = os.path.dirname(plan.root_target)
    while not os.path.ismount(parent):
        parent = os.path.dirname(parent)
    with contextlib.suppress(OSError):
        syscalls.mount("", parent, "", syscalls.MS_PRIVATE, "")
    syscalls.mount(plan.root_target, target, "", syscalls.MS_MOVE, "")
    rename_root(config.state_directory, plan.root_target)
    log.info("the root is mounted", target=target, layers=len(plan.layers))


def _contradiction(text: str) -> CallError:
    return CallError("invalid", text, step="plan boot")


def _fail(mode: str) -> int:
    if mode in _HALT:
        os.sync()
        syscalls.reboot(_HALT[mode])
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
