"""A progress bar for a person at a terminal, and nothing for anyone else."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from guestagent.host.ctl.session import Session

__all__ = ("progress_bar",)


@contextlib.contextmanager
def progress_bar(session: Session, title: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield what shows (bytes done, bytes in all; 0 is unknown) on the standard error."""
    if session.as_json or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def report(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes or None)

        yield report
