"""Policies in words, for a person who has to agree to one."""

from collections.abc import Iterator, Sequence

from guestagent.api.checks import MAX_BYTES
from guestagent.policy.document import (
    Chain,
    ExactRequest,
    Exposure,
    NoScratch,
    Policy,
    PolicyLayer,
    RunLimits,
    ScratchOnTmpfs,
    ScratchOnVolume,
    ScratchRule,
)
from guestagent.policy.table import METHOD_RULES

__all__ = ("chain_words", "explain", "request_words", "scratch_words")

_LOG = {
    "none": "nothing of the log",
    "codes": "the lines of the log with their codes, without free text",
    "full": "all of the log",
}
_CRASHES = {
    "none": "nothing of crashes",
    "count": "how many crashes there were",
    "full": "all crash reports",
}
_ERRORS = {"codes": "of errors the code alone", "text": "the texts of errors"}
_DM = {
    "none": "nothing of dm devices",
    "names": "the names of dm devices",
    "tables": "the tables of dm devices, but for those with keys",
}


def explain(policy: Policy) -> Iterator[str]:
    """Yield the lines that say what a policy allows; what they do not name is denied."""
    yield f"policy {policy.name}, security version {policy.svn}"
    if policy.requires:
        yield f"for agents that know {_listed(policy.requires)}"
    yield from _section(
        "layers that may be mounted, each with this whole hash tree:", policy.layers
    )
    yield from _section("overlays that may be mounted:", policy.chains)
    yield from _section("requests that are allowed word for word:", policy.exact)
    if policy.layers:
        devices = policy.devices
        yield f"devices of layers: {_listed(devices.kinds)}"
        yield f"  writable ones: {_listed(devices.readonly_policies)}"
        yield f"  verity presets: {_listed(devices.presets)}; options: {_listed(devices.options)}"
        if devices.hash_device:
            yield "  the hash tree may be on a device of its own"
        if devices.signed:
            yield "  root digests must have a signature for the kernel"
    yield from _exposure(policy.expose)
    yield from _limits(policy.run)


def _section(
    title: str, members: Sequence[PolicyLayer] | Sequence[Chain] | Sequence[ExactRequest]
) -> Iterator[str]:
    yield title if members else f"{title} none"
    for member in members:
        if isinstance(member, PolicyLayer):
            yield from _layer(member)
        elif isinstance(member, Chain):
            yield from _chain(member)
        else:
            yield f"  {request_words(member)}"


def _layer(layer: PolicyLayer) -> Iterator[str]:
    verity = layer.verity
    size = "of any size" if layer.size_bytes is None else f"{layer.size_bytes} bytes"
    yield f"  {layer.id}: {layer.filesystem}, {size}, whiteouts {layer.whiteouts or 'not said'}"
    yield f"    root digest {verity.algorithm}:{verity.root_digest.hex()}"
    yield (
        f"    salt {verity.salt.hex() or '-'}, hash type {verity.hash_type}, {verity.data_blocks} "
        f"blocks of {verity.data_block_size}, hashes in blocks of {verity.hash_block_size} from "
        f"byte {verity.hash_offset_bytes}, {'with' if verity.superblock else 'without'} superblock"
    )
    yield f"    at {_listed(layer.targets)}, {_times(layer.max_instances)}"


def _chain(chain: Chain) -> Iterator[str]:
    yield f"  {chain.name}: {chain_words(chain)}"
    yield f"    changes: {'; or '.join(map(scratch_words, chain.scratch))}"
    yield f"    at {_listed(chain.targets)}, {_times(chain.max_instances)}"


def chain_words(chain: Chain) -> str:
    """Return which layers a chain overlays, with which options."""
    said = chain.options.to_sparse_wire().items()
    options = [name if value is True else f"{name}={value}" for name, value in said]
    return f"{' over '.join(chain.layers)}, options: {_listed(options)}"


def scratch_words(rule: ScratchRule) -> str:
    """Return where a rule lets the changes of an overlay go."""
    if isinstance(rule, NoScratch):
        return "none, it is read-only"
    if isinstance(rule, ScratchOnTmpfs):
        return f"in memory, at most {rule.max_bytes} bytes"
    size = "any size" if rule.max_bytes == MAX_BYTES else f"at most {rule.max_bytes} bytes"
    encrypted = "encrypted" if rule.encrypted else "encrypted or not"
    filesystems = f"{_listed(rule.filesystems)}, {encrypted}"
    if isinstance(rule, ScratchOnVolume):
        pools = _listed(rule.pools)
        return f"on a volume of the pool {pools}, {size}, {filesystems}"
    extra = [word for word in ("shared", "discard") if getattr(rule, word)]
    return ", ".join(
        [
            f"on a device of {size}",
            filesystems,
            f"existing file system: {_listed(rule.existing)}",
            *extra,
        ]
    )


def request_words(exact: ExactRequest) -> str:
    """Return an exact request with what it says beside the defaults."""
    params = exact.request().to_sparse_wire()
    return " ".join([exact.method, *(f"{name}={value!r}" for name, value in params.items())])


def _exposure(expose: Exposure) -> Iterator[str]:
    always = sorted(m for m, rule in METHOD_RULES.items() if rule in ("always", "observed"))
    yield f"methods: {_listed(expose.methods)}; and always: {_listed((*always, 'agent.shutdown'))}"
    yield "the host learns:"
    events = _listed(expose.events.kinds)
    yield f"  events: {events}" + (
        f", with {_listed(expose.events.fields)}" if expose.events.kinds else ""
    )
    for words in (_LOG[expose.log], _CRASHES[expose.crashes], _ERRORS[expose.errors]):
        yield f"  {words}"
    yield f"  {_DM[expose.dm]}"
    yield f"  metrics: {_listed(expose.metrics)}"
    yield f"  files in layers: {_listed(expose.inspect.layers)}"
    yield f"  files in overlays: {'all' if expose.inspect.overlays else 'none'}"
    yield f"  commands of the console: {_listed(expose.console)}" + (
        ", a shell too" if expose.shell else ""
    )


def _limits(run: RunLimits) -> Iterator[str]:
    yield f"the machine may be ended by: {_listed(run.shutdown)}"
    yield f"force: {'allowed' if run.force else 'denied'}"
    yield (
        f"at most {run.max_layers} layers and {run.max_overlays} overlays at a time, and "
        f"{run.max_deadline_ms} ms for a request"
    )


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} at a time"


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words) or "none"
