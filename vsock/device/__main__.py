"""``python -m vsock.device --socket S --uds U --cid N``: run the device until a signal."""

import argparse
import ctypes
import errno
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from vsock.device.device import Device, Settings
from vsock.device.hybrid import ListenerInUse
from vsock.device.line import Limits

_log = logging.getLogger("vsock.device")

#: Descriptors that are not host peers: listeners, rings, memory, epoll, standard streams.
_OTHER_FDS = 1024

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the device. Returns 0 after a signal or the end of ``--once``, 1 when it cannot start."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="vsock-device: %(levelname)s %(message)s"
    )
    try:
        if options.parent is not None:
            _end_with(options.parent)
        settings = _settings(options)
        _raise_fd_limit(settings.limits.connections + _OTHER_FDS)
        device = Device(settings)
    except (OSError, ValueError, ListenerInUse) as exc:
        _log.error("cannot start: %s", exc)
        return 1
    with closing(device), _signals(device):
        if options.ready_fd is not None:
            os.write(options.ready_fd, b"\n")
            os.close(options.ready_fd)
        device.run()
    return 0


def _parser() -> argparse.ArgumentParser:
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="python -m vsock.device",
        description="A virtio-vsock device for QEMU and User Mode Linux (vhost-user back-end).",
    )
    parser.add_argument("--socket", required=True, metavar="PATH", help="vhost-user socket")
    parser.add_argument(
        "--uds",
        required=True,
        metavar="PATH",
        help="Unix socket for host peers; guests that dial port P reach PATH_P",
    )
    parser.add_argument("--cid", required=True, type=int, help="context id of the guest, from 3")
    parser.add_argument("--once", action="store_true", help="exit when the front-end leaves")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="write a newline here when up")
    parser.add_argument(
        "--parent",
        type=int,
        metavar="PID",
        help="end when our parent does, which is this process; more exactly, when the thread does "
        "that started us (prctl(2), PR_SET_PDEATHSIG)",
    )
    parser.add_argument(
        "--log-level", default="warning", choices=("debug", "info", "warning", "error")
    )
    parser.add_argument("--connections", type=int, default=limits.connections)
    parser.add_argument("--buffer-bytes", type=int, default=limits.buffer_bytes)
    parser.add_argument("--handshake-seconds", type=float, default=limits.handshake_seconds)
    parser.add_argument("--answer-seconds", type=float, default=limits.answer_seconds)
    parser.add_argument("--close-seconds", type=float, default=limits.close_seconds)
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        socket_path=options.socket,
        uds_path=options.uds,
        cid=options.cid,
        once=options.once,
        limits=Limits(
            connections=options.connections,
            buffer_bytes=options.buffer_bytes,
            handshake_seconds=options.handshake_seconds,
            answer_seconds=options.answer_seconds,
            close_seconds=options.close_seconds,
        ),
    )


def _end_with(parent: int) -> None:
    """Have the kernel send SIGTERM when the parent ends.

    Raises:
        OSError: it has ended already, or is another than was said.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"PR_SET_PDEATHSIG: {os.strerror(number)}")
    # only now: a parent that ended before the signal was asked for sends none
    if os.getppid() != parent:
        raise ProcessLookupError(errno.ESRCH, f"process {parent} is not our parent")


def _raise_fd_limit(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _signals(device: Device) -> Iterator[None]:
    """Stop the device on SIGTERM and SIGINT, without a race: the signal is an event of its loop."""
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        device.watch(reader.fileno())
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)


if __name__ == "__main__":
    sys.exit(main())
