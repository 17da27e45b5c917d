"""Signatures: openssl accepts ours, ours accepts openssl's, and nothing else passes."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from rootfs.pack.canonical import canonical_bytes, parse_json
from rootfs.pack.keys import PrivateKey, load_certificate, load_private_key, load_public_key
from rootfs.pack.pkcs7 import sign_root_digest, verify_root_digest
from rootfs.pack.signing import Signature, key_id, sign_manifest, verify_manifest
from tests.beds.calls import call_error
from tests.beds.keybed import certificate_of, write_certificate, write_key, write_public
from vsock.errors import CallError

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is not installed"
)

MANIFEST: dict[str, object] = {"layers": [{"id": "größe", "size_bytes": 4096}], "version": 1}
#: Stands before the canonical form of a manifest in what is signed.
CONTEXT = b"guestagent-manifest-signature-v2\n"
ROOT = bytes(range(32))

json_values: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def ed25519_key() -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()


def p256_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


either_key = pytest.mark.parametrize("make_key", [ed25519_key, p256_key])


def openssl(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["openssl", *arguments], capture_output=True, check=False)


def test_the_canonical_form() -> None:
    value = {"b": [1, None, True], "a": {"é": '\n"/', "Z": -1}, "ab": ()}
    expected = '{"a":{"Z":-1,"é":"\\n\\"/"},"ab":[],"b":[1,null,true]}'
    assert canonical_bytes(value) == expected.encode()


@settings(max_examples=40)
@given(st.dictionaries(st.text(st.characters(codec="utf-8")), json_values, max_size=4))
def test_canonical_bytes_are_read_back_unchanged(value: dict[str, object]) -> None:
    raw = canonical_bytes(value)
    assert parse_json(raw) == value
    assert canonical_bytes(parse_json(raw)) == raw
    shuffled = json.dumps(dict(reversed(value.items())), indent=3).encode()
    assert canonical_bytes(parse_json(shuffled)) == raw


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"a": 1.5}, r"value\.a: a float"),
        ({"a": [b"x"]}, r"value\.a\[0\]: a bytes"),
        ({"a": {1: 2}}, r"value\.a: the name 1"),
        ({"a": "\ud800"}, "not encodable"),
        ({"\udfff": 1}, "not encodable"),
    ],
)
def test_value_without_canonical_form_is_refused(value: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        canonical_bytes(value)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"a":1,"a":1}', "'a' is there twice"),
        (b'{"x":[{"b":1,"b":2}]}', "'b' is there twice"),
        (b'{"a":1.0}', "1.0 is no integer"),
        (b'{"a":1e2}', "1e2 is no integer"),
        (b'{"a":NaN}', "NaN is no integer"),
        (b"[]", "not an object but list"),
        (b"\xff", "utf-8"),
        (b"{", "Expecting"),
        (b'{"a":"\\ud800"}', "not encodable"),
        (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", "nested deeper"),
        (b'{"a":' + b"[" * 100000, "nested deeper"),
    ],
)
def test_ambiguous_json_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(raw)


@either_key
def test_a_signature_holds_for_its_manifest_only(make_key: Callable[[], PrivateKey]) -> None:
    key = make_key()
    signature = sign_manifest(MANIFEST, key)
    again = Signature.parse(signature.to_json())
    assert again == signature
    verify_manifest(dict(reversed(MANIFEST.items())), again, key.public_key())
    with call_error("integrity", object="digest"):
        verify_manifest({**MANIFEST, "version": 2}, again, key.public_key())
    with call_error("integrity", object="key_id"):
        verify_manifest(MANIFEST, again, make_key().public_key())


def signature_of(message: bytes, key: PrivateKey) -> Signature:
    """Sign some bytes with the key of a manifest, and call the result a signature of a manifest."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        algorithm, value = "ed25519", key.sign(message)
    else:
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        algorithm, value = "ecdsa-p256-sha256", key.sign(message, ec.ECDSA(hashes.SHA256()))
    return Signature(
        algorithm=algorithm,
        digest="sha256:" + hashlib.sha256(CONTEXT + canonical_bytes(MANIFEST)).hexdigest(),
        key_id=key_id(key.public_key()),
        signature=value,
    )


@either_key
def test_a_signature_over_something_else_is_none_over_a_manifest(
    make_key: Callable[[], PrivateKey],
) -> None:
    key, bare = make_key(), canonical_bytes(MANIFEST)
    verify_manifest(MANIFEST, signature_of(CONTEXT + bare, key), key.public_key())
    for message in (bare, bare + b"\n", CONTEXT.replace(b"v2", b"v3") + bare, ROOT.hex().encode()):
        with call_error("integrity", object="signature"):
            verify_manifest(MANIFEST, signature_of(message, key), key.public_key())


