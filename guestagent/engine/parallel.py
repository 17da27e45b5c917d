"""The same work for many items on a few threads: what waits for the kernel waits together."""

import contextlib
import threading
from collections.abc import Callable, Sequence

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
    """Return ``work(number, item)`` for each item, in order of items; the caller works too, and
    alone where there can be no other thread.

    After a failure nothing new is begun; when all have ended the first error, in the order of
    items, is raised.
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
        raise errors[min(errors)]
    return [results[number] for number in range(len(items))]
