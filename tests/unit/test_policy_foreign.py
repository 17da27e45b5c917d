"""Layer lists of hcsshim and Kata Containers: taken where they say enough, refused where not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from guestagent.host.ctl.main import collect
from guestagent.policy.document import Policy, read_policy

VECTORS = Path(__file__).resolve().parents[1] / "vectors/policy/documents.json"
MANIFEST: dict[str, Any] = json.loads(VECTORS.read_text())["manifest"]
TOP, LOWEST = "a" * 64, "b" * 64  # root digests of the pack's layers, topmost first
#: In the form in which hcsshim's tools write Rego: comments, raw strings, commas behind the last.
HCSSHIM = f"""package policy

api_version := "0.11.0"
framework_version := "0.4.0"

fragments := [
    {{"issuer": "did:web:example", "feed": "infra", "minimum_svn": "1", "includes": ["x"]}},
]
containers := [
    {{
        "command": ["sh","-c","echo \\"containers := [\\" # no comment"],
        "env_rules": [{{"pattern": `PATH=/bin:"/sbin",]`, "strategy": "string", "required": true}}],
        "layers": ["{LOWEST}","{TOP}"], # the lowest first
        "mounts": [],
        "allow_elevated": false,
    }},
]
allow_properties_access := true
mount_device := data.framework.mount_device
"""
HCSSHIM_JSON = json.dumps(
    {
        "allow_all": False,
        "containers": {
            "length": 1,
            "elements": {
                "0": {
                    "layers": {"length": 2, "elements": {"1": TOP, "0": LOWEST}},
                    "allow_elevated": False,
                }
            },
        },
    }
)


def storage(root_digest: str, number: int | None, **changes: str | None) -> dict[str, Any]:
    """Return a storage for a layer; changes are options of dm-verity, None leaves one out."""
    options = {"roothash": root_digest, "hashoffset": "12288", "salt": "00" * 32, **changes}
    verity = [f"X-kata.dmverity.{n}={v}" for n, v in options.items() if v is not None]
    numbers = [] if number is None else [f"X-kata.partition-number={number}"]
    return {
        "driver": "blk",
        "driver_options": [],
        "source": "",
        "fstype": "erofs",
        "options": [
            "ro",
            "X-kata.overlay-lower",
            "X-kata.dmverity-enabled=true",
            *verity,
            *numbers,
        ],
        "mount_point": "^$(cpath)/$(bundle-id)/rootfs$",
    }


UPPER = {"driver": "blk", "fstype": "ext4", "options": ["rw", "X-kata.overlay-upper"]}


def kata(*storages: object, **container: object) -> str:
    data = {"containers": [{"OCI": {}, "storages": storages, **container}], "sandbox": {}}
    rules = "package agent_policy\n\ndefault CopyFileRequest := false\n"
    return f"{rules}\npolicy_data := {json.dumps(data)}\n"


Import = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """Import a text, in a directory with a manifest."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pack.img.json").write_text(json.dumps(MANIFEST))

    def invoke(text: str | bytes, *words: str, status: int = 0) -> Result:
        Path("policy.rego").write_bytes(text if isinstance(text, bytes) else text.encode())
        result = CliRunner().invoke(collect(), ["policy", "import", "policy.rego", *words])
        assert result.exit_code == status, result.output
        return result

    return invoke


def policy_of(result: Result) -> Policy:
    return read_policy(result.stdout_bytes)


@pytest.mark.parametrize("text", [HCSSHIM, HCSSHIM_JSON], ids=["rego", "json"])
def test_layers_of_hcsshim_are_those_of_a_pack(run: Import, text: str) -> None:
    result = run(text, "--pack", "pack.img.json", "--scratch", "device")
    made = policy_of(result)
    assert [chain.layers for chain in made.chains] == [("app", "base")]
    assert [chain.scratch[0].kind for chain in made.chains] == ["device"]
    tree = made.layers[0].verity
    assert tree.salt.hex() == MANIFEST["layers"][0]["verity"]["salt"]
    assert made.layers[0].size_bytes == MANIFEST["layers"][0]["size_bytes"]
    assert "not taken over: allow_" in result.stderr
    assert "not taken over: containers[0]: allow_elevated" in result.stderr


def test_root_digests_alone_are_too_little(run: Import) -> None:
    result = run(HCSSHIM, "--output", "made.json", status=1)
    assert "containers[0].layers[0]: it is a root digest without salt and sizes" in result.stderr
    assert "--pack" in result.stderr
    assert not Path("made.json").exists()
    other = HCSSHIM.replace(LOWEST, "d" * 64)
    assert "unsupported" in run(other, "--pack", "pack.img.json", status=1).stderr


def test_layers_of_kata_have_the_whole_tree(run: Import) -> None:
    result = run(kata(UPPER, storage(LOWEST, 2), storage(TOP, 1)))
    made = policy_of(result)
    assert [layer[:32] for layer in made.chains[0].layers] == [TOP[:32], LOWEST[:32]]
    tree = made.layers[0].verity
    assert (tree.root_digest.hex(), tree.salt, tree.data_blocks) == (TOP, bytes(32), 3)
    assert (tree.algorithm, tree.hash_type, tree.superblock) == ("sha256", 1, True)
    assert (tree.data_block_size, tree.hash_block_size, tree.hash_offset_bytes) == (
        4096,
        4096,
        12288,
    )
    assert result.stderr.splitlines() == [
        "not taken over: sandbox",
        "not taken over: containers[0].storages[0]: driver blk",
        "not taken over: containers[0]: OCI",
    ]


