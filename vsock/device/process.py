"""Start the device as a process of its own, and end that very process."""

import os
import select
import subprocess
import sys
from pathlib import Path

from vsock.closeable import Closeable

__all__ = ("DeviceError", "DeviceProcess", "start_device")

_START_SECONDS = 20.0
_STOP_SECONDS = 5.0


class DeviceError(Exception):
    """The device did not come up."""


class DeviceProcess(Closeable):
    """A running device: both sockets listen. A context manager; ``close`` is idempotent."""

    def __init__(self, process: "subprocess.Popen[bytes]", socket_path: str, uds_path: str) -> None:
        self._process = process
        #: Where the virtual machine connects.
        self.socket_path = socket_path
        #: Where host peers connect; also the prefix of the sockets that guests reach.
        self.uds_path = uds_path

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end (``once``); raises subprocess.TimeoutExpired."""
        return self._process.wait(timeout)

    def close(self) -> None:
        """End the process and see to it that its sockets are gone."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.returncode < 0:
            # A signal ended it before it could clean up after itself.
            for path in (self.socket_path, self.uds_path):
                Path(path).unlink(missing_ok=True)


def start_device(
    socket_path: str | os.PathLike[str],
    uds_path: str | os.PathLike[str],
    cid: int,
    *,
    once: bool = False,
    options: tuple[str, ...] = (),
    log: int | None = None,
) -> DeviceProcess:
    """Start a device and return when both of its sockets listen.

    ``options`` are further arguments of ``python -m vsock.device``; ``log`` is a descriptor for
    its messages, by default our standard error.

    The device ends with the thread that calls this, and so with this process, however it ends (see
    ``--parent``): call it in a thread that lives for as long as the device shall.

    Raises:
        DeviceError: it ended or said nothing within 20 s; the reason is in its messages.
    """
    paths = os.fspath(socket_path), os.fspath(uds_path)
    ready, child_ready = os.pipe()
    try:
        with open(child_ready, "wb", 0):
            process = _spawn(
                *paths, cid, (*options, *(("--once",) if once else ())), child_ready, log
            )
        device = DeviceProcess(process, *paths)
        try:
            if _is_up(ready):
                return device
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.kill()
        status = process.wait()
        # Its paths are left alone: it may have failed because they are those of another device.
        raise DeviceError(f"the vsock device on {paths[0]!r} did not start, exit status {status}")
    finally:
        os.close(ready)


def _is_up(ready: int) -> bool:
    poller = select.poll()
    poller.register(ready, select.POLLIN)
    return bool(poller.poll(_START_SECONDS * 1000)) and os.read(ready, 1) == b"\n"


def _spawn(
    socket_path: str,
    uds_path: str,
    cid: int,
    options: tuple[str, ...],
    ready_fd: int,
    log: int | None,
) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "vsock.device", "--socket", socket_path, "--uds", uds_path]
    command += ["--cid", str(cid), "--ready-fd", str(ready_fd), "--parent", str(os.getpid())]
    command += options
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stderr=log,
        pass_fds=(ready_fd,),
        # Ctrl-C at the terminal is for us, who then power the guest off; --parent ends the device
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )
