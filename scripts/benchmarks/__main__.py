"""All benchmarks, or those that are named; see ``scripts/bench``."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.benchmarks.format import format_rows
from scripts.benchmarks.images import images_rows
from scripts.benchmarks.machine import machine_rows
from scripts.benchmarks.native import native_rows
from scripts.benchmarks.rows import Row, print_rows, write_rows
from scripts.benchmarks.start import start_rows

PROJECT = Path(__file__).resolve().parents[2]
_UML_SECONDS = 900


def _engine_rows() -> list[Row]:
    """Run the engine's benchmarks under a kernel that has device-mapper."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=PROJECT / ".cache") as directory:
        result = Path(directory, "rows.json")
        command = [str(PROJECT / "scripts/uml"), "--bind", directory, "--memory", "1024"]
        command += [
            "--timeout",
            str(_UML_SECONDS),
            sys.executable,
            "-m",
            "scripts.benchmarks.engine",
        ]
        subprocess.run([*command, "--json", str(result)], check=True, stdout=sys.stderr)
        rows: list[Row] = json.loads(result.read_text())
        return rows


SUITES = {
    "format": format_rows,
    "images": images_rows,
    "engine": _engine_rows,
    "start": start_rows,
    "native": native_rows,
    "machine": machine_rows,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description="Measure; print a table.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=" ".join(SUITES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.suites if name not in SUITES]
    if unknown:
        parser.error(f"no such suite: {unknown[0]}; there are {', '.join(SUITES)}")
    rows: list[Row] = []
    for name in arguments.suites or SUITES:
        print(f"bench: {name} ...", file=sys.stderr, flush=True)
        rows += SUITES[name]()
    print_rows(rows)
    if arguments.json:
        write_rows(rows, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
