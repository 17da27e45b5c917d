"""Which of two policies allows more, field by field: how they differ, and what allows both.

Every field of a policy has one row in ``_ROWS``. The row says in which direction the field allows
more, which serves the comparison and the union alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from guestagent.policy.document import (
    Chain,
    DeviceRules,
    ExactRequest,
    ExposedEvents,
    Exposure,
    Inspection,
    NoScratch,
    Policy,
    PolicyLayer,
    RunLimits,
    ScratchOnDevice,
    ScratchOnTmpfs,
    ScratchOnVolume,
    ScratchRule,
)
from rootfs.policy.words import chain_words, request_words, scratch_words
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("BOTH", "NARROWER", "NEITHER", "WIDER", "Change", "differences", "free_name", "merge")

WIDER = "wider"
NARROWER = "narrower"
#: Allows what was denied, and denies what was allowed.
BOTH = "wider and narrower"
NEITHER = "neither"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One difference. ``where`` is the path of the field, or the layer or chain by its name."""

    where: str
    direction: str
    text: str

    @property
    def is_wider(self) -> bool:
        return self.direction in (WIDER, BOTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """How a field is compared: ``changes`` yields directions and texts for two unequal values, and
    ``join`` returns the least value that allows what either does, or raises ValueError; without one
    the first stays."""

    changes: Callable[[object, object], Iterator[tuple[str, str]]]
    join: Callable[[object, object], object] = lambda one, _: one


def _names() -> _Row:
    """A set of names, each of which allows more."""

    def changes(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[str, str]]:
        yield from ((WIDER, f"{name} is allowed") for name in new if name not in old)
        yield from ((NARROWER, f"{name} is no longer allowed") for name in old if name not in new)

    def join(one: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
        return (*one, *(name for name in other if name not in one))

    return _Row(changes=changes, join=join)  # type: ignore[arg-type]  # of such a field


def _ranked(rank: Callable[[object], int]) -> _Row:
    """Values of which one of a higher rank allows all that one of a lower rank does."""

    def changes(old: object, new: object) -> Iterator[tuple[str, str]]:
        if old != new:
            yield WIDER if rank(new) > rank(old) else NARROWER, f"{_shown(old)} -> {_shown(new)}"

    return _Row(changes=changes, join=lambda one, other: max(one, other, key=rank))


def _partly(*, widest: object = ..., narrowest: object = ...) -> _Row:
    """Values that exclude each other, but for one that allows everything, or one the least."""

    def rank(value: object) -> int:
        return 2 if value is widest else 0 if value is narrowest else 1

    def changes(old: object, new: object) -> Iterator[tuple[str, str]]:
        if old != new:
            step = rank(new) - rank(old)
            direction = WIDER if step > 0 else NARROWER if step < 0 else BOTH
            yield direction, f"{_shown(old)} -> {_shown(new)}"

    def join(one: object, other: object) -> object:
        if one != other and rank(one) == rank(other):
            raise ValueError(f"{_shown(one)} and {_shown(other)} exclude each other")
        return max(one, other, key=rank)

    return _Row(changes=changes, join=join)


def _label() -> _Row:
    """A value that allows nothing."""

    def changes(old: object, new: object) -> Iterator[tuple[str, str]]:
        if old != new:
            yield NEITHER, f"{_shown(old)} -> {_shown(new)}"

    return _Row(changes=changes)


def _part(kind: type[Record]) -> _Row:
    def join(one: object, other: object) -> object:
        assert isinstance(one, kind)
        assert isinstance(other, kind)
        return one.replace(**_joined(one, other))

    return _Row(changes=lambda old, new: iter(()), join=join)


def _scratches() -> _Row:
    def changes(
        old: Sequence[ScratchRule], new: Sequence[ScratchRule]
    ) -> Iterator[tuple[str, str]]:
        for rule in new:
            if not any(_covers(each, rule) for each in old):
                yield WIDER, f"changes may go: {scratch_words(rule)}"
        for rule in old:
            if not any(_covers(each, rule) for each in new):
                yield NARROWER, f"changes may no longer go: {scratch_words(rule)}"

    return _Row(changes=changes)  # type: ignore[arg-type]  # of such a field


def _levels(*names: str) -> _Row:
    return _ranked(lambda value: names.index(str(value)))


_NAMES, _LABEL, _SAME = _names(), _label(), _partly()
#: Members that are compared and joined one by one.
_APART = _Row(changes=lambda old, new: iter(()))
_NUMBER = _ranked(lambda value: int(str(value)))
_ALLOWS, _DEMANDS = _levels("False", "True"), _levels("True", "False")

#: Record -> field -> how it is compared. A field without a row is an error.
_ROWS: Mapping[type[Record], Mapping[str, _Row]] = {
    Policy: {
        "type": _SAME,
        "version": _SAME,
        "name": _LABEL,
        "svn": _LABEL,
        "requires": _SAME,
        "layers": _APART,
        "chains": _APART,
        "exact": _APART,
        "devices": _part(DeviceRules),
        "expose": _part(Exposure),
        "run": _part(RunLimits),
    },
    PolicyLayer: {
        "id": _LABEL,
        "verity": _SAME,
        "filesystem": _SAME,
        "size_bytes": _partly(widest=None),
        "whiteouts": _partly(narrowest=None),
        "targets": _NAMES,
        "max_instances": _NUMBER,
    },
    Chain: {
        "name": _LABEL,
        "layers": _SAME,
        "options": _SAME,
        "targets": _NAMES,
        "scratch": _scratches(),
        "max_instances": _NUMBER,
    },
    NoScratch: {"kind": _SAME},
    ScratchOnTmpfs: {"kind": _SAME, "max_bytes": _NUMBER},
    ScratchOnDevice: {
        "kind": _SAME,
        "max_bytes": _NUMBER,
        "encrypted": _DEMANDS,
        "filesystems": _NAMES,
        "existing": _NAMES,
        "shared": _ALLOWS,
        "discard": _ALLOWS,
    },
    ScratchOnVolume: {
        "kind": _SAME,
        "pools": _NAMES,
        "max_bytes": _NUMBER,
        "encrypted": _DEMANDS,
        "filesystems": _NAMES,
    },
    DeviceRules: {
        "kinds": _NAMES,
        "readonly_policies": _NAMES,
        "hash_device": _ALLOWS,
        "presets": _NAMES,
        "signed": _DEMANDS,
        "options": _NAMES,
    },
    ExposedEvents: {"kinds": _NAMES, "fields": _NAMES},
    Inspection: {"layers": _NAMES, "overlays": _ALLOWS},
    Exposure: {
        "methods": _NAMES,
        "events": _part(ExposedEvents),
        "log": _levels("none", "codes", "full"),
        "crashes": _levels("none", "count", "full"),
        "metrics": _NAMES,
        "errors": _levels("codes", "text"),
        "inspect": _part(Inspection),
        "console": _NAMES,
        "shell": _ALLOWS,
        "dm": _levels("none", "names", "tables"),
    },
    RunLimits: {
        "shutdown": _NAMES,
        "force": _ALLOWS,
        "max_deadline_ms": _NUMBER,
        "max_layers": _NUMBER,
        "max_overlays": _NUMBER,
    },
}


def differences(old: Policy, new: Policy) -> tuple[Change, ...]:
    """Return how ``new`` differs from ``old`` in what it allows; nothing is wider if it allows
    nothing that ``old`` denies. Layers are the same that have the same hash tree, whatever their
    ids."""
    new = _aligned(old, new)
    found = [
        *_compare("", old, new),
        *_compare_layers(old, new),
        *_compare_chains(old.chains, new.chains),
    ]
    for direction, text, (members, others) in (
        (WIDER, "is allowed", (new.exact, old.exact)),
        (NARROWER, "is no longer allowed", (old.exact, new.exact)),
    ):
        for exact in _missing(members, others):
            words = f"{request_words(exact)} {text}"
            found.append(Change(where="exact", direction=direction, text=words))
    return tuple(found)


def merge(one: Policy, other: Policy) -> Policy:
    """Return a policy that allows what ``one`` allows and what ``other`` does.

    Layers keep their limits and chains stay apart. What is exposed, the rules of devices and the
    limits are those of both together, for the layers of both.

    Raises:
        CallError: ``conflict``, what both say of a layer excludes each other.
    """
    other = _aligned(one, other)
    layers = {layer.id: layer for layer in one.layers}
    chains = list(one.chains)
    taken = {chain.name for chain in chains}
    for chain in other.chains:
        if any(_covers(each, chain) for each in chains):
            continue
        narrow = next((each for each in chains if _covers(chain, each)), None)
        if narrow is None:
            chains.append(chain.replace(name=free_name(chain.name, taken)))
        else:
            chains[chains.index(narrow)] = chain.replace(name=narrow.name)
    try:
        for layer in other.layers:
            known = layers.get(layer.id)
            if known is not None:
                layer = known.replace(**_joined(known, layer, f"layer {layer.id}: "))
            layers[layer.id] = layer
        fields = {
            **_joined(one, other),
            "svn": max(one.svn, other.svn),
            "layers": tuple(layers.values()),
            "chains": tuple(chains),
            "exact": (*one.exact, *_missing(other.exact, one.exact)),
        }
        return one.replace(**fields)
    except ValueError as problem:
        raise CallError(
            "conflict",
            f"cannot merge the policies {one.name!r} and {other.name!r}: {problem}",
            step="merge the policies",
            object=other.name,
        ) from None


def free_name(name: str, taken: set[str]) -> str:
    """Return ``name``, or with a number behind it if it is among ``taken``; it is then there."""
    made, number = name, 1
    while made in taken:
        number += 1
        made = f"{name[: 63 - len(str(number))]}-{number}"
    taken.add(made)
    return made


def _aligned(base: Policy, policy: Policy) -> Policy:
    """Return ``policy`` with the ids that ``base`` has for the same hash trees, and for other
    trees ids that ``base`` does not have."""
    known = {layer.verity: layer.id for layer in base.layers}
    taken = set(known.values())
    ids: dict[str, str] = {}
    for layer in policy.layers:
        ids[layer.id] = known.get(layer.verity) or free_name(layer.id, taken)
    inspect = policy.expose.inspect
    seen = inspect.replace(layers=tuple(ids[layer_id] for layer_id in inspect.layers))
    return policy.replace(
        layers=tuple(layer.replace(id=ids[layer.id]) for layer in policy.layers),
        chains=tuple(
            chain.replace(layers=tuple(ids[layer_id] for layer_id in chain.layers))
            for chain in policy.chains
        ),
        expose=policy.expose.replace(inspect=seen),
    )


def _compare(where: str, old: Record, new: Record) -> Iterator[Change]:
    rows, prefix = _ROWS[type(old)], f"{where}." if where else ""
    theirs = new.as_dict()
    for name, value in old.as_dict().items():
        row, other = rows[name], theirs[name]
        if isinstance(value, Record) and type(value) in _ROWS and isinstance(other, Record):
            yield from _compare(f"{prefix}{name}", value, other)
        else:
            for direction, text in row.changes(value, other):
                yield Change(where=f"{prefix}{name}", direction=direction, text=text)


def _compare_layers(old: Policy, new: Policy) -> Iterator[Change]:
    before = {layer.id: layer for layer in old.layers}
    after = {layer.id: layer for layer in new.layers}
    for layer_id in {**before, **after}:
        where = f"layer {layer_id}"
        was, now = before.get(layer_id), after.get(layer_id)
        if was is not None and now is not None:
            yield from _compare(where, was, now)
        elif now is not None:
            text = f"it may be mounted: root digest {now.verity.root_digest.hex()}"
            yield Change(where=where, direction=WIDER, text=text)
        elif was is not None:
            yield Change(where=where, direction=NARROWER, text="it may no longer be mounted")


def _compare_chains(old: Sequence[Chain], new: Sequence[Chain]) -> Iterator[Change]:
    """Compare each chain with the one of the same layers and options, first by the same name."""
    left = list(old)
    for chain in new:
        fitting = [each for each in left if _key(each) == _key(chain)]
        was = next((each for each in fitting if each.name == chain.name), None) or next(
            iter(fitting), None
        )
        where = f"chain {chain.name}"
        if was is not None:
            left.remove(was)
            is_new = not any(_covers(each, chain) for each in old)
            is_gone = not any(_covers(each, was) for each in new)
            for change in _compare(where, was, chain):
                if {WIDER: is_new, NARROWER: is_gone}.get(change.direction, True):
                    yield change
        elif not any(_covers(each, chain) for each in old):
            text = f"the overlay may be mounted: {chain_words(chain)}"
            yield Change(where=where, direction=WIDER, text=text)
    for chain in left:
        if not any(_covers(each, chain) for each in new):
            text = f"the overlay may no longer be mounted: {chain_words(chain)}"
            yield Change(where=f"chain {chain.name}", direction=NARROWER, text=text)


def _key(chain: Chain) -> tuple[object, ...]:
    return chain.layers, chain.options


def _covers(wide: Record, narrow: Record) -> bool:
    """Say whether ``wide`` allows all that ``narrow`` does; both are chains or rules of scratch."""
    return type(wide) is type(narrow) and not any(
        change.is_wider for change in _compare("", wide, narrow)
    )


def _missing(
    members: Sequence[ExactRequest], others: Sequence[ExactRequest]
) -> Iterator[ExactRequest]:
    known = [(other.method, other.request()) for other in others]
    return (each for each in members if (each.method, each.request()) not in known)


def _joined(one: Record, other: Record, where: str = "") -> dict[str, object]:
    made = {}
    theirs = other.as_dict()
    for name, value in one.as_dict().items():
        try:
            made[name] = _ROWS[type(one)][name].join(value, theirs[name])
        except ValueError as problem:
            raise ValueError(f"{where}{name}: {problem}") from None
    return made


def _shown(value: object) -> str:
    if value is None:
        return "any"
    return str(value).lower() if isinstance(value, bool) else str(value)
