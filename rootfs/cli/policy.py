"""``guestctl policy``, the commands that need no guest: policies are made, compared and signed."""

import base64
import hashlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack

import click

from guestagent.host.ctl.policy import policy
from guestagent.host.ctl.progress import progress_bar
from guestagent.host.ctl.session import emit, reports_errors
from guestagent.host.ctl.style import plain
from guestagent.policy.document import (
    DEVICE_KINDS,
    NoScratch,
    Policy,
    PolicyLayer,
    ScratchOnDevice,
    ScratchOnTmpfs,
    ScratchRule,
)
from guestagent.policy.table import CONSOLE_COMMANDS, LISTED_RULES, METHOD_RULES
from rootfs.cli.pack import manifest_of, source_options
from rootfs.cli.packmount import find_image
from rootfs.image.source import SourceChoices
from rootfs.imagefile.inputs import read_input
from rootfs.imagefile.output import check_output, write_file
from rootfs.pack.pack import manifest_path_of
from rootfs.policy.files import TEES, load_policy, policy_bytes, read_policy_file
from rootfs.policy.generate import FORMS, Choices, layer_of, policy_of_pack, policy_of_stacks

__all__ = ("policy",)

Command = TypeVar("Command", bound=Callable[..., None])
_SIZE = re.compile(r"([0-9]{1,18})([KMGT]?)", re.ASCII)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_METHODS = sorted(method for method, rule in METHOD_RULES.items() if rule in LISTED_RULES)


class ChoiceWords(TypedDict):
    """What the options of ``policy_options`` have read, by the fields of ``Choices``."""

    name: str | None
    svn: int
    scratch: tuple[ScratchRule, ...]
    suid: bool
    instances: int
    devices: tuple[str, ...]
    methods: tuple[str, ...]
    console: tuple[str, ...]
    log: str
    errors: str


def _scratch(
    _context: click.Context, _parameter: click.Parameter, words: tuple[str, ...]
) -> object:
    return tuple(map(_scratch_rule, words)) or (NoScratch(),)


def _scratch_rule(text: str) -> ScratchRule:
    kind, _, size = text.partition("=")
    match = _SIZE.fullmatch(size)
    size_bytes = int(match[1]) * _UNITS[match[2]] if match else None
    try:
        if text == "none":
            return NoScratch()
        if kind == "tmpfs" and size_bytes is not None:
            return ScratchOnTmpfs(max_bytes=size_bytes)
        if text == "device":
            return ScratchOnDevice()
        if kind == "device" and size_bytes is not None:
            return ScratchOnDevice(max_bytes=size_bytes)
    except ValueError as problem:
        raise click.BadParameter(f"{text!r}: {problem}") from None
    raise click.BadParameter(f"{text!r} is not none, tmpfs=SIZE, device or device=SIZE")


_output_option = click.option(
    "--output", "-o", type=click.Path(), help="Default: the standard output."
)
_OPTIONS = (
    _output_option,
    click.option("--name", metavar="NAME", help="Of the policy. Default: that of the image."),
    click.option(
        "--svn", type=click.IntRange(min=0), default=0, help="Security version. Default: 0."
    ),
    click.option(
        "--scratch",
        multiple=True,
        callback=_scratch,
        metavar="none|tmpfs=SIZE|device[=SIZE]",
        help="Where changes of an overlay may go; may be repeated. A device is encrypted. "
        "Default: none.",
    ),
    click.option("--suid", is_flag=True, help="Overlays are mounted with set-uid programs."),
    click.option(
        "--instances",
        type=click.IntRange(1, 4096),
        default=1,
        help="Mounts of the same layer or overlay at a time. Default: 1.",
    ),
    click.option(
        "--device",
        "devices",
        type=click.Choice(DEVICE_KINDS),
        multiple=True,
        default=Choices().devices,
        help="A kind of devices; may be repeated. Default: pmem and virtio-blk.",
    ),
    click.option(
        "--allow",
        "methods",
        type=click.Choice(_METHODS),
        metavar="METHOD",
        multiple=True,
        help="A method to allow besides those that mount, unmount and list; may be repeated.",
    ),
    click.option(
        "--console",
        type=click.Choice(sorted(CONSOLE_COMMANDS)),
        metavar="COMMAND",
        multiple=True,
        help="A command of the console to allow; may be repeated. sh allows a shell.",
    ),
    click.option("--log", type=click.Choice(("none", "codes", "full")), default="none"),
    click.option("--errors", type=click.Choice(("codes", "text")), default="codes"),
)


