"""The addresses that the agent listens on: held by PID 1 over restarts, tried again when absent."""

import _socket
import os
import threading
from collections.abc import Callable

from vsock.address import Address, SerialAddress, parse_address
from vsock.closeable import Closeable
from vsock.deadline import Deadline
from vsock.dial import listen
from vsock.errors import CallError
from vsock.log import log
from vsock.retry import retry
from vsock.stream import Listener
from vsock.threads import start_thread

__all__ = ("HeldSockets", "Listeners")

#: Between attempts at the addresses that cannot be listened on.
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.05, 5.0


class HeldSockets:
    """Listening sockets of PID 1, which outlive each agent.

    No other process can take a port between two agents, and a connection that is made meanwhile
    waits for the next one. Serial devices are not held: a port of virtio-serial admits one opener.
    """

    def __init__(self, addresses: tuple[str, ...]) -> None:
        """Listen on ``addresses``, texts as ``vsock.address`` reads them."""
        parsed = map(parse_address, addresses)
        self._wanted = [address for address in parsed if not isinstance(address, SerialAddress)]
        self._held: dict[Address, Listener] = {}
        self.open_missing()

    def open_missing(self) -> None:
        """Listen on what could not be listened on so far; the agent tells of what still cannot."""
        for address in self._wanted:
            if address not in self._held:
                try:
                    self._held[address] = listen(address)
                except OSError as error:
                    log.debug("cannot listen yet", address=str(address), error=str(error))

    def listen(self, address: Address) -> Listener:
        """Return a listener of the caller's own, on the socket that is held if there is one.

        Raises:
            OSError: as ``vsock.dial.listen``.
        """
        held = self._held.get(address)
        if held is None:
            return listen(address)
        return Listener(address, _socket.socket(fileno=os.dup(held.fileno())))


class Listeners(Closeable):
    """Hands a listener for each address to ``add``: at once, or as soon as it can be had."""

    def __init__(
        self,
        addresses: tuple[str, ...],
        add: Callable[[Listener], None],
        listen: Callable[[Address], Listener] = listen,
    ) -> None:
        self._add = add
        self._listen = listen
        #: Address -> why it cannot be listened on.
        self._absent = dict.fromkeys(map(parse_address, addresses), "")
        self._first_error: OSError | None = None
        self._count = 0
        self._until = Deadline()
        self._thread = threading.Thread(target=self._run, name="listen", daemon=True)

    def start(self) -> None:
        """Listen where that can be done; go on trying elsewhere, on a thread."""
        try:
            self._listen_all()
        except OSError:
            start_thread(self._thread)

    def require_one(self) -> None:
        """Raise the OSError of the first address if there is no listener at all."""
        if self._first_error is not None and not self._count:
            raise self._first_error

    def close(self) -> None:
        """End the attempts. What was handed on stays open."""
        self._until.cancel()
        if self._thread.ident is not None:
            self._thread.join()
        self._until.close()

    def problems(self) -> tuple[str, ...]:
        """Return a sentence for each address that cannot be listened on."""
        return tuple(f"cannot listen: {why}" for why in list(self._absent.values()) if why)

    def _run(self) -> None:
        try:
            retry(
                self._listen_all,
                self._until,
                when=lambda error: isinstance(error, OSError),
                step="listen again",
                first_seconds=_FIRST_PAUSE_SECONDS,
                most_seconds=_LAST_PAUSE_SECONDS,
            )
        except (CallError, OSError):  # closed
            return

    def _listen_all(self) -> None:
        """Listen on every address that is absent; raise the error of the last that still is."""
        last: OSError | None = None
        for address, known in list(self._absent.items()):
            try:
                listener = self._listen(address)
            except OSError as error:
                last = error
                self._first_error = self._first_error or error
                self._absent[address] = f"{address}: {error.strerror or error}"
                if not known:
                    log.error("cannot listen", address=str(address), error=str(error))
                continue
            self._add(listener)
            self._count += 1
            del self._absent[address]
            if known:
                log.info("listening", address=str(address))
        if last is not None:
            raise last
