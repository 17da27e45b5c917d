"""What vouches for a policy, and what holds it: digests, signatures, reports, sealed memory."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from guestagent.config import read_settings
from guestagent.policy.binding import binding as binding_module
from guestagent.policy.binding.binding import (
    SIGNATURE_CONTEXT,
    Binding,
    accept,
    digest_of,
    find_policy,
    read_binding,
)
from guestagent.policy.binding.ed25519 import is_signed
from guestagent.policy.binding.keeper import PolicyKeeper
from guestagent.policy.binding.tee import launch_digest
from guestagent.policy.document import canonical_policy
from guestagent.policy.rules import Rules
from tests.beds.policybed import POLICY
from vsock.errors import CallError
from vsock.log import log

VECTORS = Path(__file__).resolve().parents[1] / "vectors/policy"
RAW = (VECTORS / "web.json").read_bytes()
SIGNATURE = (VECTORS / "web.json.sig").read_bytes()
KEY = bytes.fromhex((VECTORS / "web.key").read_text().split()[1])
OTHER = canonical_policy({**POLICY, "name": "other"})
ORDER = 2**252 + 27742317777372353535851937790883648493

#: RFC 8032, section 7.1: key, message, signature.
RFC_8032 = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.fixture(autouse=True)
def _own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that gets into force here restricts the log of this test alone."""
    monkeypatch.setattr(log, "_outward", None)


def refused(work: object) -> CallError:
    with pytest.raises(CallError) as caught:
        work()  # type: ignore[operator]
    return caught.value


# --- signatures


@pytest.mark.parametrize(("key", "message", "signature"), RFC_8032)
def test_vectors_of_rfc_8032(key: str, message: str, signature: str) -> None:
    made = bytes.fromhex(key), bytes.fromhex(message), bytes.fromhex(signature)
    assert is_signed(*made)
    assert not is_signed(made[0], made[1] + b"\0", made[2])


