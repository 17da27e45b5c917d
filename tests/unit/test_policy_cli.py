"""``guestctl policy``: from packs and images to documents, and what other tools say of these."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from guestagent.api.agent import HelloReply
from guestagent.host.ctl.main import collect
from guestagent.policy.binding.binding import accept, read_binding
from guestagent.policy.document import MAX_POLICY_BYTES, Policy, canonical_policy, read_policy
from rootfs.machine.run_image import build_image_pack, mount_request
from rootfs.pack.canonical import canonical_bytes
from rootfs.pack.keys import load_private_key
from rootfs.pack.manifest import Manifest
from rootfs.policy.signature import key_line, sign_policy
from tests.beds.imagebed import Layout, Member, directory
from tests.beds.keybed import write_key, write_public
from tests.beds.policybed import POLICY
from vsock.errors import CallError

VECTORS = Path(__file__).resolve().parents[1] / "vectors/policy/documents.json"
SCHEMA = Path(__file__).resolve().parents[2] / "docs/policy.schema.json"
DATA = json.loads(VECTORS.read_text())
#: The pack of the vectors: two layers and an image of them.
MANIFEST: dict[str, Any] = DATA["manifest"]
APP, BASE = MANIFEST["layers"]
needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is not installed"
)

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in a directory with a manifest, a policy and a layout."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pack.img.json").write_text(json.dumps(MANIFEST))
    (tmp_path / "web.json").write_bytes(canonical_policy(POLICY))
    files = [directory("etc"), Member("etc/hosts", b"localhost")]
    layout = Layout(tmp_path / "layout").layer(files).layer([Member("etc/.wh.hosts")], "+gzip")
    layout.finish()

    def invoke(*words: str, status: int = 0) -> Result:
        result = CliRunner().invoke(collect(), ["policy", *words])
        assert result.exit_code == status, result.output
        return result

    return invoke


def policy_of(result: Result) -> Policy:
    return read_policy(result.stdout_bytes)


def change(**fields: object) -> None:
    """Change the manifest in this directory."""
    Path("pack.img.json").write_text(json.dumps({**MANIFEST, **fields}))


# --- made of packs


@pytest.mark.parametrize("vector", DATA["vectors"], ids=lambda vector: vector["title"])
def test_manifest_gives_the_bytes_of_the_vector(run: Run, vector: dict[str, Any]) -> None:
    result = run("from-manifest", "pack.img.json", *vector["words"], "--output", "made.json")
    raw = Path("made.json").read_bytes()
    assert raw == canonical_policy(vector["policy"]) == canonical_bytes(vector["policy"])
    assert f"sha256:{vector['sha256']}" in result.stdout
    for command, name in (("sha256sum", "sha256"), ("sha384sum", "sha384")):
        told = subprocess.run([command, "made.json"], stdout=subprocess.PIPE, check=True)
        assert told.stdout.split()[0].decode() == vector[name]
    assert run("digest", "made.json").stdout.strip() == vector["sha256"]
    for tee, name, field in (("snp", "sha256", "HOST_DATA"), ("tdx", "sha384", "MRCONFIGID")):
        facts = json.loads(run("digest", "made.json", "--tee", tee, "--json").stdout)
        assert facts[field] == vector[name]
        assert base64.b64decode(facts["qemu"].partition("=")[2]).hex() == vector[name]


def test_made_policies_fit_the_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    for vector in DATA["vectors"]:
        validator.validate(vector["policy"])


def test_least_exposure_is_the_default(run: Run) -> None:
    made = policy_of(run("from-pack", "pack.img.json"))
    assert {method.partition(".")[0] for method in made.expose.methods} == {
        *("layer", "layers", "overlay")
    }
    assert made.expose.replace(methods=()) == Policy(name="x", svn=0).expose
    assert made.run == Policy(name="x", svn=0).run
    assert [rule.kind for chain in made.chains for rule in chain.scratch] == ["none", "none"]


def test_one_form_of_an_image(run: Run) -> None:
    merged = policy_of(run("from-pack", "pack.img.json", "--form", "merged"))
    assert [layer.id for layer in merged.layers] == ["web"]
    overlay = policy_of(run("from-pack", "pack.img.json", "--form", "overlay"))
    assert [chain.layers for chain in overlay.chains] == [("app", "base")]
    assert [layer.id for layer in overlay.layers] == ["app", "base"]


def test_layers_for_userxattr_are_overlaid_with_it(run: Run) -> None:
    change(images=[], layers=[{**APP, "whiteouts": "user"}])
    made = policy_of(run("from-pack", "pack.img.json"))
    assert made.chains[0].options.userxattr


def test_same_image_gives_same_policy(run: Run) -> None:
    first = run("from-image", "layout").stdout_bytes
    assert run("from-image", "layout").stdout_bytes == first
    ctl = CliRunner()
    ctl.invoke(collect(), ["pack", "build", "layout", "p.img"])
    names = ",".join(layer.layer_id for layer in Manifest.load("p.img.json").layers)
    ctl.invoke(collect(), ["image", "merge", "p.img", "--id", "root", "--layers", names])
    assert run("from-pack", "p.img").stdout_bytes == first
    assert [chain.layers[0] for chain in read_policy(first).chains] == [names[:16], "root"]


@pytest.mark.parametrize("features", [(), ("erofs-flattened",)], ids=["overlay", "merged"])
@pytest.mark.parametrize("scratch_bytes", [None, 1 << 20], ids=["read-only", "scratch"])
def test_what_mounts_the_image_is_allowed(
    run: Run, features: tuple[str, ...], scratch_bytes: int | None
) -> None:
    """The request of ``guestctl run``, in both forms; what the policy does not have is denied."""
    manifest = build_image_pack("layout", Path("p.img"))
    hello = HelloReply(version=1, agent="1", kernel="6", features=features, limits={}, boot={})
    device: dict[str, object] = {"kind": "pmem", "number": 0}
    _, request = mount_request(manifest, device, hello, scratch_bytes=scratch_bytes)
    question = {"method": "layers.mount", "params": request.to_sparse_wire()}
    Path("q.json").write_text(json.dumps(question, default=bytes.hex))
    run("from-image", "layout", "-o", "least.json")
    words = ("--scratch", "none", "--scratch", "tmpfs=1M")
    run("from-image", "layout", *words, "-o", "scratch.json")
    run("check", "scratch.json", "q.json")
    run("check", "least.json", "q.json", status=0 if scratch_bytes is None else 1)
    run("from-image", "layout", *words, "--device", "label", "-o", "other.json")
    assert "devices.kinds" in run("check", "other.json", "q.json", status=1).stdout
    assert "layers.tree" in run("check", "web.json", "q.json", status=1).stdout


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": [{**APP, "verity": None}]}, "app has no hash tree"),
        ({"layers": [{**APP, "whiteouts": "both"}]}, "does not see all whiteouts"),
        ({"layers": [APP, {**BASE, "verity": APP["verity"]}]}, "names a layer twice"),
        ({"layers": []}, "length of layers"),
    ],
)
def test_pack_without_a_policy_is_refused(run: Run, fields: dict[str, Any], words: str) -> None:
    change(images=[], **fields)
    result = run("from-pack", "pack.img.json", "--output", "x.json", status=1)
    assert words in result.stderr
    assert not Path("x.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--scratch", "tmpfs"),
        ("--scratch", "tmpfs=1"),
        ("--scratch", "tmpfs=99999999999T"),
        ("--scratch", "directory"),
        ("--allow", "agent.hello"),
        ("--allow", "share.mount"),
        ("--console", "rm"),
        ("--device", "tape"),
        ("--instances", "0"),
        ("--svn", "-1"),
    ],
)
def test_wrong_options_are_refused(run: Run, words: tuple[str, ...]) -> None:
    run("from-pack", "pack.img.json", *words, status=2)


def test_wrong_names_are_refused(run: Run) -> None:
    assert "two words" in run("from-pack", "pack.img.json", "--name", "two words", status=1).stderr
    result = run("from-pack", "pack.img.json", "--image", "absent", status=1)
    assert "its images: web" in result.stderr
    run("merge", "web.json", "--name", "two words", status=2)


def test_manifest_must_be_signed_where_a_key_is_given(run: Run) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    write_key(Path("key.pem"), key)
    write_public(Path("public.pem"), key)
    words = ("from-manifest", "pack.img.json", "--key", "public.pem")
    run(*words, status=1)
    CliRunner().invoke(collect(), ["sign", "--key", "key.pem", "pack.img.json"])
    run(*words)
    change(image="other.img")
    assert "integrity" in run(*words, status=1).stderr


def test_output_never_replaces_an_input(run: Run) -> None:
    for words in (
        ("from-pack", "pack.img.json", "-o", "pack.img.json"),
        ("merge", "web.json", "-o", "web.json"),
        ("sign", "web.json", "--key", "key.pem", "--signature", "web.json"),
    ):
        write_key(Path("key.pem"), ed25519.Ed25519PrivateKey.generate())
        assert "the command reads this file" in run(*words, status=1).stderr
    assert Path("web.json").read_bytes() == canonical_policy(POLICY)


# --- compared and explained


def test_diff_says_what_is_wider(run: Run) -> None:
    run("from-pack", "pack.img.json", "-o", "a.json")
    run("from-pack", "pack.img.json", "--scratch", "none", "--scratch", "tmpfs=1M", "-o", "b.json")
    result = run("diff", "a.json", "b.json", status=1)
    assert result.stdout.splitlines() == [
        "wider: chain web.scratch: changes may go: in memory, at most 1048576 bytes",
        "wider: chain web-2.scratch: changes may go: in memory, at most 1048576 bytes",
        "wider",
    ]
    back = json.loads(run("diff", "b.json", "a.json", "--json").stdout)
    assert not back["wider"]
    assert {each["direction"] for each in back["changes"]} == {"narrower"}
    assert run("diff", "a.json", "a.json").stdout == "nothing is wider\n"


def test_merge_allows_both(run: Run) -> None:
    run("from-pack", "pack.img.json", "-o", "a.json")
    run("merge", "a.json", "web.json", "--name", "both", "-o", "m.json")
    run("diff", "m.json", "a.json")
    run("diff", "m.json", "web.json")
    made = read_policy(Path("m.json").read_bytes())
    assert (made.name, made.svn) == ("both", 3)


def test_explain_names_what_is_allowed(run: Run) -> None:
    text = run("explain", "web.json").stdout
    for words in (
        *("policy web, security version 3", "app over base, options: suid"),
        *("in memory, at most 16777216 bytes", f"root digest sha256:{'a' * 64}"),
        *("share.mount share_id='conf' tag='conf'", "events: layer_mounted, with layer_id"),
        *("the names of dm devices", "force: denied", "commands of the console: help"),
    ):
        assert words in text
    assert json.loads(run("explain", "web.json", "--json").stdout) == text.splitlines()


def test_check_tells_the_reason(run: Run) -> None:
    Path("q.json").write_text(json.dumps({"console": "sh"}))
    result = run("check", "web.json", "q.json", status=1)
    assert result.stdout == "denied by expose.console: the command 'sh' is not listed\n"
    Path("q.json").write_text(json.dumps({"method": "layer.list"}))
    assert run("check", "web.json", "q.json").stdout == "allowed\n"
    assert json.loads(run("check", "web.json", "q.json", "--json").stdout) == {"allowed": True}


@pytest.mark.parametrize(
    ("question", "field"),
    [
        ({}, "request"),
        ({"method": "layer.list", "console": "sh"}, "request"),
        ({"method": "layer.lost"}, "request"),
        ({"method": "layer.get"}, "request.params.layer_id"),
        ({"method": "layer.list", "mounted": {"layers": [{}]}}, "request.mounted.layers[0]."),
        ({"method": "layer.list", "extra": 1}, "request.extra"),
        ({"method": "layer.list", "params": 1.5}, "request"),
    ],
)
def test_no_request_is_refused(run: Run, question: object, field: str) -> None:
    Path("q.json").write_text(json.dumps(question))
    error = json.loads(run("check", "web.json", "q.json", "--json", status=1).stdout)["error"]
    assert error["code"] == "invalid"
    assert error["object"].startswith(field)
    assert "q.json" in error["message"]


@pytest.mark.parametrize("command", ["explain", "digest", "diff", "merge", "check", "sign"])
def test_no_policy_is_refused(run: Run, command: str) -> None:
    write_key(Path("key.pem"), ed25519.Ed25519PrivateKey.generate())
    words = {"diff": ["web.json"], "check": ["web.json"], "sign": ["--key", "key.pem"]}
    raw = canonical_policy(POLICY)
    for wrong in (raw + b"\n", raw[:-1], b"{}", raw.replace(b'"svn":3', b'"svn":-1')):
        Path("bad.json").write_bytes(wrong)
        result = run(command, "bad.json", *words.get(command, ()), status=1)
        assert "cannot use the policy 'bad.json'" in result.stderr
    Path("bad.json").write_bytes(b" " * (MAX_POLICY_BYTES + 1))
    assert (
        "over 1048576 bytes" in run(command, "bad.json", *words.get(command, ()), status=1).stderr
    )
    run(command, "absent.json", *words.get(command, ()), status=1)
    run(command, ".", *words.get(command, ()), status=1)


# --- signatures


def test_signature_is_that_of_the_vector(run: Run) -> None:
    vector = DATA["signature"]
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vector["private_key"]))
    assert sign_policy(vector["policy"].encode(), key).hex() == vector["signature"]
    assert key_line(key.public_key(), 3).decode() == f"ed25519 {vector['public_key']} min_svn=3\n"


@needs_openssl
def test_openssl_accepts_a_signature(run: Run) -> None:
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", "key.pem"], check=True)
    subprocess.run(
        ["openssl", "pkey", "-in", "key.pem", "-pubout", "-out", "public.pem"], check=True
    )
    run("sign", "web.json", "--key", "key.pem")
    signed = b"guestagent-policy-signature-v1\n" + Path("web.json").read_bytes()
    Path("message").write_bytes(signed)
    verify = [
        *("openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "public.pem", "-rawin"),
        *("-in", "message", "-sigfile", "web.json.sig"),
    ]
    subprocess.run(verify, check=True, stdout=subprocess.DEVNULL)
    run("sign", "--verify", "web.json", "--key", "public.pem")
    subprocess.run(
        [*("openssl", "pkeyutl", "-sign", "-inkey", "key.pem", "-rawin"),
         *("-in", "web.json", "-out", "web.json.sig")],
        check=True,
    )  # fmt: skip
    assert (
        "integrity" in run("sign", "--verify", "web.json", "--key", "public.pem", status=1).stderr
    )


def test_signature_of_another_policy_is_refused(run: Run) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    write_key(Path("key.pem"), key, b"secret")
    write_public(Path("public.pem"), key)
    Path("password").write_bytes(b"secret\n")
    run("sign", "web.json", "--key", "key.pem", status=1)
    run("sign", "web.json", "--key", "key.pem", "--password-file", "password")
    assert len(Path("web.json.sig").read_bytes()) == 64
    Path("web.json").write_bytes(canonical_policy({**POLICY, "svn": 4}))
    assert (
        "integrity" in run("sign", "--verify", "web.json", "--key", "public.pem", status=1).stderr
    )
    Path("web.json.sig").write_bytes(b"x" * 65)
    run("sign", "--verify", "web.json", "--key", "public.pem", status=1)


def test_signature_over_a_manifest_is_none_over_a_policy(run: Run) -> None:
    """Both begin with a line of their own, so that one key may sign both."""
    key = ed25519.Ed25519PrivateKey.generate()
    write_key(Path("key.pem"), key)
    write_public(Path("public.pem"), key)
    CliRunner().invoke(collect(), ["sign", "--key", "key.pem", "pack.img.json"])
    signature = json.loads(Path("pack.img.json.sig").read_text())["signature"]
    Path("web.json.sig").write_bytes(base64.b64decode(signature))
    assert (
        "integrity" in run("sign", "--verify", "web.json", "--key", "public.pem", status=1).stderr
    )


def test_guest_accepts_what_is_signed_and_digested(run: Run) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    write_key(Path("key.pem"), key)
    write_public(Path("public.pem"), key)
    run("sign", "web.json", "--key", "key.pem")
    raw, signature = Path("web.json").read_bytes(), Path("web.json.sig").read_bytes()
    setting = f"/absent,sha256={run('digest', 'web.json').stdout.strip()}"
    run("key", "public.pem", "--min-svn", "3", "-o", "policy.key")
    binding = read_binding(setting, policy_path="absent", key_path="policy.key")
    assert accept(binding, raw, signature).name == "web"
    with pytest.raises(CallError, match="its digest is not"):
        accept(binding, raw.replace(b"web", b"wet"), signature)
    with pytest.raises(CallError, match="it is not signed"):
        accept(binding, raw, signature[::-1])
    run("key", "public.pem", "--min-svn", "4", "-o", "policy.key")
    later = read_binding(setting, policy_path="absent", key_path="policy.key")
    with pytest.raises(CallError, match="its security version is older"):
        accept(later, raw, signature)


def test_other_keys_are_refused(run: Run) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    write_key(Path("key.pem"), key)
    write_public(Path("public.pem"), key)
    assert load_private_key("key.pem")
    assert "Ed25519 is needed" in run("sign", "web.json", "--key", "key.pem", status=1).stderr
    assert "Ed25519 is needed" in run("key", "public.pem", status=1).stderr
    assert not Path("web.json.sig").exists()


def test_key_is_written_as_a_boot_image_has_it(run: Run) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    write_public(Path("public.pem"), key)
    run("key", "public.pem", "--min-svn", "7", "-o", "policy.key")
    raw = key.public_key().public_bytes_raw().hex()
    assert Path("policy.key").read_text() == f"ed25519 {raw} min_svn=7\n"
    assert run("key", "public.pem", "--min-svn", "7").stdout == f"ed25519 {raw} min_svn=7\n"
