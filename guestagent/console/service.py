"""Where sessions come from: the listeners of the console, and one thread that reads for all.

Each session has a thread of its own, and there are at most ``MAX_SESSIONS`` of them. Who connects
and does not say hello costs a descriptor, for ten seconds.
"""

import errno
import os
import select
import threading
import time
from collections import deque

from guestagent.api.console import Refusal
from guestagent.console.channel import Channel, FramedChannel, LineChannel
from guestagent.console.command import Guest
from guestagent.console.serial import find_device, line_term
from guestagent.console.session import Session
from vsock.acceptor import Acceptor
from vsock.address import SerialAddress, parse_address
from vsock.dial import listen
from vsock.errors import CallError, RemoteProtocolError
from vsock.log import log
from vsock.stream import Stream
from vsock.threads import Waker, start_thread

__all__ = ("MAX_SESSIONS", "Console")

MAX_SESSIONS = 8
_MAX_PEERS = 32
_HELLO_SECONDS = 10.0
_READ_BYTES = 16 * 1024
#: A line whose session ends this soon rests for so long before the next: it may have nothing at
#: its other end, and would keep the machine busy.
_SHORT_SECONDS = 1.0
_REST_SECONDS = 5.0
#: A driver finds its devices, and the host tells their names, some time after it was loaded.
_NOT_YET = (errno.ENOENT, errno.ENXIO, errno.ENODEV)
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS, _ABSENT_SECONDS = 0.05, 5.0, 120.0
#: What sessions get to end in when the agent does.
_STOP_SECONDS = 2.0


class _Absent:
    """An address that cannot be listened on yet: ``again_at`` is when to try again."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.again_at = 0.0
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._until = time.monotonic() + _ABSENT_SECONDS

    def put_off(self) -> bool:
        """Wait for longer each time; return whether there is any use in it."""
        self.again_at = time.monotonic() + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, _LAST_PAUSE_SECONDS)
        return self.again_at < self._until


class _Peer:
    """A connection: before its session, with it, and behind it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.fd = channel.stream.fileno()
        self.since = time.monotonic()
        self.session: Session | None = None
        self.thread: threading.Thread | None = None
        self.events = 0
        #: When it is to be freed, None while it is in use.
        self.free_at: float | None = None


