"""A progress bar for a person at a terminal, and nothing for anyone else."""

import contextlib
import sys
from collections.abc import Iterator

from rootfs.image.tree import Progress

__all__ = ("meter",)

_STEP = 0.005


@contextlib.contextmanager
def meter(title: str, as_json: bool) -> Iterator[Progress | None]:
    """Yield what shows (bytes done, bytes in all) on the standard error, None if nobody looks.

    A count that starts again shows the next phase of the same work.
    """
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    # without a thread that refreshes it, so that workers may be processes
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
