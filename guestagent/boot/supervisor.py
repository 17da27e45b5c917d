"""Keeps the agent alive in a child of PID 1: started again when it dies, ended when asked.

Needs no PID 1, so that it can be tried anywhere: it forks, reaps, and waits for signals. The caller
has the ``SIGNALS`` blocked, in every thread, for as long as this runs.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable

import guestagent.agent as agent
from vsock.log import log

__all__ = ("SIGNALS", "Life", "start", "supervise")

SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGPWR)

#: Pauses before the next start, by how many lives in a row were short: of an agent that never came
#: to serve, and of one that did, whose layers somebody is waiting for.
_PAUSES_SECONDS = (0.0, 0.0, 0.1, 0.5, 1.0, 2.0)
_PAUSES_AFTER_SERVICE_SECONDS = (0.0, 0.0, 0.0, 0.05)
#: A life of this length ends the row.
_HEALTHY_SECONDS = 2.0
#: What an agent gets for unmounting everything before the machine ends without it.
_END_SECONDS = 25.0

#: Runs one life: gets the number of lives before, and what to call when it serves; returns its
#: exit status.
Life = Callable[[int, Callable[[], None]], int]


def supervise(life: Life, on_death: Callable[[int, int], None] | None = None) -> str:
    """Run one life after the other until one, or a signal, says how to end; returns the mode.

    ``on_death`` is told the pid and the exit status (negative: the signal) of each life that ends.
    """
    restarts = 0
    short_lives = 0
    while True:
        began = time.monotonic()
        child, ready_fd = start(life, restarts)
        try:
            mode = _wait_for(child, on_death)
            if mode is not None:
                return mode
            served = os.read(ready_fd, 1) != b""
        finally:
            os.close(ready_fd)
        short_lives = 0 if time.monotonic() - began > _HEALTHY_SECONDS else short_lives + 1
        restarts += 1
        pauses = _PAUSES_AFTER_SERVICE_SECONDS if served else _PAUSES_SECONDS
        pause = pauses[min(short_lives, len(pauses) - 1)]
        log.error("the agent died and is started again", restarts=restarts, pause_seconds=pause)
        mode = _signalled_within(pause)
        if mode is not None:
            return mode


def start(life: Life, restarts: int) -> tuple[int, int]:
    """Begin a life; return the child, and what holds a byte once it serves, or ends without."""
    ready_fd, ready_there = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child:
        os.close(ready_there)
        return child, ready_fd
    status = agent.EXIT_FAILED
    try:
        os.close(ready_fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        status = life(restarts, lambda: _tell(ready_there))
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
