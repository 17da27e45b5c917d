"""``guestctl layer format | verify | dump`` and ``guestctl sign`` as a script sees them."""

import hashlib
import json
import os
import pty
import random
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from rootfs.cli.layer import COMMANDS, LAYER_COMMANDS
from rootfs.verity.formatter import LAYER_SALT, derive_uuid
from tests.beds.keybed import certificate_of, write_certificate, write_key, write_public

NOISE = random.Random(3).randbytes(300 * 4096)
EVERYTHING = click.Group("guestctl", commands=[*LAYER_COMMANDS, *COMMANDS])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(NOISE)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(EVERYTHING, [str(argument) for argument in arguments])


def run_json(*arguments: str | Path) -> dict[str, object]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert isinstance(facts, dict)
    return facts


def test_format_dump_verify(image: Path) -> None:
    facts = run_json("format", "--salt", "00ff", image)
    assert facts["salt"] == "00ff"
    assert facts["data_blocks"] == 300
    assert facts["end_bytes"] == image.stat().st_size
    assert run_json("dump", image) == facts
    root = str(facts["root_digest"])
    result = run("verify", "--root-digest", root, image)
    assert (result.exit_code, result.stdout) == (
        0,
        f"intact: data blocks 0:300 of {image} match the root digest\n",
    )
    text = run("dump", image)
    assert text.stdout.splitlines()[-1].split() == ["root_digest", root]


def test_verify_names_what_is_corrupt(image: Path) -> None:
    facts = run_json("format", image)
    with image.open("r+b") as file:
        file.seek(7 * 4096)
        file.write(bytes(2 * 4096))
    result = run("verify", image)
    assert result.exit_code == 1
    assert "  data block 7-8\n" in result.stdout
    assert run("verify", "--range", "9:", image).exit_code == 0
    assert run("verify", "--range", ":8", image).exit_code == 1
    result = run("verify", "--json", image)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["corrupt_data"] == [{"first": 7, "count": 2}]
    assert found["root_digest"] == facts["root_digest"]
    result = run("verify", "--root-digest", "00" * 32, image)
    assert "hash block 0 of level 1" in result.stdout
    assert "unproven: data block 0-299" in result.stdout


def test_a_tree_apart_without_a_superblock(image: Path, tmp_path: Path) -> None:
    hashes = tmp_path / "hashes"
    terms = ("--no-superblock", "--salt", "-", "--hash", "sha512", "--hash-file", str(hashes))
    facts = run_json("format", *terms, image)
    root = str(facts["root_digest"])
    assert len(root) == 128
    known = (*terms, "--data-blocks", "300")
    assert run("verify", *known, "--root-digest", root, image).exit_code == 0
    result = run("verify", *known[:-1], "299", "--root-digest", root, image)
    assert result.exit_code == 1
    assert "the hash tree is not over 299 blocks" in result.stderr
    assert image.read_bytes() == NOISE


def test_reproducible_layers(image: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    twin.write_bytes(NOISE)
    facts = run_json("format", "--reproducible", image)
    assert run_json("format", "--reproducible", twin) == facts
    assert image.read_bytes() == twin.read_bytes()
    assert run_json("format", "--reproducible", "--force", twin) == facts
    identity = derive_uuid(hashlib.sha256(NOISE).digest())
    assert (facts["salt"], facts["uuid"]) == (LAYER_SALT.hex(), str(identity))


def test_errors_say_what_to_do_and_exit_with_1(image: Path, tmp_path: Path) -> None:
    os.truncate(image, 4097)
    result = run("format", image)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"invalid: cannot format {str(image)!r}: its 4097 bytes" in result.stderr
    assert "hint: truncate -s %4096" in result.stderr
    result = run("format", "--json", tmp_path / "missing")
    assert result.exit_code == 1
    error = json.loads(result.stdout)["error"]
    assert (error["code"], error["errno"]) == ("not_found", "ENOENT")
    assert run("dump", image).exit_code == 1
    assert os.listdir(tmp_path) == ["image"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("format",),
        ("format", "--salt", "0", "x"),
        ("format", "--salt", "0 0 ", "x"),
        ("format", "--salt", "", "x"),
        ("format", "--uuid", "1", "x"),
        ("format", "--hash", "md5", "x"),
        ("format", "--hash-type", "2", "x"),
        ("format", "--reproducible", "--salt", "00", "x"),
        ("verify", "--range", "5", "x"),
        ("verify", "--range", "-1:5", "x"),
        ("verify", "--range", "a:b", "x"),
        ("sign",),
        ("sign", "x"),
        ("sign", "--key", "k", "--root-digest", "00", "x"),
        ("sign", "--key", "k", "--root-digest", "00"),
        ("sign", "--key", "k", "--root-digest", "00", "--signature", "s"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_signing_a_manifest(tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    private = write_key(tmp_path / "key", key, b"secret")
    public = write_public(tmp_path / "public", key)
    password = tmp_path / "password"
    password.write_text("secret\n")
    manifest = tmp_path / "manifest.json"
    fields = {"version": 1, "image": "p", "size_bytes": 0, "alignment_bytes": 4096, "layers": []}
    manifest.write_text(json.dumps(fields))
    result = run("sign", "--key", private, manifest)
    assert result.exit_code == 1
    assert "encrypted" in result.stderr
    assert not (tmp_path / "manifest.json.sig").exists()
    signed = run_json("sign", "--key", private, "--password-file", password, manifest)
    manifest.write_text(json.dumps(fields, indent=2, sort_keys=True))  # the same
    checked = run_json("sign", "--verify", "--key", public, manifest)
    assert checked == {**signed, "verified": True}
    manifest.write_text(json.dumps({**fields, "image": "other"}))
    result = run("sign", "--verify", "--key", public, manifest)
    assert result.exit_code == 1
    assert "the signature does not hold" in result.stderr


def test_signing_a_root_digest(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate: x509.Certificate = certificate_of(key)
    private = write_key(tmp_path / "key", key)
    named = write_certificate(tmp_path / "crt", certificate)
    place = ("--certificate", str(named), "--signature", str(tmp_path / "p7s"))
    assert run("sign", "--key", private, *place, "--root-digest", "ab" * 32).exit_code == 0
    assert run("sign", "--verify", *place, "--root-digest", "ab" * 32).exit_code == 0
    assert run("sign", "--verify", *place, "--root-digest", "cd" * 32).exit_code == 1


def test_a_bar_for_a_person_and_nothing_for_a_pipe(image: Path) -> None:
    script = "from rootfs.cli.layer import format_command; format_command()"
    command = [sys.executable, "-c", script, str(image)]
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert piped.stderr == ""
    assert "root_digest" in piped.stdout
    leader, follower = pty.openpty()
    try:
        shown = subprocess.run(
            [*command, "--force"],
            stdout=subprocess.PIPE,
            stderr=follower,
            env={**os.environ, "TERM": "xterm"},
            check=True,
        )
        assert b"hashing" in os.read(leader, 65536)
        assert b"hashing" not in shown.stdout
    finally:
        os.close(leader)
        os.close(follower)
