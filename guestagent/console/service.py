"""Where sessions come from: the listeners of the console, and one thread that reads for all.

Each session has a thread of its own, and there are at most ``MAX_SESSIONS`` of them. A peer that
connects and does not say hello costs a descriptor, for ten seconds.
"""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from guestagent.api.console import Refusal
from guestagent.console.channel import Channel
from guestagent.console.command import Guest
from guestagent.console.session import Session
from guestagent.listeners import Listeners
from vsock.address import Address
from vsock.dial import listen
from vsock.errors import CallError, RemoteProtocolError
from vsock.log import log
from vsock.loop import Loop, Timer
from vsock.stream import Listener, Stream
from vsock.threads import Waker, start_thread

__all__ = ("MAX_SESSIONS", "Console", "line_term")

#: What init finds in its environment unless the command line says otherwise (init/main.c,
#: envp_init): it means the kernel's own screen.
_SCREEN_TERM = "linux"
MAX_SESSIONS = 8
_MAX_PEERS = 32
_HELLO_SECONDS = 10.0
_READ_BYTES = 16 * 1024
#: How long accepting pauses when it fails, as it does with no descriptor left.
_ACCEPT_PAUSE_SECONDS = 0.5
#: A line whose session ends this soon rests for so long before the next: it may have nothing at
#: its other end, and would keep the machine busy.
_SHORT_SECONDS = 1.0
_REST_SECONDS = 5.0
#: What sessions get to end in when the agent does.
_STOP_SECONDS = 2.0


def line_term(term: str) -> str:
    """Return the terminal type of a line, for the agent's TERM."""
    return "dumb" if term in ("", _SCREEN_TERM) else term