def test_a_signature_over_a_manifest_is_none_over_something_else() -> None:
    key = ed25519_key()
    value = sign_manifest(MANIFEST, key).signature
    key.public_key().verify(value, CONTEXT + canonical_bytes(MANIFEST))
    with pytest.raises(InvalidSignature):  # of the document as a file
        key.public_key().verify(value, canonical_bytes(MANIFEST))


def test_a_signature_of_version_1_is_refused_by_name() -> None:
    fields = parse_json(sign_manifest(MANIFEST, ed25519_key()).to_json())
    with pytest.raises(CallError, match=r"version: 1 does not say .*: sign the manifest again"):
        Signature.parse(canonical_bytes({**fields, "version": 1}))


@either_key
@given(position=st.integers(0, 1000), flip=st.integers(1, 255))
def test_a_changed_signature_never_holds(
    make_key: Callable[[], PrivateKey], position: int, flip: int
) -> None:
    key = make_key()
    signature = sign_manifest(MANIFEST, key)
    value = bytearray(signature.signature)
    value[position % len(value)] ^= flip
    forged = dataclasses.replace(signature, signature=bytes(value))
    with call_error("integrity", object="signature"):
        verify_manifest(MANIFEST, forged, key.public_key())


def test_claims_in_a_signature_file_are_not_trusted() -> None:
    key, other = ed25519_key(), ed25519_key()
    right = sign_manifest(MANIFEST, key)
    by_other = sign_manifest(MANIFEST, other)
    relabelled = dataclasses.replace(right, signature=by_other.signature)
    with pytest.raises(CallError, match="not made by this key"):
        verify_manifest(MANIFEST, relabelled, key.public_key())
    misnamed = dataclasses.replace(right, algorithm="ecdsa-p256-sha256")
    with pytest.raises(CallError, match="it says ecdsa-p256-sha256, the key is ed25519"):
        verify_manifest(MANIFEST, misnamed, key.public_key())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": 1}, "version"),
        ({"version": 3}, "version"),
        ({"version": "2"}, "version"),
        ({"algorithm": "rsa"}, "algorithm"),
        ({"algorithm": 5}, "algorithm"),
        ({"digest": "sha256:00"}, "digest"),
        ({"key_id": "sha1:" + "0" * 64}, "key_id"),
        ({"signature": "!!"}, "signature"),
        ({"signature": ""}, "signature"),
        ({"signature": "A" * 400}, "signature"),
        ({"signature": None}, "signature"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_malformed_signature_file_names_the_field(changes: dict[str, object], field: str) -> None:
    fields = parse_json(sign_manifest(MANIFEST, ed25519_key()).to_json())
    with call_error("invalid", object=field):
        Signature.parse(canonical_bytes({**fields, **changes}))
    if field in fields:
        del fields[field]
        with pytest.raises(CallError, match=f"{field}: missing"):
            Signature.parse(canonical_bytes(fields))


@given(st.binary(max_size=200))
def test_random_signature_files_are_invalid(raw: bytes) -> None:
    with call_error("invalid"):
        Signature.parse(raw)


@needs_openssl
def test_openssl_verifies_a_manifest(tmp_path: Path) -> None:
    message, value = tmp_path / "message", tmp_path / "value"
    message.write_bytes(CONTEXT + canonical_bytes(MANIFEST))

    key: PrivateKey = ed25519_key()
    public = write_public(tmp_path / "public", key)
    value.write_bytes(sign_manifest(MANIFEST, key).signature)
    pkeyutl = ("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", message)
    assert openssl(*pkeyutl, "-sigfile", value).returncode == 0

    key = p256_key()
    write_public(public, key)
    value.write_bytes(sign_manifest(MANIFEST, key).signature)
    dgst = ("dgst", "-sha256", "-verify", public, "-signature", value)
    assert openssl(*dgst, message).returncode == 0
    message.write_bytes(b"else")
    assert openssl(*dgst, message).returncode != 0


@needs_openssl
def test_a_manifest_signed_by_openssl_holds(tmp_path: Path) -> None:
    message, value = tmp_path / "message", tmp_path / "value"
    message.write_bytes(CONTEXT + canonical_bytes(MANIFEST))
    key = p256_key()
    private = write_key(tmp_path / "key", key)
    assert openssl("dgst", "-sha256", "-sign", private, "-out", value, message).returncode == 0
    signature = Signature(
        algorithm="ecdsa-p256-sha256",
        digest="sha256:" + hashlib.sha256(message.read_bytes()).hexdigest(),
        key_id=key_id(key.public_key()),
        signature=value.read_bytes(),
    )
    verify_manifest(MANIFEST, signature, key.public_key())


def test_keys_of_other_kinds_do_not_sign_manifests(rsa_key: rsa.RSAPrivateKey) -> None:
    with pytest.raises(CallError, match="with a RSA key: Ed25519 or EC secp256r1"):
        sign_manifest(MANIFEST, rsa_key)
    with pytest.raises(CallError, match="with a EC secp384r1 key"):
        sign_manifest(MANIFEST, ec.generate_private_key(ec.SECP384R1()))


def test_loading_keys(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    key = p256_key()
    private, public = write_key(tmp_path / "key", key), write_public(tmp_path / "pub", key)
    certificate = write_certificate(tmp_path / "crt", certificate_of(rsa_key))
    assert key_id(load_private_key(private).public_key()) == key_id(load_public_key(public))
    assert key_id(load_public_key(certificate)) == key_id(rsa_key.public_key())
    assert load_certificate(certificate).serial_number == 0x80FF
    der = tmp_path / "der"
    der.write_bytes(load_certificate(certificate).public_bytes(serialization.Encoding.DER))
    assert load_certificate(der) == load_certificate(certificate)


def test_keys_that_cannot_be_loaded_say_why(tmp_path: Path) -> None:
    key = ed25519_key()
    plain = write_key(tmp_path / "plain", key)
    locked = write_key(tmp_path / "locked", key, b"secret")
    public = write_public(tmp_path / "public", key)
    garbage, cut = tmp_path / "garbage", tmp_path / "cut"
    garbage.write_bytes(b"nothing")
    cut.write_bytes(plain.read_bytes()[:60])
    x448 = tmp_path / "x448"
    openssl("genpkey", "-algorithm", "X448", "-out", x448)

    def private(path: Path, password: bytes | None = None) -> str:
        with pytest.raises(CallError) as caught:
            load_private_key(path, password=password)
        return str(caught.value)

    assert load_private_key(locked, password=b"secret")
    assert private(locked).startswith("denied: ")
    assert "it is encrypted, and no password is given" in private(locked)
    assert "the password is wrong" in private(locked, b"guess")
    assert "it is not encrypted" in private(plain, b"secret")
    assert "it holds no private key" in private(public)
    assert private(garbage).startswith("invalid: ")
    assert private(cut).startswith("invalid: ")
    assert private(tmp_path / "none").startswith("not_found: ")
    assert "X448 key cannot be used here" in private(x448)
    with pytest.raises(CallError, match="a verifier should not have"):
        load_public_key(plain)
    for load in (load_public_key, load_certificate):
        with call_error("invalid"):
            load(garbage)


@needs_openssl
def test_a_root_signature_is_byte_for_byte_that_of_openssl(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    certificate = certificate_of(rsa_key)
    text, theirs = tmp_path / "text", tmp_path / "theirs"
    text.write_text(ROOT.hex())
    signer = write_certificate(tmp_path / "crt", certificate)
    private = write_key(tmp_path / "key", rsa_key)
    smime = ("smime", "-sign", "-noattr", "-nocerts", "-binary", "-outform", "der")
    files = ("-in", text, "-signer", signer, "-inkey", private, "-out", theirs)
    assert openssl(*smime, *files).returncode == 0
    ours = sign_root_digest(ROOT, certificate, rsa_key)
    assert ours == theirs.read_bytes()
    verify_root_digest(ROOT, ours, certificate)


@pytest.mark.parametrize("digest", [b"", b"\xab\xcd", bytes(31), bytes(65)])
def test_root_digest_of_an_impossible_length_is_not_signed(
    rsa_key: rsa.RSAPrivateKey, digest: bytes
) -> None:
    with call_error("invalid", match=f"{len(digest)} bytes", object="root_digest"):
        sign_root_digest(digest, certificate_of(rsa_key), rsa_key)


@needs_openssl
@pytest.mark.parametrize("serial", [1, 0x7F, 0x80, 2**158 + 1])
def test_openssl_and_we_check_each_others_root_signatures(tmp_path: Path, serial: int) -> None:
    key = p256_key()
    certificate = certificate_of(key, serial)
    text, value = tmp_path / "text", tmp_path / "value"
    text.write_text(ROOT.hex())
    signer = write_certificate(tmp_path / "crt", certificate)
    value.write_bytes(sign_root_digest(ROOT, certificate, key))
    verify_root_digest(ROOT, value.read_bytes(), certificate)
    verify = ("smime", "-verify", "-binary", "-inform", "der", "-in", value)
    trust = ("-content", text, "-certfile", signer, "-nointern", "-noverify")
    assert openssl(*verify, *trust).returncode == 0

    private = write_key(tmp_path / "key", key)
    smime = ("smime", "-sign", "-noattr", "-nocerts", "-binary", "-outform", "der")
    files = ("-in", text, "-signer", signer, "-inkey", private, "-out", value)
    assert openssl(*smime, *files).returncode == 0
    verify_root_digest(ROOT, value.read_bytes(), certificate)

    text.write_text("else")
    assert openssl(*verify, *trust).returncode != 0


def test_a_root_signature_holds_for_its_root_and_certificate_only() -> None:
    key = p256_key()
    certificate = certificate_of(key)
    signature = sign_root_digest(ROOT, certificate, key)
    with call_error("integrity", match="not over this root digest"):
        verify_root_digest(bytes(32), signature, certificate)
    with pytest.raises(CallError, match="with another certificate"):
        verify_root_digest(ROOT, signature, certificate_of(key, 7))
    impostor = certificate_of(p256_key())  # same name and serial
    with pytest.raises(CallError, match="not over this root digest"):
        verify_root_digest(ROOT, signature, impostor)


def test_a_root_signature_needs_the_key_of_its_certificate(rsa_key: rsa.RSAPrivateKey) -> None:
    with pytest.raises(CallError, match="the key is not the one of the certificate"):
        sign_root_digest(ROOT, certificate_of(rsa_key), p256_key())
    key = ed25519_key()
    with pytest.raises(CallError, match="RSA and EC keys only, this is Ed25519"):
        sign_root_digest(ROOT, certificate_of(key), key)


@needs_openssl
def test_a_root_signature_with_attributes_is_refused(tmp_path: Path) -> None:
    key = p256_key()
    certificate = certificate_of(key)
    text, value = tmp_path / "text", tmp_path / "value"
    text.write_text(ROOT.hex())
    signer = write_certificate(tmp_path / "crt", certificate)
    private = write_key(tmp_path / "key", key)
    smime = ("smime", "-sign", "-binary", "-outform", "der", "-in", text, "-signer", signer)
    assert openssl(*smime, "-inkey", private, "-out", value).returncode == 0
    with call_error("invalid", match="attributes: sign with -noattr"):
        verify_root_digest(ROOT, value.read_bytes(), certificate)
    # content within is not detached
    nodetach = ("-nodetach", "-noattr", "-inkey", private, "-out", value)
    assert openssl(*smime, *nodetach).returncode == 0
    with pytest.raises(CallError, match="bytes too many"):
        verify_root_digest(ROOT, value.read_bytes(), certificate)


CERTIFIED_KEY = p256_key()
CERTIFICATE = certificate_of(CERTIFIED_KEY)
SIGNED = sign_root_digest(ROOT, CERTIFICATE, CERTIFIED_KEY)


#: Where the signature proper starts: an OCTET STRING up to the end.
VALUE_AT = next(
    at + 2 for at in range(len(SIGNED)) if SIGNED[at:].startswith(bytes([4, len(SIGNED) - at - 2]))
)


@given(st.binary(max_size=100) | st.integers(0, len(SIGNED) - 1).map(lambda end: SIGNED[:end]))
def test_bytes_that_are_no_root_signature_are_invalid(raw: bytes) -> None:
    with call_error("invalid"):
        verify_root_digest(ROOT, raw, CERTIFICATE)


@given(st.integers(VALUE_AT, len(SIGNED) - 1), st.integers(1, 255))
def test_a_changed_root_signature_never_holds(position: int, flip: int) -> None:
    raw = bytearray(SIGNED)
    raw[position] ^= flip
    with call_error("integrity"):
        verify_root_digest(ROOT, bytes(raw), CERTIFICATE)


@given(st.integers(0, VALUE_AT - 1), st.integers(1, 255))
def test_a_changed_envelope_ends_in_an_answer(position: int, flip: int) -> None:
    raw = bytearray(SIGNED)
    raw[position] ^= flip
    # versions and the names of algorithms may differ without harm; nothing else may be raised
    with contextlib.suppress(CallError):
        verify_root_digest(ROOT, bytes(raw), CERTIFICATE)
