"""Runs the agent in a child of PID 1: starts it again when it dies, and ends it when asked.

It forks, reaps and waits for signals, which works in a process other than PID 1, too. The caller
blocks the ``SIGNALS`` in every thread for as long as this runs.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable

import guestagent.agent as agent
from vsock.log import log

__all__ = ("SIGNALS", "RunAgent", "start", "supervise")

SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGPWR)

#: Restart delay after N quick failures: before, and after, the agent was serving.
_PAUSES_SECONDS = (0.0, 0.0, 0.1, 0.5, 1.0, 2.0)
_PAUSES_AFTER_SERVICE_SECONDS = (0.0, 0.0, 0.0, 0.05)
#: An agent that ran for so long did not fail quickly.
_HEALTHY_SECONDS = 2.0
#: What an agent gets for unmounting everything before the machine ends without it.
_END_SECONDS = 25.0

#: Runs an agent in the child: gets the number of restarts, and a function to call when it serves;
#: returns the exit status.
RunAgent = Callable[[int, Callable[[], None]], int]


def supervise(run_agent: RunAgent, on_death: Callable[[int, int], None] | None = None) -> str:
    """Run agents, one after another, until one of them or a signal ends the machine; return how.

    ``on_death`` gets the pid and the exit status (negative: the signal) of each agent that ends.
    """
    restarts = 0
    quick_failures = 0
    while True:
        began = time.monotonic()
        child, ready_fd = start(run_agent, restarts)
        try:
            mode = _wait_for(child, on_death)
            if mode is not None:
                return mode
            served = os.read(ready_fd, 1) != b""
        finally:
            os.close(ready_fd)
        quick_failures = 0 if time.monotonic() - began > _HEALTHY_SECONDS else quick_failures + 1
        restarts += 1
        pauses = _PAUSES_AFTER_SERVICE_SECONDS if served else _PAUSES_SECONDS
        pause = pauses[min(quick_failures, len(pauses) - 1)]
        log.error("the agent died and is started again", restarts=restarts, pause_seconds=pause)
        mode = _signalled_within(pause)
        if mode is not None:
            return mode


def start(run_agent: RunAgent, restarts: int) -> tuple[int, int]:
    """Fork an agent; return its pid, and a descriptor that holds a byte once the agent serves, and
    is at its end if the agent has ended before."""
    ready_fd, ready_there = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child:
        os.close(ready_there)
        return child, ready_fd
    status = agent.EXIT_FAILED
    try:
        os.close(ready_fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        status = run_agent(restarts, lambda: _tell(ready_there))
    except BaseException:  # a child that fails to start must not run on as a second init
        import traceback

        log.error("agent failed", traceback=traceback.format_exc())
    finally:
        os._exit(status)


def _tell(fd: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent became another program meanwhile
        os.write(fd, b"1")


def _wait_for(child: int, on_death: Callable[[int, int], None] | None) -> str | None:
    """Reap until ``child`` ends or a signal ends the machine; None asks for another child."""
    while True:
        got = signal.sigwaitinfo(SIGNALS)
        if got.si_signo != signal.SIGCHLD:
            log.info("signal", number=got.si_signo)
            _end(child)
            return _mode_of(got.si_signo)
        ended = _reap(child)
        if ended is not None:
            log.info("the agent ended", status=ended)
            if on_death is not None:
                on_death(child, ended)
            return agent.MODES.get(ended)


def _end(child: int) -> None:
    """Let the agent unmount what it has and end by itself, for as long as that may take."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)
    ends_at = time.monotonic() + _END_SECONDS
    while _reap(child) is None:
        seconds = ends_at - time.monotonic()
        if seconds <= 0 or signal.sigtimedwait({signal.SIGCHLD}, seconds) is None:
            log.error("the agent does not end", seconds=_END_SECONDS)
            os.kill(child, signal.SIGKILL)
            return


def _reap(child: int) -> int | None:
    """Reap every process that has ended; return the child's exit status if it is among them."""
    ended = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        if pid == child:
            ended = os.waitstatus_to_exitcode(status)


def _signalled_within(seconds: float) -> str | None:
    got = signal.sigtimedwait(set(SIGNALS) - {signal.SIGCHLD}, seconds)
    return None if got is None else _mode_of(got.si_signo)


def _mode_of(number: int) -> str:
    return "reboot" if number == signal.SIGINT else "poweroff"