class _Peer:
    """A connection: before its session, with it, and after it."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.fd = channel.stream.fileno()
        self.since = time.monotonic()
        self.session: Session | None = None
        self.thread: threading.Thread | None = None
        #: What the loop watches the descriptor for; None once it no longer does.
        self.events: int | None = 0
        #: Refuses the peer that says no hello, or frees a line that has rested.
        self.timer: Timer | None = None


class Console:
    """Serves the addresses until ``close``."""

    def __init__(
        self,
        guest: Guest,
        addresses: tuple[str, ...],
        listen: Callable[[Address], Listener] = listen,
    ) -> None:
        """An address that cannot be listened on is tried again, and is a problem meanwhile."""
        self._guest = guest
        self._addresses = Listeners(addresses, self._add_listener, listen)
        self._loop = Loop()
        self._waker = Waker()
        self._loop.add(self._waker.fd, select.EPOLLIN, self._woken)
        self._calls: deque[Callable[[], None]] = deque()
        self._listeners: list[Listener] = []
        self._peers: set[_Peer] = set()
        self._sessions = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._serve, name="console", daemon=True)

    def start(self) -> None:
        start_thread(self._thread)
        self._addresses.start()

    def problems(self) -> tuple[str, ...]:
        """Return a sentence for each address that cannot be listened on."""
        return self._addresses.problems()

    def close(self) -> None:
        """End every session and stop listening. For the end of the agent."""
        self._addresses.close()
        self._is_closing = True
        self._waker.wake()
        self._thread.join(_STOP_SECONDS * 2)

    @property
    def session_count(self) -> int:
        return sum(peer.session is not None for peer in list(self._peers))

    def _call(self, function: Callable[[], None]) -> None:
        """Have the console's thread call ``function``. From any thread."""
        self._calls.append(function)
        self._waker.wake()

    def _add_listener(self, listener: Listener) -> None:
        """Serve a listener, which the console takes over. From any thread."""
        log.info("console", listen=str(listener.address), shell=self._guest.shell)
        self._listeners.append(listener)
        self._call(partial(self._accept_on, listener))

    # --- the console's thread

    def _accept_on(self, listener: Listener) -> None:
        self._loop.add(listener.fileno(), select.EPOLLIN, partial(self._accept, listener))

    def _accept(self, listener: Listener, _events: int) -> None:
        try:
            stream = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # a listener stays ready while accepting fails: to watch it would be a busy loop
            log.warning("console", problem=f"cannot accept on {listener.address}: {error}")
            self._loop.remove(listener.fileno())
            self._loop.call_later(_ACCEPT_PAUSE_SECONDS, partial(self._accept_on, listener))
            return
        self._accepted(stream)

    def _serve(self) -> None:
        try:
            while not self._is_closing:
                self._loop.poll(block=True)
            self._stop()
        finally:
            for listener in self._listeners:
                listener.close()
            for peer in list(self._peers):
                if peer.thread is None or not peer.thread.is_alive():
                    self._free(peer)
            self._loop.close()
            self._waker.close()

    def _stop(self) -> None:
        for peer in self._peers:
            peer.channel.hang_up()
        patience = self._loop.call_later(_STOP_SECONDS, lambda: None)
        while self.session_count and not patience.cancelled:
            self._loop.poll(block=True)

    def _woken(self, _events: int) -> None:
        self._waker.clear()
        while self._calls:
            self._calls.popleft()()

    def _accepted(self, stream: Stream) -> None:
        stream.setblocking(False)
        if stream.point_to_point:
            term = line_term(os.environ.get("TERM", ""))
            self._begin(self._add(Channel(stream, line_term=term)))
            return
        peer = self._add(Channel(stream))
        if len(self._peers) > _MAX_PEERS:
            self._refuse(peer, CallError("resource", f"{_MAX_PEERS} peers are connected"))
            return
        silent = CallError("timeout", f"no hello in {_HELLO_SECONDS:g} s")
        peer.timer = self._loop.call_later(_HELLO_SECONDS, partial(self._refuse, peer, silent))

    def _add(self, channel: Channel) -> _Peer:
        peer = _Peer(channel)
        channel.wake = partial(self._call, partial(self._watch, peer))
        self._peers.add(peer)
        self._watch(peer)
        return peer

    def _attend(self, peer: _Peer, events: int) -> None:
        if events & select.EPOLLIN:
            self._read(peer)
        else:  # a hang-up or an error
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
            if peer.session is None:
                self._refuse(peer, CallError("invalid", str(error)))
            else:
                self._gone(peer)
            return
        if channel.is_open and peer.session is None:
            self._begin(peer)
        self._watch(peer)

    def _begin(self, peer: _Peer) -> None:
        """Give a peer its session, if there is one left."""
        if self.session_count >= MAX_SESSIONS:
            text = f"{MAX_SESSIONS} console sessions are open"
            self._refuse(peer, CallError("resource", text, hint="leave one of them"))
            return
        self._unset_timer(peer)
        self._sessions += 1
        number = self._sessions
        ended = partial(self._call, partial(self._session_ended, peer))
        peer.session = Session(number, peer.channel, self._guest, ended)
        name = f"console {number}"
        peer.thread = threading.Thread(target=peer.session.run, name=name, daemon=True)
        log.info("console session", session=number, peer=peer.channel.stream.peer)
        start_thread(peer.thread)

    def _refuse(self, peer: _Peer, error: CallError) -> None:
        if peer.channel.is_line:  # the line is opened anew when it has rested
            self._unwatch(peer)
            self._rest(peer)
        else:
            peer.channel.refuse(Refusal.of(error))
            self._free(peer)

    def _rest(self, peer: _Peer) -> None:
        peer.timer = self._loop.call_later(_REST_SECONDS, partial(self._free, peer))

    def _gone(self, peer: _Peer) -> None:
        """The peer has gone; its session, if it has one, is told to end."""
        self._unwatch(peer)
        peer.channel.hang_up()
        if peer.session is None:
            self._free(peer)

    def _session_ended(self, peer: _Peer) -> None:
        assert peer.session is not None
        assert peer.thread is not None
        log.info("console session ended", session=peer.session.number)
        self._unwatch(peer)
        peer.session = None
        peer.thread.join()
        is_short = time.monotonic() - peer.since < _SHORT_SECONDS
        if peer.channel.is_line and is_short and not self._is_closing:
            self._rest(peer)
        else:
            self._free(peer)

    def _free(self, peer: _Peer) -> None:
        self._unwatch(peer)
        self._unset_timer(peer)
        self._peers.discard(peer)
        peer.channel.close()

    def _unset_timer(self, peer: _Peer) -> None:
        if peer.timer is not None:
            peer.timer.cancel()
            peer.timer = None

    def _watch(self, peer: _Peer) -> None:
        """Wait for input, where there is room for it, and for the end of the peer anyway."""
        wanted = select.EPOLLRDHUP | (select.EPOLLIN if peer.channel.wants_input else 0)
        if peer.events is None or peer.events == wanted:
            return
        if peer.events:
            self._loop.modify(peer.fd, wanted)
        else:
            self._loop.add(peer.fd, wanted, partial(self._attend, peer))
        peer.events = wanted

    def _unwatch(self, peer: _Peer) -> None:
        if peer.events:
            self._loop.remove(peer.fd)
        peer.events = None
