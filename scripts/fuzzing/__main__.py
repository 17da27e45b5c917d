"""Fuzz the targets, each in a process of its own; see ``scripts/fuzz``."""

import argparse
import subprocess
import sys
from pathlib import Path

from scripts.fuzzing.targets import TARGETS

PROJECT = Path(__file__).resolve().parents[2]
CACHE = PROJECT / ".cache/fuzz"
#: What a fuzzer may take to start and to end, on a machine that has much to do.
_MORE_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description="Fuzz the readers of foreign bytes.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=" ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each (default %(default)s)")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="run a target over a file")
    arguments = parser.parse_args()
    names = arguments.targets or list(TARGETS)
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        parser.error(f"no such target: {unknown[0]}; there are {', '.join(TARGETS)}")
    if arguments.repeat is not None:
        if len(names) != 1:
            parser.error("--repeat takes one target")
        TARGETS[names[0]].run(arguments.repeat.read_bytes())
        return 0
    outcomes = {name: fuzz(name, arguments.seconds) for name in names}
    return int(any(outcomes.values()))


def fuzz(name: str, seconds: int) -> bool:
    """Fuzz a target; return whether something was found, which is named and in a file."""
    places = {kind: CACHE / kind / name for kind in ("seeds", "corpus", "found")}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds()):
        (places["seeds"] / f"{number:03d}").write_bytes(seed)
    before = set(places["found"].iterdir())
    command = [sys.executable, "-m", "scripts.fuzzing.libfuzzer", name]
    command += [str(places["corpus"]), str(places["seeds"]), f"-artifact_prefix={places['found']}/"]
    command += [f"-max_total_time={seconds}", f"-max_len={TARGETS[name].max_bytes}"]
    command += ["-timeout=30", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=1"]
    status: int | str
    with (CACHE / f"{name}.log").open("w+b") as log:
        try:
            done = subprocess.run(
                command, cwd=PROJECT, stdout=log, stderr=log, timeout=seconds + _MORE_SECONDS
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = f"none after {seconds + _MORE_SECONDS} s"
        log.seek(0)
        said = log.read().decode(errors="replace")
    counts = [line.split()[1] for line in said.splitlines() if "number_of_executed_units" in line]
    sys.stdout.write(f"{name}: {counts[0] if counts else '?'} inputs in {seconds} s\n")
    found = set(places["found"].iterdir()) - before
    for path in sorted(found):
        shown = path.relative_to(PROJECT)
        sys.stdout.write(f"FOUND {shown}; repeat it: scripts/fuzz {name} --repeat {shown}\n")
    if status and not found:
        sys.stdout.write(f"FAILED with status {status}:\n{said[-2000:]}\n")
    return bool(status or found)


if __name__ == "__main__":
    sys.exit(main())
