"""The same work for many items on a few threads, which wait for the kernel at the same time."""

import contextlib
import threading
from collections.abc import Callable, Sequence

from vsock.errors import CallError
from vsock.threads import start_thread

__all__ = ("for_each",)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    Item = TypeVar("Item")
    Result = TypeVar("Result")


def for_each(
    items: "Sequence[Item]", work: "Callable[[int, Item], Result]", *, threads: int
) -> "list[Result]":
    """Return ``work(number, item)`` for each item, in order of items.

    The calling thread works too, and alone where no other can be started. After a failure no
    further item is begun. When all threads have ended, the error of the first item is raised; that
    of an item which the deadline or a cancel stopped only if there is no other.
    """
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}
    numbers = iter(range(len(items)))
    numbers_lock = threading.Lock()

    def run() -> None:
        while not errors:
            with numbers_lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                results[number] = work(number, items[number])
            except BaseException as error:  # raised again when all have ended
                errors[number] = error

    others = [
        threading.Thread(target=run, name=f"parallel-{number}")
        for number in range(1, min(len(items), threads))
    ]
    started = []
    try:
        with contextlib.suppress(RuntimeError):  # there can be no more of them: those do that are
            for thread in others:
                start_thread(thread)
                started.append(thread)
        run()
    finally:
        for thread in started:
            thread.join()
    if errors:
        raise errors[min(errors, key=lambda number: (_was_stopped(errors[number]), number))]
    return [results[number] for number in range(len(items))]


def _was_stopped(error: BaseException) -> bool:
    return isinstance(error, CallError) and error.code in ("timeout", "cancelled")
