"""A progress bar for a person at a terminal."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

__all__ = ("progress_bar",)

#: The bar is drawn again when it has grown by this part.
_STEP = 0.005


@contextlib.contextmanager
def progress_bar(title: str, as_json: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield what shows (bytes done, bytes in all; 0 is unknown) on the standard error.

    Yields None where no terminal shows it. A count that starts again shows the next phase of the
    same work. No thread refreshes the bar, so that the work may fork.
    """
    if as_json or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
    shown = -1.0
    with bar:
        task = bar.add_task(title, total=None)

        def report(done_bytes: int, total_bytes: int) -> None:
            nonlocal shown
            part = done_bytes / total_bytes if total_bytes else done_bytes / (1 << 30)
            if abs(part - shown) >= _STEP or done_bytes == total_bytes:
                shown = part
                bar.update(task, completed=done_bytes, total=total_bytes or None, refresh=True)

        yield report