def test_options_of_kata_are_taken(run: Import) -> None:
    options = {"blocksize": "512", "hashsize": "1024", "algorithm": "sha512", "hashtype": "0"}
    made = policy_of(run(kata(storage(TOP * 2, None, **options, **{"no-superblock": "true"}))))
    tree = made.layers[0].verity
    assert (tree.data_block_size, tree.hash_block_size, tree.data_blocks) == (512, 1024, 24)
    assert (tree.algorithm, tree.hash_type, tree.superblock) == ("sha512", 0, False)


def test_policy_in_initdata_is_found(run: Import) -> None:
    text = kata(storage(TOP, 1))
    wrapped = f"algorithm = \"sha384\"\n\n[data]\n\"policy.rego\" = '''\n{text}'''\n"
    assert policy_of(run(wrapped)) == policy_of(run(text))


def test_layers_without_numbers_are_listed_topmost_first(run: Import) -> None:
    made = policy_of(run(kata(storage(TOP, None), storage(LOWEST, None))))
    assert [layer.verity.root_digest.hex() for layer in made.layers] == [TOP, LOWEST]


def test_a_pack_says_what_kata_leaves_out(run: Import) -> None:
    part = kata(storage(TOP, 1, salt=None, hashoffset=None))
    assert "there is no X-kata.dmverity.salt" in run(part, status=1).stderr
    made = policy_of(run(part, "--pack", "pack.img.json"))
    assert made.layers[0].id == "app"
    assert made.layers[0].verity.salt == bytes.fromhex("ab" * 32)


def test_a_pack_must_agree_with_kata(run: Import) -> None:
    result = run(kata(storage(TOP, 1)), "--pack", "pack.img.json", status=1)
    assert "salt is not that of layer app" in result.stderr


def test_packs_must_agree_with_each_other(run: Import) -> None:
    """The salt of a layer could otherwise be chosen by the order of the packs."""
    app = json.loads(json.dumps(MANIFEST["layers"][0]).replace("ab" * 32, "cd" * 32))
    Path("q.img.json").write_text(json.dumps({**MANIFEST, "layers": [app], "images": []}))
    packs = ("--pack", "pack.img.json", "--pack", "q.img.json")
    assert "layers app and app of packs" in run(HCSSHIM, *packs, status=1).stderr
    run(HCSSHIM, "--pack", "pack.img.json", "--pack", "pack.img.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (kata({"driver": "image_guest_pull", "options": []}), "the guest pulls this image itself"),
        (kata({"driver": "blk", "driver_options": ["image_guest_pull={}"]}), "the guest pulls"),
        (kata(storage(TOP, 1, roothash=None)), "the layer is not verified"),
        (kata(UPPER), "no container with verified layers"),
        (kata(storage(TOP, 1), storage(LOWEST, 1)), "a X-kata.partition-number of its own"),
        (kata(storage(TOP, 1), storage(LOWEST, None)), "a X-kata.partition-number of its own"),
        (kata(storage(TOP, 1), storage(TOP, 2)), "names a layer twice"),
        (kata(storage(TOP, 1, hashoffset="12289")), "no multiple of the block size"),
        (kata(storage(TOP, 1, blocksize="0")), "no multiple of the block size"),
        (kata(storage(TOP, 1, blocksize="-4096")), "is no number"),
        (kata(storage(TOP, 1, hashtype="9")), "hash_type"),
        (kata(storage(TOP[:40], 1, algorithm="sha1")), "sha1 is no proof"),
        (kata(storage(TOP, 1, salt="0x00")), "is no hexadecimal text"),
        (kata({**storage(TOP, 1), "fstype": "fat"}), "filesystem"),
        (kata({**storage(TOP, 1), "options": ["a=1", "a=2"]}), "'a' is there twice"),
        (kata({**storage(TOP, 1), "options": "ro"}), "storages[0].options: it is no array"),
        (kata("text"), "storages[0]: it is no object"),
        (kata(storage(TOP, 1)).replace("policy_data", "data"), "0 constants"),
        (HCSSHIM.replace(LOWEST, "xyz"), "is no hexadecimal text"),
        (HCSSHIM + "\ncontainers := []\n", "2 constants"),
        (HCSSHIM.replace('"mounts": []', '"mounts": data.mounts'), "policy.rego"),
        (HCSSHIM.replace('"mounts": []', '"layers": []'), "a name is there twice"),
        ('containers := "' + r"\"" * 1_000_000, "does not end"),
        ("containers := `", "does not end"),
        (HCSSHIM_JSON.replace('"1"', '"7"'), "are not the numbers from 0"),
        ("containers := " + "[" * 100_000, "nested too deeply"),
        ("{", "policy.rego"),
        ("[]", "0 constants"),
        (b"\xff", "policy.rego"),
        ("", "0 constants"),
    ],
)
def test_what_says_too_little_is_refused(run: Import, text: str | bytes, words: str) -> None:
    result = run(text, "--output", "made.json", status=1)
    assert "policy.rego" in result.stderr
    assert words in result.stderr
    assert not Path("made.json").exists()


def test_file_is_bounded(run: Import) -> None:
    assert "over 16777216 bytes" in run(b" " * ((16 << 20) + 1), status=1).stderr
