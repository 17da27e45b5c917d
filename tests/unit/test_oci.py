"""Container images that are not what they say: each is refused, by name, and nothing is built."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rootfs.image.images import build_image, build_layers
from rootfs.image.platform import default_platform
from tests.beds.calls import call_error
from tests.beds.imagebed import MEDIA, Layout, Member, digest, docker_archive, make_tar, tar_of
from vsock.errors import CallError

FILES = [Member("etc/hosts", b"127.0.0.1")]
OTHER = [Member("etc/hosts", b"10.0.0.1 elsewhere")]


def refused(layout: Path, code: str, message: str, **options: object) -> CallError:
    output = layout.parent / "image"
    with call_error(code, match=message) as caught:
        build_image(layout, output, source_format="oci", **options)  # type: ignore[arg-type]
    assert sorted(layout.parent.iterdir()) == [layout]
    return caught.value


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_blob_that_is_not_its_digest(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(FILES, "+gzip")
    blob = layout.place(layout.layers[0])
    layout.finish()
    data = bytearray(blob.read_bytes())
    data[4] ^= 1  # the time in the gzip header: what it decompresses to is the same
    blob.write_bytes(data)
    problem = refused(tmp_path / "l", "integrity", "has the digest")
    assert problem.object == f"blobs/sha256/{blob.name}"


def test_a_blob_of_another_size(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(FILES)
    layout.layers[0]["size"] = 512
    refused(layout.finish(), "integrity", "not 512")


def test_a_layer_that_is_not_its_diff_id(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(FILES, "+gzip")
    layout.diff_ids[0] = digest(make_tar(OTHER))
    refused(layout.finish(), "integrity", "diff_id")


def test_a_manifest_that_is_not_its_digest(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(FILES).image()
    with layout.place(layout.manifests[0]).open("a") as file:
        file.write(" ")
    refused(layout.finish(), "integrity", "content of the digest")


def test_layers_and_diff_ids_that_do_not_pair(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(FILES)
    layout.diff_ids.append(digest(b""))
    refused(layout.finish(), "invalid", "1 layers, but 2 diff_ids")


@pytest.mark.parametrize(
    "kind", [MEDIA + "+encrypted", "application/vnd.wasm.content.layer.v1", ""]
)
def test_an_unknown_media_type(tmp_path: Path, kind: str) -> None:
    layout = Layout(tmp_path / "l").layer(FILES)
    layout.layers[0]["mediaType"] = kind
    refused(layout.finish(), "unsupported", "media type")


def test_an_unknown_media_type_of_the_manifest(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(FILES).image(mediaType="application/vnd.other+json")
    refused(layout.finish(), "unsupported", "media type 'application/vnd.other")


def test_foreign_layer_is_used_or_named_as_missing(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(FILES, "+gzip")
    layer = layout.layers[0]
    layer["mediaType"] = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    path = layout.finish()
    build_image(path, tmp_path / "image")
    (tmp_path / "image").unlink()
    layout.place(layer).unlink()
    refused(path, "not_found", "foreign layer")


@pytest.mark.parametrize(
    "bad", ["sha512:" + "a" * 128, "md5:abc", "sha256:../../../etc/passwd", "sha256:" + "A" * 64]
)
def test_a_digest_that_is_no_sha256_never_becomes_a_path(tmp_path: Path, bad: str) -> None:
    layout = Layout(tmp_path / "l").layer(FILES)
    layout.layers[0]["digest"] = bad
    refused(layout.finish(), "unsupported", "digest")


def test_a_blob_that_is_missing(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(FILES)
    layout.place(layout.layers[0]).unlink()
    refused(layout.finish(), "not_found", "no blob")


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("index.json", "{", "invalid"),
        ("index.json", "[]", "invalid"),
        ("index.json", '{"manifests": [7]}', "invalid"),
        ("index.json", '{"manifests": {}}', "invalid"),
        ("index.json", '{"manifests": []}', "not_found"),
        ("index.json", "[" * 100_000, "invalid"),
        ("oci-layout", '{"imageLayoutVersion": "2.0.0"}', "unsupported"),
        ("oci-layout", "{}", "invalid"),
    ],
)
def test_an_index_that_is_broken(tmp_path: Path, name: str, content: str, code: str) -> None:
    path = Layout(tmp_path / "l").layer(FILES).finish()
    (path / name).write_text(content)
    refused(path, code, name)


def test_an_index_that_is_too_large(tmp_path: Path) -> None:
    path = Layout(tmp_path / "l").layer(FILES).finish()
    with (path / "index.json").open("a") as file:
        file.write(" " * (9 << 20))
    refused(path, "resource", "limit")


def other_platform() -> str:
    return "riscv64" if "riscv64" not in default_platform() else "s390x"


def two_platforms(path: Path) -> Path:
    here = default_platform().split("/")[1]
    layout = Layout(path).layer(FILES).image(platform={"os": "linux", "architecture": here})
    layout.layer(OTHER).image(platform={"os": "linux", "architecture": other_platform()})
    attestation = {"vnd.docker.reference.type": "attestation-manifest"}
    layout.layer([]).image(annotations=attestation, platform={"os": "unknown"})
    return layout.finish()


def test_the_platform_chooses(tmp_path: Path) -> None:
    path = two_platforms(tmp_path / "l")
    here = build_image(path, tmp_path / "a").source_digest
    there = build_image(path, tmp_path / "b", platform=f"linux/{other_platform()}").source_digest
    assert (here, there) == (digest(make_tar(FILES)), digest(make_tar(OTHER)))
    for name in "ab":
        (tmp_path / name).unlink()
    refused(path, "not_found", "no image for linux/vax", platform="linux/vax")


def test_an_index_in_an_index(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(FILES).image()
    for _ in range(3):
        index = json.dumps({"manifests": layout.manifests}).encode()
        layout.manifests = [layout.blob(index, "application/vnd.oci.image.index.v1+json")]
    path = layout.finish()
    build_image(path, tmp_path / "image")
    (tmp_path / "image").unlink()
    for _ in range(4):
        index = json.dumps({"manifests": layout.manifests}).encode()
        layout.manifests = [layout.blob(index, "application/vnd.oci.image.index.v1+json")]
    refused(layout.finish(), "invalid", "nested")


def test_the_reference_chooses(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l")
    for members, name in ((FILES, "one"), (OTHER, "two")):
        annotations = {"org.opencontainers.image.ref.name": name}
        layout.layer(members).image(annotations=annotations)
    path = layout.finish()
    assert build_image(path, tmp_path / "a", reference="two").source_digest == digest(
        make_tar(OTHER)
    )
    (tmp_path / "a").unlink()
    refused(path, "invalid", "2 images that fit; name one: the names are 'one', 'two'")
    refused(path, "not_found", "'three'; the names are 'one', 'two'", reference="three")


def test_names_may_leave_out_the_registry_of_docker(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l")
    for members, name in ((FILES, "a:1"), (OTHER, "b:1")):
        annotations = {
            "io.containerd.image.name": f"docker.io/library/{name}",
            "org.opencontainers.image.ref.name": "1",
        }
        layout.layer(members).image(annotations=annotations)
    path = layout.finish()
    for name in ("b:1", "library/b:1", "docker.io/library/b:1"):
        built = build_image(path, tmp_path / "image", reference=name)
        assert built.source_digest == digest(make_tar(OTHER))
    (tmp_path / "image").unlink()
    refused(path, "invalid", "2 images that fit", reference="1")


INDEX = "application/vnd.oci.image.index.v1+json"


def nested(layout: Layout) -> Path:
    """Make the images of a layout the instances of one image."""
    index = json.dumps({"manifests": layout.manifests}).encode()
    layout.manifests = [layout.blob(index, INDEX)]
    return layout.finish()


def of(architecture: str, variant: str | None = None) -> dict[str, str]:
    return {"os": "linux", "architecture": architecture} | ({"variant": variant} if variant else {})


def test_the_first_instance_that_fits_counts(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(FILES, "+gzip").image(platform=of("amd64"))
    layout.layer(OTHER).image(platform=of("arm64"))
    layout.layer(FILES, "+zstd").image(platform=of("amd64"))
    path = nested(layout)
    built = build_image(path, tmp_path / "image", platform="linux/amd64")
    assert built.source_digest == digest(make_tar(FILES))


@pytest.mark.parametrize(
    "facts",
    [
        {"mediaType": "application/vnd.example.unknown.v1+json"},
        {"artifactType": "application/vnd.example.sbom"},
    ],
)
def test_entries_of_an_index_that_are_no_images_are_ignored(
    tmp_path: Path, facts: dict[str, object]
) -> None:
    layout = Layout(tmp_path / "l").layer(OTHER).image(**facts)
    path = nested(layout.layer(FILES).image(platform=of("amd64")))
    built = build_image(path, tmp_path / "image", platform="linux/amd64")
    assert built.source_digest == digest(make_tar(FILES))


def test_a_configuration_of_something_else_is_no_image(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(OTHER).image()
    kind = {"mediaType": "application/vnd.example.config+json"}
    layout.change_manifest(lambda manifest: manifest["config"].update(kind))
    path = nested(layout.layer(FILES).image())
    built = build_image(path, tmp_path / "image", platform="linux/amd64")
    assert built.source_digest == digest(make_tar(FILES))


def test_the_platform_of_a_single_image_is_heeded(tmp_path: Path) -> None:
    path = Layout(tmp_path / "l").layer(FILES).finish()
    message = "no image for linux/arm64; the platforms are 'linux/amd64'"
    refused(path, "not_found", message, platform="linux/arm64")
    build_image(path, tmp_path / "image", platform="linux/amd64")


@pytest.mark.parametrize(
    ("variants", "wanted", "found"),
    [
        ([None, "v9"], "arm64/v8", 0),
        (["v8", "v9"], "arm64", 0),
        ([None, "v2"], "amd64", 0),
        ([None, "v2"], "amd64/v2", 1),
        (["v1", "v2"], "amd64", 0),
        (["v2"], "amd64", 0),
        (["v6", "v7"], "arm", 1),
        (["v6", None], "arm/v7", 1),
        (["v2", "v3"], "amd64", "the platforms are 'linux/amd64/v2', 'linux/amd64/v3'"),
        ([None, "v2"], "amd64/v3", "no image for linux/amd64/v3"),
    ],
)
def test_variants_of_platforms(
    tmp_path: Path, variants: list[str | None], wanted: str, found: int | str
) -> None:
    architecture = wanted.partition("/")[0]
    tars = []
    layout = Layout(tmp_path / "l")
    for number, variant in enumerate(variants):
        members = [Member("etc/number", b"%d" % number)]
        tars.append(digest(make_tar(members)))
        layout.layer(members).image(platform=of(architecture, variant))
    path = nested(layout)
    if isinstance(found, int):
        built = build_image(path, tmp_path / "image", platform=f"linux/{wanted}")
        assert built.source_digest == tars[found]
    else:
        with pytest.raises(CallError, match=found):
            build_image(path, tmp_path / "image", platform=f"linux/{wanted}")


def test_images_of_two_names_are_not_chosen_by_the_machine(tmp_path: Path) -> None:
    here = default_platform().split("/")[1]
    layout = Layout(tmp_path / "l")
    for name, architecture in (("one", here), ("two", other_platform())):
        annotations = {"org.opencontainers.image.ref.name": name}
        layout.layer([Member(name)]).image(annotations=annotations, platform=of(architecture))
    path = layout.finish()
    refused(path, "invalid", "'one', 'two'")
    build_image(path, tmp_path / "image", platform=f"linux/{here}")


@pytest.mark.parametrize("platform", ["linux", "linux/", "/amd64", "a/b/c/d", ""])
def test_a_platform_that_is_none(tmp_path: Path, platform: str) -> None:
    path = Layout(tmp_path / "l").layer(FILES).finish()
    refused(path, "invalid", "is not OS/ARCHITECTURE", platform=platform)


# --- docker save


def test_a_docker_archive_with_a_wrong_layer(tmp_path: Path) -> None:
    good = docker_archive(tmp_path / "good.tar", [make_tar(FILES)])
    data = good.read_bytes().replace(b"127.0.0.1", b"127.0.0.2")
    (tmp_path / "bad.tar").write_bytes(data)
    with call_error("integrity", match="diff_id"):
        build_image(tmp_path / "bad.tar", tmp_path / "image")


def test_a_docker_archive_with_a_wrong_config(tmp_path: Path) -> None:
    good = docker_archive(tmp_path / "good.tar", [make_tar(FILES)])
    (tmp_path / "bad.tar").write_bytes(good.read_bytes().replace(b'"layers"', b'"Layers"'))
    with pytest.raises(CallError, match="is not of that digest"):
        build_image(tmp_path / "bad.tar", tmp_path / "image")


def test_a_docker_archive_of_two_images_wants_a_name(tmp_path: Path) -> None:
    tar = make_tar(FILES)
    config = json.dumps({"rootfs": {"diff_ids": [digest(tar)]}}).encode()
    manifest = [
        {"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]} for tag in ("a", "b")
    ]
    files = {
        "layer.tar": tar,
        "config.json": config,
        "manifest.json": json.dumps(manifest).encode(),
    }
    path = tmp_path / "two.tar"
    path.write_bytes(make_tar([Member(name, data) for name, data in files.items()]))
    with pytest.raises(CallError, match="name one: the names are 'a', 'b'"):
        build_image(path, tmp_path / "image")
    assert build_image(path, tmp_path / "image", reference="b").source_digest == digest(tar)
    with pytest.raises(CallError, match="no image c; the names are 'a', 'b'"):
        build_image(path, tmp_path / "image", reference="c")


def docker_25(path: Path, index: object, *, layers: bool = True) -> Path:
    """Write what Docker 25 writes: an OCI layout with a manifest.json in it."""
    tar = make_tar(FILES)
    layout = Layout(path)
    layer = layout.blob(tar)
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [digest(tar)]}}
    described = layout.blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json")
    names = [f"blobs/sha256/{str(each['digest'])[7:]}" for each in (described, layer)]
    manifest = {"schemaVersion": 2, "config": described, "layers": [layer] if layers else []}
    layout.manifests = [
        layout.blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    ]
    layout.finish()
    if index is not None:
        (path / "index.json").write_text(json.dumps(index))
    listed = [{"Config": names[0], "RepoTags": ["app:1"], "Layers": names[1:]}]
    (path / "manifest.json").write_text(json.dumps(listed))
    return tar_of(path, path.with_suffix(".tar"))


@pytest.mark.parametrize(
    ("index", "layers"),
    [
        (None, True),
        ({"schemaVersion": 2, "manifests": None}, True),
        ({"schemaVersion": 2, "manifests": []}, True),
        (None, False),
    ],
)
def test_archives_of_docker_25(tmp_path: Path, index: object, layers: bool) -> None:
    path = docker_25(tmp_path / "l", index, layers=layers)
    for reference in (None, "app:1") if index is not None or not layers else (None,):
        built = build_image(path, tmp_path / "image", reference=reference)
        assert built.source_digest == digest(make_tar(FILES))
    for code, options in (
        ("not_found", {"platform": "linux/arm64"}),
        ("not_found", {"reference": "app:2"}),
    ):
        with call_error(code, match="linux/amd64|app:1"):
            build_image(path, tmp_path / "other", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "files",
    [
        {
            "repositories": b'{"x": {"latest": "%s"}}' % (b"1" * 64),
            "1" * 64 + "/json": b"{}",
            "1" * 64 + "/layer.tar": make_tar(FILES),
        },
        {"manifest.json": b"null", "layer.tar": make_tar(FILES)},
    ],
)
def test_archive_of_docker_without_manifest_is_refused(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    (tmp_path / "x.tar").write_bytes(make_tar([Member(*each) for each in files.items()]))
    with call_error("unsupported", match="docker archive") as caught:
        build_image(tmp_path / "x.tar", tmp_path / "image")
    assert "--format tar" in str(caught.value.hint)
    build_image(tmp_path / "x.tar", tmp_path / "image", source_format="tar")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_an_unpacked_docker_archive_does_not_lead_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_bytes(make_tar(FILES))
    config = json.dumps({"rootfs": {"diff_ids": [digest(make_tar(FILES))]}})
    (tmp_path / "d/a").mkdir(parents=True)
    (tmp_path / "d/config.json").write_text(config)
    manifest = [{"Config": "config.json", "RepoTags": [], "Layers": [name]}]
    (tmp_path / "d/manifest.json").write_text(json.dumps(manifest))
    with call_error("invalid", match="outside of the directory"):
        build_image(tmp_path / "d", tmp_path / "image", source_format="docker")


def test_equal_layers_of_old_docker_are_symlinks_in_the_archive(tmp_path: Path) -> None:
    import tarfile

    tar = make_tar(FILES)
    config = json.dumps({"rootfs": {"diff_ids": [digest(tar)] * 2}}).encode()
    manifest = [{"Config": "c.json", "RepoTags": None, "Layers": ["a/layer.tar", "b/layer.tar"]}]
    path = tmp_path / "docker.tar"
    path.write_bytes(
        make_tar(
            [
                Member("a/layer.tar", tar),
                Member("b/layer.tar", kind=tarfile.SYMTYPE, target="../a/layer.tar"),
                Member("c.json", config),
                Member("manifest.json", json.dumps(manifest).encode()),
            ]
        )
    )
    assert len(build_layers(path, tmp_path)) == 1


def test_a_root_file_system_with_a_manifest_of_its_own_is_a_tar(tmp_path: Path) -> None:
    tar = make_tar([Member("manifest.json", b'{"name": "an app"}')])
    (tmp_path / "t.tar").write_bytes(tar)
    assert build_image(tmp_path / "t.tar", tmp_path / "image").source_digest == digest(tar)


@pytest.mark.parametrize("tags", [5, True, "app:1", {"app:1": 1}, None])
def test_a_docker_archive_with_tags_that_are_no_list(tmp_path: Path, tags: object) -> None:
    manifest = [{"Config": "config.json", "RepoTags": tags, "Layers": []}]
    path = tmp_path / "docker.tar"
    path.write_bytes(make_tar([Member("manifest.json", json.dumps(manifest).encode())]))
    with call_error("not_found", match="no image app:1"):
        build_image(path, tmp_path / "image", reference="app:1")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    manifest = [{"Config": name, "RepoTags": [], "Layers": []}]
    (tmp_path / "d").mkdir()
    (tmp_path / "d/manifest.json").write_text(json.dumps(manifest))
    with call_error("invalid", match="no name of a file"):
        build_image(tmp_path / "d", tmp_path / "image", source_format="docker")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"manifests": []}, "both 'layers' and 'manifests'"),
        ({"mediaType": "application/vnd.oci.image.index.v1+json"}, "says that it is"),
        ({"mediaType": 5}, "says that it is"),
    ],
)
def test_a_document_of_two_kinds_is_refused(
    tmp_path: Path, more: dict[str, object], told: str
) -> None:
    """One reader would take it for an image, another for a list of others."""
    layout = Layout(tmp_path / "l").layer(FILES).image()
    layout.change_manifest(lambda manifest: manifest.update(more))
    refused(layout.finish(), "invalid", told)


@pytest.mark.parametrize("key", ["layers", "config", "mediaType"])
def test_an_index_that_is_an_image_as_well_is_refused(tmp_path: Path, key: str) -> None:
    path = Layout(tmp_path / "l").layer(FILES).finish()
    value = {"layers": [], "mediaType": "application/vnd.oci.image.manifest.v1+json"}.get(key, {})
    edit(path / "index.json", lambda index: index.update({key: value}))
    refused(path, "invalid", "index.json")


def test_a_key_in_other_letters_is_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "l").layer(FILES).image()
    layout.change_manifest(lambda manifest: manifest.update(LAYERS=[]))
    refused(layout.finish(), "invalid", "'LAYERS'")


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = Layout(tmp_path / "l").layer(FILES).finish()
    text = (path / "index.json").read_text()
    (path / "index.json").write_text('{"manifests": [], ' + text.removeprefix("{"))
    refused(path, "invalid", "'manifests' comes twice")


@pytest.mark.parametrize("name", ["index.json", "oci-layout", "manifest.json"])
def test_a_description_that_comes_twice_in_an_archive_is_refused(tmp_path: Path, name: str) -> None:
    """Some readers take the first, others the last."""
    path = docker_25(tmp_path / "l", None)
    files = [
        Member(str(each.relative_to(tmp_path / "l")), each.read_bytes())
        for each in sorted((tmp_path / "l").rglob("*"))
        if each.is_file()
    ]
    again = next(each for each in files if each.name == name)
    path.write_bytes(make_tar([*files, Member(f"./{name}", again.data)]))  # the same: not two
    built = build_image(path, tmp_path / "image")
    assert built.source_digest == digest(make_tar(FILES))
    path.write_bytes(make_tar([*files, Member(f"./{name}", again.data + b" ")]))
    with call_error("invalid", match="comes twice"):
        build_image(path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_layout_and_a_docker_archive_that_disagree(tmp_path: Path) -> None:
    path = docker_25(tmp_path / "l", None)
    layout = Layout(tmp_path / "other").layer(OTHER).image()
    for blob in (tmp_path / "other/blobs/sha256").iterdir():
        blob.rename(tmp_path / "l/blobs/sha256" / blob.name)
    index = {"schemaVersion": 2, "manifests": layout.manifests}
    (tmp_path / "l/index.json").write_text(json.dumps(index))
    for source in (tmp_path / "l", tar_of(tmp_path / "l", path)):
        with call_error("invalid", match="not the image") as caught:
            build_image(source, tmp_path / "image")
        assert "--format" in str(caught.value.hint)
        for kind, members in (("oci", OTHER), ("docker", FILES)):
            built = build_image(source, tmp_path / kind, source_format=kind)
            assert built.source_digest == digest(make_tar(members))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("manifest.json", lambda text: text.replace('"Layers"', '"layers"')),
        ("manifest.json", lambda text: text.replace('"Config"', '"config"')),
        ("manifest.json", lambda text: text[:-2]),
        ("manifest.json", lambda text: text + " " * (9 << 20)),
        ("oci-layout", lambda text: None),
    ],
)
def test_a_damaged_archive_is_not_built_of_its_own_files(
    tmp_path: Path, name: str, change: Callable[[str], str | None]
) -> None:
    path = docker_25(tmp_path / "l", None)
    if name == "manifest.json":
        for other in ("index.json", "oci-layout"):
            (tmp_path / "l" / other).unlink()
    else:
        (tmp_path / "l/manifest.json").unlink()
    damaged = tmp_path / "l" / name
    text = change(damaged.read_text())
    damaged.unlink() if text is None else damaged.write_text(text)
    with pytest.raises(CallError):
        build_image(tar_of(tmp_path / "l", path), tmp_path / "image")
    assert not (tmp_path / "image").exists()
    build_image(path, tmp_path / "image", source_format="tar")


def test_of_very_many_images_one_has_to_be_named(tmp_path: Path) -> None:
    """The platform of each would be looked up in its configuration, of up to 8 MiB."""
    layout = Layout(tmp_path / "l").layer(FILES).image()
    digests = [f"sha256:{number:064x}" for number in range(200)]
    layout.manifests += [{**layout.manifests[0], "digest": each} for each in digests]
    refused(layout.finish(), "resource", "201 images")
    listed = [{"Config": "config.json", "RepoTags": ["a"], "Layers": []}] * 201
    (tmp_path / "d").mkdir()
    (tmp_path / "d/manifest.json").write_text(json.dumps(listed))
    (tmp_path / "d/config.json").write_text("{}")
    with pytest.raises(CallError, match="201 images") as caught:
        build_image(tmp_path / "d", tmp_path / "image", source_format="docker", platform="a/b")
    assert caught.value.code == "resource"