@settings(max_examples=20, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=200), st.integers(0, 511))
def test_signatures_are_those_of_another_implementation(
    seed: bytes, message: bytes, bit: int
) -> None:
    private = Ed25519PrivateKey.from_private_bytes(seed)
    key = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    signature = bytearray(private.sign(message))
    assert is_signed(key, message, bytes(signature))
    signature[bit // 8] ^= 1 << bit % 8
    assert not is_signed(key, message, bytes(signature))


def test_second_form_of_a_signature_is_refused() -> None:
    message = SIGNATURE_CONTEXT + RAW
    larger = int.from_bytes(SIGNATURE[32:], "little") + ORDER
    assert is_signed(KEY, message, SIGNATURE)
    assert not is_signed(KEY, message, SIGNATURE[:32] + larger.to_bytes(32, "little"))


@pytest.mark.parametrize(
    "key", [b"", KEY[:-1], KEY + b"\0", b"\xff" * 32, (2**255 - 19).to_bytes(32, "little")]
)
def test_key_that_is_none_signs_nothing(key: bytes) -> None:
    assert not is_signed(key, SIGNATURE_CONTEXT + RAW, SIGNATURE)


# --- what must agree


def test_digest_of_the_command_line() -> None:
    binding = Binding(path="/p", sha256=digest_of(RAW))
    assert accept(binding, RAW, None).name == "web"
    assert refused(lambda: accept(binding, OTHER, None)).object == "sha256"
    # what does not agree is not parsed
    assert refused(lambda: accept(binding, b"[" * 10, None)).object == "sha256"


def test_signature_and_security_version() -> None:
    binding = Binding(key=KEY, min_svn=3)
    assert accept(binding, RAW, SIGNATURE).svn == 3
    assert refused(lambda: accept(binding, RAW, None)).object == "signature"
    assert refused(lambda: accept(binding, OTHER, SIGNATURE)).object == "signature"
    assert refused(lambda: accept(binding.replace(min_svn=4), RAW, SIGNATURE)).object == "svn"


def test_signature_over_another_kind_of_document_counts_for_none() -> None:
    private = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    for context in (b"", b"guestagent-manifest-signature-v2\n"):
        signature = private.sign(context + RAW)
        error = refused(lambda s=signature: accept(Binding(key=KEY), RAW, s))
        assert error.object == "signature"


@pytest.mark.parametrize("algorithm", ["sha256", "sha384"])
def test_digest_of_the_launch(monkeypatch: pytest.MonkeyPatch, algorithm: str) -> None:
    digest = hashlib.new(algorithm, RAW).digest()
    monkeypatch.setattr(binding_module, "launch_digest", lambda: digest)
    binding = Binding(word="tsm")
    assert accept(binding, RAW, None).name == "web"
    assert refused(lambda: accept(binding, OTHER, None)).object == "tsm"
    for other in (digest[:31] + b"\0", digest[:32].ljust(48, b"\0"), digest[:20]):
        monkeypatch.setattr(binding_module, "launch_digest", lambda other=other: other)
        assert refused(lambda: accept(binding, RAW, None)).object == "tsm"


def test_machine_that_is_no_tee_vouches_for_nothing(tmp_path: Path) -> None:
    error = refused(lambda: launch_digest(reports=f"{tmp_path}/no", mrconfigid=f"{tmp_path}/no"))
    assert (error.code, error.object) == ("denied", "tsm")


def test_measurement_of_tdx(tmp_path: Path) -> None:
    path = tmp_path / "mrconfigid"
    path.write_bytes(bytes(range(48)))
    assert launch_digest(reports=str(tmp_path), mrconfigid=str(path)) == bytes(range(48))
    for wrong in (bytes(48), bytes(range(32)), b""):
        path.write_bytes(wrong)
        assert refused(lambda: launch_digest(reports=str(tmp_path), mrconfigid=str(path)))


class Reports:
    """A made-up configfs: an entry has its attributes from the moment that it is made."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, **attributes: bytes) -> None:
        self.root = root / "reports"
        self.root.mkdir()
        mkdir, rmdir = os.mkdir, os.rmdir

        def make(path: str) -> None:
            mkdir(path)
            for name, content in attributes.items():
                Path(path, name).write_bytes(content)

        def remove(path: str, *, dir_fd: int | None = None) -> None:
            if dir_fd is None:  # not the tidying of pytest
                for name in attributes:
                    Path(path, name).unlink()
            rmdir(path, dir_fd=dir_fd)

        monkeypatch.setattr(os, "mkdir", make)
        monkeypatch.setattr(os, "rmdir", remove)

    def digest(self) -> bytes:
        return launch_digest(reports=str(self.root), mrconfigid=f"{self.root}/none")


REPORT = bytes(0xC0) + bytes(range(1, 33)) + bytes(1184 - 0xE0)


def test_host_data_of_snp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"inblob": b"", "generation": b"1\n", "provider": b"sev_guest\n", "outblob": REPORT}
    reports = Reports(tmp_path, monkeypatch, **told)
    assert reports.digest() == bytes(range(1, 33))
    assert list(reports.root.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("provider", b"tdx_guest\n"),  # a quote, which the host delivers
        ("provider", b""),
        ("outblob", REPORT[:-1]),
        ("outblob", bytes(1184)),
    ],
)
def test_report_that_does_not_vouch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    told = {"inblob": b"", "generation": b"1\n", "provider": b"sev_guest\n", "outblob": REPORT}
    reports = Reports(tmp_path, monkeypatch, **{**told, name: content})
    assert refused(reports.digest).object == "tsm"
    assert list(reports.root.iterdir()) == []


# --- the command line and the boot image


@pytest.mark.parametrize(
    "value", ["", "yes", "/p", "/p,sha256=", "/p,sha256=12", "p,sha256=" + "0" * 64, "/p,x=1"]
)
def test_setting_of_another_form_is_fatal(value: str) -> None:
    _, problems = read_settings((("policy", value),))
    assert [problem.fatal for problem in problems] == [True]


def test_setting_that_is_given_twice_is_fatal_even_when_it_is_the_same() -> None:
    value = f"/p,sha256={'0' * 64}"
    config, problems = read_settings((("policy", value),))
    assert (config.policy, problems) == (value, ())
    _, problems = read_settings((("policy", value), ("policy", value)))
    assert [problem.fatal for problem in problems] == [True]


def test_boot_image_and_command_line_agree_or_end(tmp_path: Path) -> None:
    policy, key, none = tmp_path / "policy.json", tmp_path / "policy.key", tmp_path / "none"
    policy.write_bytes(RAW)
    key.write_text((VECTORS / "web.key").read_text())
    digest = digest_of(RAW).hex()

    def read(setting: str | None, policy: Path = none, key: Path = none) -> Binding:
        return read_binding(setting, policy_path=str(policy), key_path=str(key))

    assert not read(None).is_required
    assert not read("none").is_required
    assert read("required").is_required
    assert read("tsm").is_required
    assert read(None, policy=policy).path == str(policy)
    assert read(None, key=key).key == KEY
    assert read(None, key=key).min_svn == 3
    assert read(f"{policy},sha256={digest}", policy=policy).sha256 == digest_of(RAW)
    assert refused(lambda: read("none", policy=policy))
    assert refused(lambda: read("none", key=key))
    assert refused(lambda: read(f"/other,sha256={digest}", policy=policy))
    key.write_text("ed25519 00 min_svn=0")
    assert refused(lambda: read(None, key=key))
    assert find_policy(read(None)) is None
    assert find_policy(read(None, policy=policy)) == (RAW, None)
    assert refused(lambda: find_policy(Binding(path=str(none)))).code == "not_found"
    assert refused(lambda: find_policy(Binding(path=str(policy), key=KEY)))  # no signature


# --- what holds it


def nothing_mounted(_rules: Rules) -> None:
    return None


@pytest.fixture
def keeper() -> Iterator[PolicyKeeper]:
    keeper = PolicyKeeper(None, is_held=True)
    yield keeper
    for fd in keeper._slots:
        os.close(fd)


def test_policy_is_set_once(keeper: PolicyKeeper) -> None:
    assert (keeper.state, keeper.gate.is_open) == ("none", True)
    assert not keeper.set(RAW, None, nothing_mounted)
    assert (keeper.state, keeper.gate.is_open) == ("set", False)
    assert keeper.set(RAW, None, nothing_mounted)
    error = refused(lambda: keeper.set(OTHER, None, nothing_mounted))
    assert (error.code, error.object) == ("denied", "policy.set")
    assert keeper.digest() == digest_of(RAW).hex()


def test_policy_that_does_not_allow_what_is_mounted_is_not_set(keeper: PolicyKeeper) -> None:
    error = refused(lambda: keeper.set(RAW, None, lambda _rules: "layers.tree"))
    assert (error.code, error.object) == ("conflict", "layers.tree")
    assert keeper.gate.is_open


def test_required_policy_denies_all_but_what_leads_to_one() -> None:
    keeper = PolicyKeeper("required", is_held=False)
    assert keeper.state == "required"
    for method in ("agent.hello", "agent.status", "policy.set", "policy.get"):
        keeper.gate.request(method, Binding())
    for method in ("layer.list", "agent.features", "fs.ls", "dm.list"):
        assert refused(lambda m=method: keeper.gate.request(m, Binding())).code == "denied"
    assert refused(lambda: keeper.gate.console("help")).code == "denied"


def test_faults_are_not_injected_beside_a_policy_that_must_be_there() -> None:
    error = refused(lambda: PolicyKeeper("required", is_held=False, faults="mount:EIO"))
    assert error.object == "guestagent.fault"


def test_policy_is_held_over_the_death_of_an_agent(keeper: PolicyKeeper) -> None:
    narrower = canonical_policy({**POLICY, "expose": {}})
    child = os.fork()
    if not child:
        keeper.restore()
        keeper.set(RAW, None, nothing_mounted)
        keeper.narrow(narrower, nothing_mounted)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert keeper.gate.is_open  # the process that holds it serves nobody
    keeper.restore()
    assert [policy.name for policy in keeper.policies] == ["web", "web"]
    assert refused(lambda: keeper.gate.console("help")).object == "expose.console"
    for fd in keeper._slots[:2]:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"{}", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)


def test_policy_that_was_written_and_not_sealed_does_not_count(keeper: PolicyKeeper) -> None:
    os.pwrite(keeper._slots[0], OTHER, 0)
    keeper.restore()
    assert keeper.gate.is_open
    keeper.set(RAW, None, nothing_mounted)
    assert os.pread(keeper._slots[0], 1 << 20, 0) == RAW
    assert fcntl.fcntl(keeper._slots[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE


def test_policy_is_narrowed_three_times_and_never_widened(keeper: PolicyKeeper) -> None:
    documents = [canonical_policy({**POLICY, "name": f"n{number}"}) for number in range(4)]
    assert refused(lambda: keeper.narrow(documents[0], nothing_mounted)).code == "conflict"
    keeper.set(RAW, None, nothing_mounted)
    wider = {**POLICY["expose"], "console": ["help", "sh"], "shell": True}
    keeper.narrow(canonical_policy({**POLICY, "expose": wider}), nothing_mounted)
    assert refused(lambda: keeper.gate.console("sh")).object == "expose.console"
    for document in documents[:2]:
        keeper.narrow(document, nothing_mounted)
    assert keeper.narrow(documents[0], nothing_mounted)
    assert refused(lambda: keeper.narrow(documents[3], nothing_mounted)).code == "resource"
