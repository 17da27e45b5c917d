"""The targets of ``scripts/fuzz`` over their seeds and changed ones, without the fuzzer."""

import random

import pytest

from scripts.fuzzing.targets import TARGETS

CHANGES = 400


def changed(seed: bytes, chance: random.Random) -> bytes:
    """Flip, cut, repeat or put in a few bytes."""
    data = bytearray(seed)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        size = chance.choice((1, 1, 2, 4, 64))
        match chance.randrange(4):
            case 0:
                data[at : at + size] = chance.randbytes(size)
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case _:
                data[at : at + size] = chance.choice((b"\0", b"\xff", b"7")) * size
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_target_over_its_seeds_and_changed_ones(name: str) -> None:
    target, chance = TARGETS[name], random.Random(1)
    seeds = list(target.seeds())
    taken = [target.run(seed) for seed in seeds]
    assert taken.count(True) > len(seeds) * 0.9, taken
    target.run(b"")
    for number in range(CHANGES):
        target.run(changed(seeds[number % len(seeds)], chance))
