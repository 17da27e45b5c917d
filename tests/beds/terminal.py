"""``guestctl`` in a pseudo-terminal, where pexpect types."""

import os
from collections.abc import Mapping
from pathlib import Path

import pexpect

from tests.beds.ctlbed import GUESTCTL

PROJECT = Path(__file__).resolve().parents[2]


def spawn(
    *arguments: str,
    timeout_seconds: float,
    environment: Mapping[str, str],
    columns: int = 80,
    **options: object,
) -> pexpect.spawn:
    """Start guestctl in a terminal of 24 rows. The timeout is of each thing that is expected."""
    return pexpect.spawn(
        GUESTCTL[0],
        [*GUESTCTL[1:], *arguments],
        dimensions=(24, columns),
        timeout=timeout_seconds,
        cwd=str(PROJECT),
        env={**os.environ, **environment},
        **options,
    )


def ask(child: pexpect.spawn, text: str, *shown: str) -> None:
    """Type, then wait for what is shown."""
    child.send(text)
    for each in shown:
        child.expect_exact(each)


def ended(child: pexpect.spawn) -> int:
    """Wait for the end; return the exit status."""
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus is not None
    return int(child.exitstatus)