def policy_options(command: Command) -> Command:
    """Add the options that say what a policy has beside its layers."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_form_option = click.option(
    "--form",
    type=click.Choice(FORMS),
    default=FORMS[0],
    help="Of an image: one mount, an overlay of its layers, or either (default).",
)
_image_option = click.option(
    "--image", "image_ids", metavar="ID", multiple=True, help="Only this image; may be repeated."
)


def _write(made: Policy, output: str | None, inputs: Iterable[str | Path], as_json: bool) -> None:
    """Write the bytes of a policy, or print them as they are: a digest is over just these."""
    raw = policy_bytes(made)
    if output is None:
        click.echo(raw, nl=False)
        return
    write_file(output, raw, inputs=inputs)
    digest = hashlib.sha256(raw).hexdigest()
    if as_json:
        emit({"path": output, "name": made.name, "svn": made.svn, "sha256": digest})
    else:
        layers, chains = len(made.layers), len(made.chains)
        click.echo(f"{plain(output)}: policy {made.name}, {layers} layers, {chains} overlays")
        click.echo(f"sha256:{digest}")


@policy.command("from-pack")
@click.argument("pack", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(), help="Public key that the manifest's .sig must be by.")
@_image_option
@_form_option
@policy_options
@reports_errors
def from_pack_command(
    *,
    pack: Path,
    key: str | None,
    image_ids: tuple[str, ...],
    form: str,
    output: str | None,
    as_json: bool,
    **words: Unpack[ChoiceWords],
) -> None:
    """Make a policy of a pack or its manifest.

    It is for the images of PACK, or for an overlay of all its layers if it has none.
    """
    if key is None:
        manifest = manifest_of(pack)
    else:
        from rootfs.cli.sign import read_signed_manifest

        path = pack if pack.suffix == ".json" else manifest_path_of(pack)
        manifest, _ = read_signed_manifest(str(path), f"{path}.sig", key)
    images = [find_image(manifest, image_id) for image_id in dict.fromkeys(image_ids)]
    made = policy_of_pack(manifest, Choices(form=form, **words), images)
    _write(made, output, (pack,), as_json)


policy.add_command(from_pack_command, "from-manifest")


@policy.command("from-image")
@click.argument("image", type=click.Path())
@_form_option
@source_options
@policy_options
@reports_errors
def from_image_command(
    *, image: str, form: str, output: str | None, as_json: bool, **words: Unpack["_ImageWords"]
) -> None:
    """Make a policy of a container image.

    It is for the layers and the merged image that `guestctl run` makes of IMAGE, an OCI layout or
    docker archive. The same image gives the same policy.
    """
    from rootfs.machine.run_image import build_image_pack

    if output is not None:
        check_output(output, inputs=(image,))
    chosen = {name: value for name, value in words.items() if name in ChoiceWords.__annotations__}
    source: SourceChoices = {name: value for name, value in words.items() if name not in chosen}  # type: ignore[assignment]
    with (
        tempfile.TemporaryDirectory(prefix="guestctl-policy-") as directory,
        progress_bar("building", as_json or output is None) as progress,
    ):
        source["progress"] = progress
        manifest = build_image_pack(image, Path(directory) / "pack.img", **source)
    made = policy_of_pack(manifest, Choices(form=form, **chosen))  # type: ignore[arg-type]
    _write(made, output, (image,), as_json)


class _ImageWords(ChoiceWords, SourceChoices):
    """The options of ``from-image``."""


@policy.command("import")
@click.argument("file", type=click.Path())
@click.option(
    "--pack",
    "packs",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A pack, or its manifest, with layers of which the file has the root digest alone; may be "
    "repeated.",
)
@policy_options
@reports_errors
def import_command(
    *,
    file: str,
    packs: tuple[Path, ...],
    output: str | None,
    as_json: bool,
    **words: Unpack[ChoiceWords],
) -> None:
    """Make a policy of one of hcsshim or Kata.

    The layer lists are taken from FILE, a policy of hcsshim or of Kata Containers. What else it
    says is not taken over; it is listed on the standard error.
    """
    from rootfs.policy.foreign import MAX_FOREIGN_BYTES, import_layers

    known: list[PolicyLayer] = []
    for pack in packs:
        manifest = manifest_of(pack)
        known += [layer_of(each, manifest.image) for each in manifest.layers if each.verity]
    found = import_layers(read_input(file, MAX_FOREIGN_BYTES, step="read"), file, known)
    made = policy_of_stacks(found.stacks, Choices(**words), name="imported", source=file)
    _write(made, output, (file, *packs), as_json)
    for what in found.left_out:
        click.echo(f"not taken over: {plain(what)}", err=True)


@policy.command("merge")
@click.argument("policies", type=click.Path(), nargs=-1, required=True)
@_output_option
@click.option("--name", metavar="NAME", help="Default: that of the first policy.")
@click.option("--svn", type=click.IntRange(min=0), help="Default: the highest of the policies.")
@reports_errors
def merge_command(
    *,
    policies: tuple[str, ...],
    output: str | None,
    name: str | None,
    svn: int | None,
    as_json: bool,
) -> None:
    """Make a policy that allows what any of POLICIES allows."""
    from rootfs.policy.order import merge

    made, *others = map(load_policy, policies)
    for other in others:
        made = merge(made, other)
    try:
        made = made.replace(name=name or made.name, svn=made.svn if svn is None else svn)
    except ValueError as problem:
        raise click.UsageError(str(problem)) from None
    _write(made, output, policies, as_json)


@policy.command("diff")
@click.argument("old", type=click.Path())
@click.argument("new", type=click.Path())
@reports_errors
def diff_command(*, old: str, new: str, as_json: bool) -> None:
    """Say in what NEW is wider or narrower than OLD.

    The exit status is 1 if NEW allows anything that OLD denies.
    """
    from rootfs.policy.order import differences

    found = differences(load_policy(old), load_policy(new))
    is_wider = any(change.is_wider for change in found)
    if as_json:
        changes = [{"where": c.where, "direction": c.direction, "text": c.text} for c in found]
        emit({"wider": is_wider, "changes": changes})
    else:
        for change in found:
            click.echo(plain(f"{change.direction}: {change.where}: {change.text}"))
        click.echo("wider" if is_wider else "nothing is wider")
    if is_wider:
        sys.exit(1)


@policy.command("check")
@click.argument("file", metavar="POLICY", type=click.Path())
@click.argument("request", type=click.Path())
@reports_errors
def check_command(*, file: str, request: str, as_json: bool) -> None:
    """Say what POLICY decides about REQUEST, and why. The exit status is 1 if it is denied.

    REQUEST is JSON: {"method": "layer.mount", "params": {...}} or {"console": COMMAND}; "mounted":
    {"layers": [...], "overlays": [...]} has what is mounted, as the parameters of the requests.
    """
    from rootfs.policy.check import MAX_QUESTION_BYTES, check_request

    raw = read_input(request, MAX_QUESTION_BYTES, step="read the request")
    denied = check_request(load_policy(file), raw, request)
    if denied is None:
        if as_json:
            emit({"allowed": True})
        else:
            click.echo("allowed")
        return
    if as_json:
        emit({"allowed": False, "rule": denied.rule, "reason": denied.reason})
    else:
        click.echo(plain(f"denied by {denied.rule}: {denied.reason}"))
    sys.exit(1)


@policy.command("explain")
@click.argument("file", metavar="POLICY", type=click.Path())
@reports_errors
def explain_command(*, file: str, as_json: bool) -> None:
    """Say in words what POLICY allows."""
    from rootfs.policy.words import explain

    lines = list(explain(load_policy(file)))
    if as_json:
        emit(lines)
    else:
        click.echo("\n".join(map(plain, lines)))


@policy.command("digest")
@click.argument("file", metavar="POLICY", type=click.Path())
@click.option("--tee", type=click.Choice(tuple(TEES)), help="For its report, as QEMU takes it too.")
@reports_errors
def digest_command(*, file: str, tee: str | None, as_json: bool) -> None:
    """Print the digest of a policy.

    It is the sha256 of the command line, or with --tee HOST_DATA of SEV-SNP (SHA-256) or MRCONFIGID
    of TDX (SHA-384).
    """
    raw, _ = read_policy_file(file)
    if tee is None:
        facts = {"sha256": hashlib.sha256(raw).hexdigest()}
    else:
        field = TEES[tee]
        digest = hashlib.new(field.algorithm, raw).digest()
        qemu = f"{field.qemu}={base64.b64encode(digest).decode('ascii')}"
        facts = {field.name: digest.hex(), "qemu": qemu}
    if as_json:
        emit(facts)
    else:
        for name, value in facts.items():
            click.echo(value if tee is None else f"{name} {value}")


@policy.command("sign")
@click.argument("file", metavar="POLICY", type=click.Path())
@click.option(
    "--key", type=click.Path(), required=True, help="Private key; with --verify the public one."
)
@click.option(
    "--password-file", type=click.Path(), help="File whose first line is the password of the key."
)
@click.option("--signature", type=click.Path(), help="Default: POLICY.sig.")
@click.option("--verify", is_flag=True, help="Check a signature instead of making one.")
@reports_errors
def sign_command(
    *,
    file: str,
    key: str,
    password_file: str | None,
    signature: str | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Sign a policy (Ed25519), for boot images with the key."""
    from rootfs.cli.sign import password_of
    from rootfs.pack.keys import load_private_key, load_public_key
    from rootfs.policy.signature import SIGNATURE_BYTES, sign_policy, verify_policy

    raw, _ = read_policy_file(file)
    path = signature or f"{file}.sig"
    if verify:
        found = read_input(path, SIGNATURE_BYTES, step="read the signature")
        verify_policy(raw, found, load_public_key(key))
    else:
        made = sign_policy(raw, load_private_key(key, password=password_of(password_file)))
        write_file(path, made, inputs=(file, key))
    if as_json:
        emit({"signature": path, "verified": verify})
    else:
        click.echo(f"{'good signature' if verify else 'signed'}: {plain(path)}")


@policy.command("key")
@click.argument("key", type=click.Path())
@click.option("--min-svn", type=click.IntRange(min=0), default=0, show_default=True)
@_output_option
@reports_errors
def key_command(*, key: str, min_svn: int, output: str | None, as_json: bool) -> None:
    """Write a public key for a boot image.

    A boot image with this file as /etc/guestagent/policy.key asks for a policy signed by KEY.
    """
    from rootfs.pack.keys import load_public_key
    from rootfs.policy.signature import key_line

    line = key_line(load_public_key(key), min_svn)
    if output is not None:
        write_file(output, line, inputs=(key,))
    if as_json:
        emit({"key": line.decode("ascii").strip(), "path": output})
    elif output is None:
        click.echo(line, nl=False)
