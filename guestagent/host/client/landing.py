"""Files that appear under their name only once they are whole."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ("landing",)


@contextmanager
def landing(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside ``path`` and move it there at the end; it goes if the block fails."""
    part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")
    with part.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
