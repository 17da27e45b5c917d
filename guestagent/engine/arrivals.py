"""Devices that requests wait for, and one thread that waits for all of them.

A request that came over a connection holds nothing while its device is not there: it is undone as
far as it was done, which is nothing but reservations, and begun again when the device has come.
"""

import select
import threading
from collections.abc import Callable

from guestagent.api.devices import Device
from guestagent.engine.transaction import Transaction
from guestagent.storage import blockdev
from guestagent.storage.blockdev import BlockDevice, Search
from guestagent.storage.uevents import UeventSocket
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.threads import Waker, start_thread

__all__ = ("Arrivals", "DeviceAbsentError", "find_device")


#: Each event makes the thread look for the devices of all that wait.
_MAX_WAITS = 512


class DeviceAbsentError(Exception):
    """A request that may be left and begun again needs ``device``, which is not there."""

    def __init__(self, device: Device) -> None:
        super().__init__(blockdev.describe(device))
        self.device = device


def find_device(wanted: Device, op: Transaction) -> BlockDevice:
    """Look a device up, or wait for it; once for all layers of a batch that are on it.

    A device that changes meanwhile is noticed when a dm device or mount is made on it.

    Raises:
        CallError: ``timeout`` or ``cancelled``, it did not come; ``conflict`` or ``invalid``.
        DeviceAbsentError: it is not there, and ``op`` may be left.
    """
    found = op.resolved_devices.get(wanted)
    if found is None:
        # where the deadline is over the wait says what is there instead
        with op.step("device", blockdev.describe(wanted), is_checked=False):
            found = blockdev.find(wanted, by_node=True)
            if found is None and not (op.may_be_left and not op.deadline.over):
                found = blockdev.wait_for(wanted, op.deadline)
        if found is None:
            raise DeviceAbsentError(wanted)
        op.resolved_devices[wanted] = found
    return found


class _Wait:
    def __init__(
        self,
        device: Device,
        deadline: Deadline,
        resume: Callable[[], object],
        finish: Callable[[], object],
    ) -> None:
        self.search = Search(device)
        self.deadline = deadline
        self.resume = resume
        self.finish = finish


class Arrivals:
    """A thread that lives while there is something to wait for. Usable from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: list[_Wait] = []
        self._thread: threading.Thread | None = None
        self._waker: Waker | None = None
        self._is_closed = False

    def when_there(
        self,
        device: Device,
        deadline: Deadline,
        resume: Callable[[], object],
        finish: Callable[[], object],
    ) -> None:
        """Call ``resume`` once the device is there, or ``finish`` once ``deadline`` is over.

        On the thread that waits for all: ``resume`` must not wait, ``finish`` not for long.

        Raises:
            CallError: ``resource``, there can be no thread or no descriptor for it, or too many
                wait.
        """
        wait = _Wait(device, deadline, resume, finish)
        with self._lock:
            if self._is_closed:
                raise CallError("cancelled", "the agent ends", step="device")
            if len(self._waits) >= _MAX_WAITS:
                text = f"{_MAX_WAITS} requests wait for devices"
                raise CallError("resource", text, step="device", object=blockdev.describe(device))
            self._waits.append(wait)
            try:
                if self._thread is None:
                    self._start()
            except (OSError, RuntimeError) as error:
                self._waits.remove(wait)
                text = f"nothing can wait for {blockdev.describe(device)}: {error}"
                raise CallError("resource", text, step="device") from error
        self._wake()
        deadline.when_cancelled(self._wake)

    def close(self) -> None:
        """End the thread; what waits is not called. Idempotent."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
        self._wake()
        if thread is not None:
            thread.join()

    def _wake(self) -> None:
        waker = self._waker
        if waker is not None:
            waker.wake()

    def _start(self) -> None:
        events, waker = UeventSocket(), Waker()
        thread = threading.Thread(
            target=self._run, args=(events, waker), name="device-waits", daemon=True
        )
        try:
            start_thread(thread)
        except RuntimeError:
            events.close()
            waker.close()
            raise
        self._thread, self._waker = thread, waker

    def _run(self, events: UeventSocket, waker: Waker) -> None:
        with events, waker:
            poller = select.poll()
            poller.register(events.fileno(), select.POLLIN)
            poller.register(waker.fd, select.POLLIN)
            while (pause_seconds := self._look()) is not None:
                poller.poll(pause_seconds * 1000)
                waker.clear()
                events.receive()

    def _look(self) -> float | None:
        """Call what has come or is over; return for how long to wait, None to end."""
        with self._lock:
            waits = list(self._waits)
        ended = []
        pauses = []
        for wait in waits:
            call = self._call_for(wait)
            if call is not None:
                ended.append(wait)
                call()
            else:
                left = wait.deadline.remaining()
                pauses += [wait.search.pause_seconds, *([] if left is None else [left])]
        with self._lock:
            for wait in ended:
                self._waits.remove(wait)
            if self._is_closed or not self._waits:
                self._thread = self._waker = None
                return None
        return min(pauses, default=0.0)

    @staticmethod
    def _call_for(wait: _Wait) -> Callable[[], object] | None:
        if wait.deadline.over:
            return wait.finish
        try:
            return None if wait.search.look() is None else wait.resume
        except (CallError, OSError):
            return wait.resume  # the request meets the same, and tells it
