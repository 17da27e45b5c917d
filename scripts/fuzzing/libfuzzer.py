"""One target in libFuzzer, by atheris: ``python -m scripts.fuzzing.libfuzzer TARGET OPTION...``"""

import importlib
import sys

import atheris

with atheris.instrument_imports(include=["guestagent", "rootfs", "vsock"]):
    targets = importlib.import_module("scripts.fuzzing.targets")
    for method in targets.METHODS:  # loads the records of late parts
        targets.METHODS.get(method)


def main() -> None:
    name, *options = sys.argv[1:]
    run = targets.TARGETS[name].run

    def once(data: bytes) -> None:
        run(data)

    atheris.Setup([sys.argv[0], *options], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
