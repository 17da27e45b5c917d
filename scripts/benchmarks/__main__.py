"""All benchmarks, or those that are named; see ``scripts/bench``."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from scripts.benchmarks.check import misses, read_bounds
from scripts.benchmarks.format import format_rows
from scripts.benchmarks.images import images_rows, scale_rows
from scripts.benchmarks.machine import machine_rows
from scripts.benchmarks.native import native_rows
from scripts.benchmarks.plot import markdown_table, write_plot
from scripts.benchmarks.rows import Row, print_rows, write_rows
from scripts.benchmarks.start import start_rows

PROJECT = Path(__file__).resolve().parents[2]
_UML_SECONDS = 900
#: The oldest release of Debian whose kernel mounts an image of many layers at once.
FLATTENED = "trixie"


def _rows_in_uml(module: str, *options: str, release: str | None = None) -> list[Row]:
    """Run a module of benchmarks under a kernel that has device-mapper: User Mode Linux, that of
    another ``release`` of Debian if one is named."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=PROJECT / ".cache") as directory:
        result = Path(directory, "rows.json")
        command = [str(PROJECT / "scripts/uml"), "--bind", directory, "--memory", "1024"]
        command += ["--timeout", str(_UML_SECONDS)]
        command += [sys.executable, "-m", f"scripts.benchmarks.{module}", "--json", str(result)]
        environment = dict(os.environ)
        if release is not None:
            environment.setdefault("GUESTAGENT_KERNELS", release)
        subprocess.run([*command, *options], check=True, stdout=sys.stderr, env=environment)
        rows: list[Row] = json.loads(result.read_text())
        return rows


SUITES: dict[str, Callable[[], list[Row]]] = {
    "format": format_rows,
    "images": images_rows,
    "scale": scale_rows,
    "engine": lambda: _rows_in_uml("engine"),
    "merged": lambda: _rows_in_uml("merged", release=FLATTENED),
    "start": start_rows,
    "native": native_rows,
    "machine": machine_rows,
}
#: Suites of ``--short``.
SHORT: dict[str, Callable[[], list[Row]]] = {
    "engine": lambda: _rows_in_uml("engine", "--short"),
    "native": lambda: native_rows(short=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description="Measure; print a table.")
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=" ".join(SUITES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a chart (SVG)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for a page")
    parser.add_argument(
        "--check",
        action="store_true",
        help="hold the rows to bounds.json, and name those that miss twice; the status is then 1",
    )
    parser.add_argument("--short", action="store_true", help=f"fewer rounds: {' and '.join(SHORT)}")
    arguments = parser.parse_args()
    suites = SHORT if arguments.short else SUITES
    unknown = [name for name in arguments.suites if name not in suites]
    if unknown:
        parser.error(f"no such suite: {unknown[0]}; there are {', '.join(suites)}")
    bounds = read_bounds() if arguments.check else {}
    rows: list[Row] = []
    missed: list[str] = []
    for name in arguments.suites or suites:
        held = bounds.get(name, ())
        for is_last in (False, True):
            print(f"bench: {name} ...", file=sys.stderr, flush=True)
            measured = suites[name]()
            problems = misses(measured, held, short=arguments.short)
            if is_last or not problems:
                break
            # what else the machine does may be all there is to it
            print(f"bench: once more: {'; '.join(problems)}", file=sys.stderr, flush=True)
        rows += measured
        missed += [f"{name}: {problem}" for problem in problems]
    print_rows(rows)
    if arguments.json:
        write_rows(rows, arguments.json)
    if arguments.markdown:
        arguments.markdown.write_text(markdown_table(rows))
    if arguments.plot:
        write_plot(rows, arguments.plot)
    for problem in missed:
        print(f"MISSED {problem}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