class Console:
    """Serves the addresses until ``close``."""

    def __init__(self, guest: Guest, addresses: tuple[str, ...]) -> None:
        """Begin to listen; one that cannot be listened on is a line of the log, no failure."""
        self._guest = guest
        self._epoll = select.epoll()
        self._acceptor = Acceptor(self._epoll, lambda line: log.warning("console", problem=line))
        self._waker = Waker()
        self._epoll.register(self._waker.fd, select.EPOLLIN)
        self._peers: dict[int, _Peer] = {}
        self._ended: deque[Session] = deque()
        self._sessions = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._serve, name="console", daemon=True)
        self._absent: list[_Absent] = []
        for text in addresses:
            self._listen(_Absent(text))

    def start(self) -> None:
        start_thread(self._thread)

    def close(self) -> None:
        """End every session and stop listening. For the end of the agent."""
        self._is_closing = True
        self._waker.wake()
        self._thread.join(_STOP_SECONDS * 2)

    @property
    def session_count(self) -> int:
        return sum(peer.session is not None for peer in list(self._peers.values()))

    def _listen(self, wanted: "_Absent") -> None:
        """Listen; on a line whose device the kernel has not found yet, later."""
        address = parse_address(wanted.text)
        is_line = isinstance(address, SerialAddress)
        try:
            if isinstance(address, SerialAddress):
                address = SerialAddress(path=find_device(address.path))
            self._acceptor.add(listen(address))
        except OSError as error:
            if is_line and error.errno in _NOT_YET and wanted.put_off():
                self._absent.append(wanted)
            else:
                log.error("the console cannot listen", address=wanted.text, error=str(error))
            return
        log.info("console", listen=str(address), shell=self._guest.shell)

    # --- the console's thread

    def _serve(self) -> None:
        try:
            while not self._is_closing:
                self._turn(None)
            self._stop()
        finally:
            self._acceptor.close()
            for peer in list(self._peers.values()):
                if peer.thread is None or not peer.thread.is_alive():
                    self._free(peer)
            self._epoll.close()
            self._waker.close()

    def _stop(self) -> None:
        until = time.monotonic() + _STOP_SECONDS
        for peer in self._peers.values():
            peer.channel.hang_up()
        while any(peer.session is not None for peer in self._peers.values()):
            if time.monotonic() > until:
                return
            self._turn(until)

    def _turn(self, until: float | None) -> None:
        times = [at for at in (until, self._acceptor.resume_at, *self._times()) if at is not None]
        seconds = max(0.0, min(times) - time.monotonic()) if times else None
        for fd, events in self._epoll.poll(seconds):
            peer = self._peers.get(fd)
            if peer is not None:
                self._attend(peer, events)
            elif fd == self._waker.fd:
                self._woken()
            else:
                stream = self._acceptor.accept(fd)
                if stream is not None:
                    self._accepted(stream)
        if times and time.monotonic() >= min(times):
            self._look_around()

    def _times(self) -> list[float]:
        """Return when something is due that time alone brings about."""
        times = [wanted.again_at for wanted in self._absent]
        for peer in self._peers.values():
            if peer.free_at is not None:
                times.append(peer.free_at)
            elif peer.session is None:
                times.append(peer.since + _HELLO_SECONDS)
        return times

    def _look_around(self) -> None:
        now = time.monotonic()
        if self._acceptor.resume_at is not None and now >= self._acceptor.resume_at:
            self._acceptor.resume()
        due = [wanted for wanted in self._absent if now >= wanted.again_at]
        self._absent = [wanted for wanted in self._absent if now < wanted.again_at]
        for wanted in due:
            self._listen(wanted)
        for peer in list(self._peers.values()):
            if peer.free_at is not None:
                if now >= peer.free_at:
                    self._free(peer)
            elif peer.session is None and now >= peer.since + _HELLO_SECONDS:
                self._refuse(peer, CallError("timeout", f"no hello in {_HELLO_SECONDS:g} s"))

    def _woken(self) -> None:
        self._waker.clear()
        while self._ended:
            self._session_ended(self._ended.popleft())
        for peer in self._peers.values():
            self._watch(peer)

    def _accepted(self, stream: Stream) -> None:
        stream.setblocking(False)
        if stream.point_to_point:
            term = line_term(os.environ.get("TERM", ""))
            peer = self._add(LineChannel(stream, wake=self._waker.wake, term=term))
            self._begin(peer)
            return
        peer = self._add(FramedChannel(stream, wake=self._waker.wake))
        if len(self._peers) > _MAX_PEERS:
            self._refuse(peer, CallError("resource", f"{_MAX_PEERS} peers are connected"))

    def _add(self, channel: Channel) -> _Peer:
        peer = _Peer(channel)
        self._peers[peer.fd] = peer
        self._watch(peer)
        return peer

    def _attend(self, peer: _Peer, events: int) -> None:
        if events & select.EPOLLIN:
            self._read(peer)
        elif events & (select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP):
            self._gone(peer)

    def _read(self, peer: _Peer) -> None:
        channel = peer.channel
        try:
            data = channel.stream.recv(_READ_BYTES)
            if not data:
                self._gone(peer)
                return
            channel.take(data)
        except BlockingIOError:
            return
        except OSError:
            self._gone(peer)
            return
        except RemoteProtocolError as error:
            self._broke_rules(peer, error)
            return
        if isinstance(channel, FramedChannel) and channel.is_open and peer.session is None:
            self._begin(peer)
        self._watch(peer)

    def _broke_rules(self, peer: _Peer, error: RemoteProtocolError) -> None:
        if peer.session is None:
            self._refuse(peer, CallError("invalid", str(error)))
        else:
            self._gone(peer)

    def _begin(self, peer: _Peer) -> None:
        """Give a peer its session, if there is one left."""
        if self.session_count >= MAX_SESSIONS:
            text = f"{MAX_SESSIONS} console sessions are open"
            self._refuse(peer, CallError("resource", text, hint="leave one of them"))
            return
        self._sessions += 1
        peer.session = Session(self._sessions, peer.channel, self._guest, self._on_session_end)
        name = f"console {self._sessions}"
        peer.thread = threading.Thread(target=peer.session.run, name=name, daemon=True)
        log.info("console session", session=self._sessions, peer=peer.channel.stream.peer)
        start_thread(peer.thread)

    def _refuse(self, peer: _Peer, error: CallError) -> None:
        if isinstance(peer.channel, FramedChannel):
            peer.channel.refuse(Refusal.of(error))
            self._free(peer)
        else:  # a line asks again by itself
            self._unwatch(peer)
            peer.free_at = time.monotonic() + _REST_SECONDS

    def _gone(self, peer: _Peer) -> None:
        """The peer has gone; its session, if it has one, ends and says so."""
        self._unwatch(peer)
        peer.channel.hang_up()
        if peer.session is None:
            self._free(peer)

    def _on_session_end(self, session: Session) -> None:
        """Called by the session's thread, as the last that it does."""
        self._ended.append(session)
        self._waker.wake()

    def _session_ended(self, session: Session) -> None:
        for peer in list(self._peers.values()):
            if peer.session is session:
                log.info("console session ended", session=session.number)
                self._unwatch(peer)
                peer.session = None
                if peer.thread is not None:
                    peer.thread.join()
                is_short = time.monotonic() - peer.since < _SHORT_SECONDS
                rests = peer.channel.is_line and is_short and not self._is_closing
                peer.free_at = time.monotonic() + (_REST_SECONDS if rests else 0.0)
                if not rests:
                    self._free(peer)

    def _free(self, peer: _Peer) -> None:
        self._unwatch(peer)
        del self._peers[peer.fd]
        peer.channel.close()

    def _watch(self, peer: _Peer) -> None:
        """Wait for input, where there is room for it, and for the end of the peer anyway."""
        if peer.events < 0:
            return
        wanted = select.EPOLLRDHUP | (select.EPOLLIN if peer.channel.wants_input else 0)
        if wanted == peer.events:
            return
        if peer.events:
            self._epoll.modify(peer.fd, wanted)
        else:
            self._epoll.register(peer.fd, wanted)
        peer.events = wanted

    def _unwatch(self, peer: _Peer) -> None:
        if peer.events > 0:
            self._epoll.unregister(peer.fd)
        peer.events = -1
