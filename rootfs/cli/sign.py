"""``guestctl sign`` and ``guestctl pack sign``: signatures of manifests and of root digests."""

from pathlib import Path

import click

from guestagent.host.ctl.layer import hex_bytes, read_signature
from guestagent.host.ctl.session import emit, reports_errors
from rootfs.cli.pack import image_of, pack
from rootfs.imagefile.errors import OsErrors
from rootfs.imagefile.output import write_file
from rootfs.pack.canonical import parse_json
from rootfs.pack.manifest import Manifest
from rootfs.pack.pack import Pack
from vsock.errors import CallError

__all__ = ("COMMANDS", "password_of", "read_signed_manifest", "signature_in")

_MAX_FILE_BYTES = 64 << 20


@click.command("sign")
@click.argument("manifest", type=click.Path(), required=False)
@click.option(
    "--root-digest",
    type=hex_bytes,
    metavar="HEX",
    help="Sign this digest for the kernel, instead of a manifest.",
)
@click.option("--key", type=click.Path(), help="Private key; with --verify the public one.")
@click.option(
    "--certificate", type=click.Path(), help="The certificate of the key, for --root-digest."
)
@click.option(
    "--password-file", type=click.Path(), help="File whose first line is the password of the key."
)
@click.option("--signature", type=click.Path(), help="Default: MANIFEST.sig.")
@click.option("--verify", is_flag=True, help="Check a signature instead of making one.")
@reports_errors
def sign_command(
    *,
    manifest: str | None,
    root_digest: bytes | None,
    key: str | None,
    certificate: str | None,
    password_file: str | None,
    signature: str | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Sign MANIFEST (Ed25519 or ECDSA P-256), or a root digest (PKCS#7, as the kernel checks it).

    \b
    guestctl sign --key KEY MANIFEST
    guestctl sign --verify --key PUBLIC-KEY MANIFEST
    guestctl sign --key KEY --certificate CRT --root-digest HEX --signature FILE
    guestctl sign --verify --certificate CRT --root-digest HEX --signature FILE
    """
    if (manifest is None) == (root_digest is None):
        raise click.UsageError("give either a MANIFEST or --root-digest")
    if manifest is not None:
        path = signature or f"{manifest}.sig"
        by = _needed("--key", key)
        if verify:
            _, signer = read_signed_manifest(manifest, path, by)
        else:
            signer = _sign_manifest(manifest, path, by, password_file)
    else:
        assert root_digest is not None
        path = _needed("--signature", signature)
        named = _needed("--certificate", certificate)
        signer = named
        if verify:
            _verify_root(root_digest, path, named)
        else:
            _sign_root(root_digest, path, named, _needed("--key", key), password_file)
    if as_json:
        emit({"signature": path, "signer": signer, "verified": verify})
    else:
        click.echo(f"{'good signature' if verify else 'signed'}: {path} by {signer}")


@pack.command("sign")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(), help="Private key: RSA or EC.")
@click.option("--certificate", type=click.Path(), help="The certificate of the key.")
@click.option(
    "--password-file", type=click.Path(), help="File whose first line is the password of the key."
)
@click.option(
    "--signatures",
    type=click.Path(file_okay=False, path_type=Path),
    help="Take ID.p7s from this directory, instead of signing with a key.",
)
@reports_errors
def pack_sign_command(
    *,
    image: Path,
    key: str | None,
    certificate: str | None,
    password_file: str | None,
    signatures: Path | None,
    as_json: bool,
) -> None:
    """Sign the root digests of all verified layers and images of a pack, for the kernel.

    The signatures go into the manifest; `pack mount` and the boot hook hand them on. Sign the
    manifest itself afterwards.
    """
    if signatures is not None and (key or certificate or password_file):
        raise click.UsageError("--signatures is instead of --key and --certificate")
    with Pack.open(image_of(image), writable=True) as opened:
        digests = opened.manifest.root_digests
        if signatures is not None:
            made = {name: signature_in(signatures, name) for name in digests}
        else:
            from rootfs.pack.keys import load_certificate, load_private_key
            from rootfs.pack.pkcs7 import sign_root_digest

            by = load_certificate(_needed("--certificate", certificate))
            private = load_private_key(_needed("--key", key), password=password_of(password_file))
            made = {name: sign_root_digest(each, by, private) for name, each in digests.items()}
        opened.sign(made)
    if as_json:
        emit({"signed": list(made)})
    else:
        click.echo(f"signed: {', '.join(made) or 'nothing, no layer is verified'}")


def signature_in(directory: Path, name: str) -> bytes:
    """Read the signature of a layer or an image from a directory of signatures.

    Raises:
        CallError: by errno.
    """
    path = directory / f"{name}.p7s"
    with OsErrors("read the signature", path), path.open("rb") as file:
        return read_signature(file)


def _needed(name: str, value: str | None) -> str:
    if value is None:
        raise click.UsageError(f"{name} is needed for this")
    return value


def _sign_manifest(manifest: str, path: str, key: str, password_file: str | None) -> str:
    from rootfs.pack.keys import load_private_key
    from rootfs.pack.signing import sign_manifest

    private = load_private_key(key, password=password_of(password_file))
    made = sign_manifest(_manifest(manifest), private)
    write_file(path, made.to_json(), inputs=(manifest, key))
    return made.key_id


def read_signed_manifest(manifest: str, path: str, key: str) -> tuple[Manifest, str]:
    """Read a manifest whose signature ``path`` is by a public key; return it, as it was signed, and
    the name of the key.

    Raises:
        CallError: as ``verify_manifest``; a file cannot be read.
    """
    from rootfs.pack.keys import load_public_key
    from rootfs.pack.signing import Signature, verify_manifest

    found, fields = Signature.parse(_read(path)), _manifest(manifest)
    verify_manifest(fields, found, load_public_key(key))
    return Manifest.from_json(fields), found.key_id


def _sign_root(
    root_digest: bytes, path: str, certificate: str, key: str, password_file: str | None
) -> None:
    from rootfs.pack.keys import load_certificate, load_private_key
    from rootfs.pack.pkcs7 import sign_root_digest

    private = load_private_key(key, password=password_of(password_file))
    made = sign_root_digest(root_digest, load_certificate(certificate), private)
    write_file(path, made, inputs=(key, certificate))


def _verify_root(root_digest: bytes, path: str, certificate: str) -> None:
    from rootfs.pack.keys import load_certificate
    from rootfs.pack.pkcs7 import verify_root_digest

    verify_root_digest(root_digest, _read(path), load_certificate(certificate))


def _manifest(path: str) -> dict[str, object]:
    try:
        fields = parse_json(_read(path))
        Manifest.from_json(fields)  # the signature says that it is a manifest
        return fields
    except ValueError as problem:
        raise CallError(
            "invalid", f"cannot read the manifest {path!r}: {problem}", step="read", object=path
        ) from None


def password_of(path: str | None) -> bytes | None:
    """Return the password of a key, the first line of a file.

    Raises:
        CallError: by errno.
    """
    return None if path is None else _read(path).split(b"\n", 1)[0]


def _read(path: str) -> bytes:
    with OsErrors("read", path), open(path, "rb") as file:
        return file.read(_MAX_FILE_BYTES)


#: For ``guestctl`` itself.
COMMANDS: tuple[click.Command, ...] = (sign_command,)
