"""The vsock device as a process: readiness, signals, paths, and the loop that it waits with."""

import os
import signal
import socket
import stat
import subprocess
import sys

import pytest

from vsock.device import process as process_module
from vsock.device.device import Settings
from vsock.device.hybrid import HostStream, ListenerInUse, listen
from vsock.device.process import DeviceError, start_device
from vsock.loop import Loop


def connect(path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(path))
    return sock


class TestProcess:
    def test_both_sockets_listen_and_then_are_gone(self, tmp_path):
        with start_device(tmp_path / "s", tmp_path / "u", 3) as device:
            connect(device.socket_path).close()
            connect(device.uds_path).close()
            assert device.poll() is None
            assert device.pid > 0
        assert device.poll() == 0
        assert list(tmp_path.iterdir()) == []
        device.close()

    def test_once(self, tmp_path):
        with start_device(tmp_path / "s", tmp_path / "u", 3, once=True) as device:
            connect(device.socket_path).close()
            assert device.wait(10) == 0
        assert list(tmp_path.iterdir()) == []

    def test_sockets_of_a_killed_device_are_removed(self, tmp_path):
        with start_device(tmp_path / "s", tmp_path / "u", 3) as device:
            os.kill(device.pid, signal.SIGKILL)
        assert list(tmp_path.iterdir()) == []

    def test_a_second_device_does_not_take_the_sockets_of_the_first(self, tmp_path):
        with start_device(tmp_path / "s", tmp_path / "u", 3):
            for paths in (("s", "w"), ("w", "u")):
                with pytest.raises(DeviceError, match="exit status 1"):
                    start_device(*(tmp_path / name for name in paths), 3, log=subprocess.DEVNULL)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "u"]
            connect(tmp_path / "u").close()

    def test_no_process_is_left_when_the_start_is_interrupted(self, tmp_path, monkeypatch):
        class Interrupted:
            def register(self, *_):
                pass

            def poll(self, _):
                raise KeyboardInterrupt

        started = []
        spawn = process_module._spawn
        monkeypatch.setattr(process_module.select, "poll", Interrupted)
        monkeypatch.setattr(
            process_module, "_spawn", lambda *rest: started.append(spawn(*rest)) or started[0]
        )
        with pytest.raises(KeyboardInterrupt):
            start_device(tmp_path / "s", tmp_path / "u", 3, log=subprocess.DEVNULL)
        assert started[0].returncode == -signal.SIGKILL

    def test_signal_ends_the_device_in_order(self, tmp_path):
        with (
            start_device(tmp_path / "s", tmp_path / "u", 3) as device,
            connect(device.uds_path) as peer,
        ):
            os.kill(device.pid, signal.SIGINT)
            assert device.wait(10) == 0
            assert peer.recv(1) == b""
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--cid", "2"], "reserved"),
            (["--cid", "3", "--connections", "0"], "limits"),
            (["--cid", "3", "--uds", "/missing/u"], "cannot start"),
            (["--cid", "3", "--uds", "/tmp/" + 93 * "x"], "as long as"),
        ],
    )
    def test_impossible_arguments_are_refused_in_words(self, tmp_path, arguments, reason):
        command = [sys.executable, "-m", "vsock.device", "--socket", str(tmp_path / "s")]
        done = subprocess.run(
            [*command, "--uds", str(tmp_path / "u"), *arguments], capture_output=True, text=True
        )
        assert done.returncode == 1
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


class TestListen:
    def test_a_stale_socket_is_replaced(self, tmp_path):
        listen(str(tmp_path / "s")).close()
        assert stat.S_ISSOCK(os.stat(tmp_path / "s").st_mode)
        with listen(str(tmp_path / "s")), pytest.raises(ListenerInUse):
            listen(str(tmp_path / "s"))

    def test_no_other_user_may_connect(self, tmp_path):
        """Whoever connects speaks to the agent of a guest, or is its QEMU."""
        before = os.umask(0)
        try:
            with listen(str(tmp_path / "s")):
                assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o600
        finally:
            os.umask(before)

    def test_a_file_is_never_removed(self, tmp_path):
        (tmp_path / "s").write_text("precious")
        with pytest.raises(OSError, match="in use"):
            listen(str(tmp_path / "s"))
        assert (tmp_path / "s").read_text() == "precious"

    def test_both_sockets_at_one_path(self):
        with pytest.raises(ValueError, match="both"):
            Settings(socket_path="/a", uds_path="/a", cid=3)


class TestHostStream:
    """A guest may scatter a packet over more buffers than one system call takes."""

    PIECES = 3000

    def test_data_for_the_host_in_many_pieces(self):
        ours, theirs = socket.socketpair()
        with theirs:
            stream = HostStream(ours)
            data = os.urandom(self.PIECES)
            views = [memoryview(data)[at : at + 1] for at in range(self.PIECES)]
            assert stream.send(views, self.PIECES) == self.PIECES
            assert not stream.gone
            assert theirs.recv(2 * self.PIECES) == data
            stream.close()

    def test_data_for_the_guest_in_many_pieces(self):
        ours, theirs = socket.socketpair()
        with theirs:
            stream = HostStream(ours)
            data = os.urandom(self.PIECES)
            theirs.sendall(data)
            buffer = bytearray(self.PIECES)
            views = [memoryview(buffer)[at : at + 1] for at in range(self.PIECES)]
            got = 0
            while got < self.PIECES:
                count = stream.receive_into(views[got:])
                assert count
                got += count
            assert buffer == data
            assert not stream.eof
            stream.close()


class TestLoop:
    def test_an_event_of_a_closed_descriptor_is_not_given_to_its_successor(self):
        """Two descriptors are ready; the handler of either closes both, and opens another."""
        loop = Loop()
        first, second = os.eventfd(1), os.eventfd(1)
        calls = []
        third = []

        def replace(_events: int) -> None:
            for fd in (first, second):
                loop.remove(fd)
                os.close(fd)
            for _ in range(2):
                third.append(os.eventfd(0))
                loop.add(third[-1], 1, calls.append)

        loop.add(first, 1, replace)
        loop.add(second, 1, replace)
        loop.poll(block=False)
        assert set(third) == {first, second}
        loop.poll(block=False)
        assert calls == []
        os.eventfd_write(third[0], 1)
        loop.poll(block=False)
        assert calls == [1]
        for fd in third:
            os.close(fd)
        loop.close()

    def test_timers_fire_in_order_unless_cancelled(self):
        loop = Loop()
        fired = []
        loop.call_later(0.002, lambda: fired.append("b"))
        loop.call_later(0.001, lambda: fired.append("a"))
        cancelled = loop.call_later(0.0015, lambda: fired.append("c"))
        cancelled.cancel()
        cancelled.cancel()
        while len(fired) < 2:
            loop.poll(block=True)
        assert fired == ["a", "b"]
        loop.close()
