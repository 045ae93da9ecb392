"""Storage: atomic writes, manifests, publication, raw files; the same on disk and on S3."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from modelyard import load
from modelyard.errors import DataError, RecipeError, StorageError
from modelyard.storage import (
    Artifact,
    ArtifactStore,
    Manifest,
    arrow_filesystem,
    exists,
    filesystem,
    find_files,
    join,
    list_files,
    read_bytes,
    remove,
    upload,
    write_bytes,
)
from modelyard.storage.uri import ENDPOINTS, endpoint_url


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "root")
    request.getfixturevalue("moto_server")
    return f"s3://yard/{uuid.uuid4().hex}"


def manifest(stage: str = "one", fingerprint: str = "f" * 64) -> Manifest:
    now = datetime.now(UTC)
    return Manifest(
        stage=stage, kind="k", kind_version=1, fingerprint=fingerprint, recipe="r", options={}, inputs={},
        code_version="0", started=now, ended=now,
    )  # fmt: skip


def make(root: str, stage: str = "one", fingerprint: str = "f" * 64) -> Artifact:
    draft = ArtifactStore(root).draft(stage, fingerprint)
    write_bytes(join(draft.uri, "deep", "a.bin"), b"abc")
    write_bytes(join(draft.work, "scratch"), b"x")
    return draft.publish(manifest(stage, fingerprint))


def test_publish_find_verify(root: str) -> None:
    store = ArtifactStore(root)
    store.check()
    assert store.find("one", "f" * 64) is None
    made = make(root)
    found = store.find("one", "f" * 64)
    assert found == made
    assert [(f.path, f.bytes) for f in made.manifest.files] == [("deep/a.bin", 3)]
    made.verify()
    assert made.local("deep", "a.bin").read_bytes() == b"abc"
    assert store.unpublished() == []
    write_bytes(made.join("deep", "a.bin"), b"abd")
    with pytest.raises(StorageError, match="missing or has changed"):
        made.verify()


def test_a_folder_without_manifest_is_no_artifact(root: str) -> None:
    store = ArtifactStore(root)
    draft = store.draft("one", "e" * 64)
    write_bytes(join(draft.uri, "a"), b"1")
    assert store.find("one", "e" * 64) is None
    assert store.unpublished() == [draft.uri]
    assert list(store.all()) == []
    with pytest.raises(StorageError, match="not a published artifact"):
        store.open(draft.uri)


def test_upload_list_remove(root: str, tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "z.txt").write_text("z")
    (tmp_path / "x" / "a.txt").write_text("aa")
    upload(tmp_path / "x", join(root, "up"))
    assert list(list_files(join(root, "up"))) == [("a.txt", 2), ("y/z.txt", 1)]
    remove(join(root, "up"))
    remove(join(root, "up"))
    assert list(list_files(join(root, "up"))) == []


def test_arrow_and_fsspec_see_the_same_bytes(root: str) -> None:
    write_bytes(join(root, "f.bin"), b"12345")
    fs, path = arrow_filesystem(join(root, "f.bin"))
    with fs.open_input_stream(path) as stream:
        assert stream.read() == b"12345"
    assert filesystem(join(root, "f.bin"))[0].size(filesystem(join(root, "f.bin"))[1]) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not valid JSON"),
        (b'{"format_version": 99}', "format 99"),
        (b'{"format_version": 1}', "damaged"),
    ],
)
def test_damaged_manifests(tmp_path: Path, content: bytes, message: str) -> None:
    made = make(str(tmp_path))
    write_bytes(made.join("manifest.json"), content)
    with pytest.raises(StorageError, match=message):
        ArtifactStore(str(tmp_path)).find("one", "f" * 64)


def test_history_is_newest_first(tmp_path: Path) -> None:
    for letter in "abc":
        make(str(tmp_path), fingerprint=letter * 64)
        time.sleep(0.01)
    assert [a.manifest.fingerprint[0] for a in ArtifactStore(str(tmp_path)).history("one")] == ["c", "b", "a"]


def test_unknown_scheme_is_named() -> None:
    with pytest.raises(StorageError, match="gopher:// is not supported"):
        exists("gopher://x")


@pytest.mark.parametrize("work", [exists, read_bytes, lambda uri: list(list_files(uri)), lambda uri: find_files([uri])])
def test_what_keeps_us_from_s3_is_named(work: Callable[[str], object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        work("s3://yard/a")
    assert "AWS_ACCESS_KEY_ID" in str(caught.value.mend)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    filesystem("s3://yard/a")[0].clear_instance_cache()
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        work("s3://yard/a")
    assert "AWS_ENDPOINT_URL" in str(caught.value.mend)
    filesystem("s3://yard/a")[0].clear_instance_cache()


def test_find_files_on_s3_and_disk_choose_alike(moto_server: str, tmp_path: Path) -> None:
    remote = f"s3://yard/{uuid.uuid4().hex}"
    for i in range(20):
        (tmp_path / f"d{i % 3}").mkdir(exist_ok=True)
        (tmp_path / f"d{i % 3}" / f"{i}.txt").write_text("x" * i)
    upload(tmp_path, remote)
    here = find_files([f"{tmp_path}/**/*.txt"], max_bytes=100)
    there = find_files([f"{remote}/**/*.txt"], max_bytes=100)
    assert [r.name for r in here.refs] == [r.name for r in there.refs]
    assert here.bytes <= 100
    assert len(find_files([remote]).refs) == 20


def test_a_recipe_names_the_endpoint_for_all_buckets_or_by_bucket(
    moto_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.delenv(ENDPOINTS, raising=False)
    recipe = tmp_path / "r.yaml"
    for endpoint in (moto_server, f"{{yard: '{moto_server}', other: 'http://127.0.0.1:9'}}"):
        recipe.write_text(f"name: r\nendpoint: {endpoint}\nstages: {{one: {{kind: curate, inputs: {{files: x}}}}}}\n")
        load(recipe)
        write_bytes("s3://yard/endpoint/a.txt", b"here")
        fs, path = arrow_filesystem("s3://yard/endpoint/a.txt")
        assert read_bytes("s3://yard/endpoint/a.txt") == b"here" and fs.get_file_info(path).size == 4
        assert endpoint_url("s3://third/x") == (moto_server if endpoint == moto_server else "http://127.0.0.1:9")
    for wrong, message in (("minio:9000", "as http://host:port"), ("http://key:secret@minio", "credentials do not")):
        recipe.write_text(f"name: r\nendpoint: {wrong}\nstages: {{one: {{kind: curate, inputs: {{files: x}}}}}}\n")
        with pytest.raises(RecipeError, match=message) as raised:
            load(recipe)
        assert "secret@" not in str(raised.value)
    recipe.write_text("name: r\nstages: {one: {kind: curate, inputs: {files: x}}}\n")
    load(recipe)
    assert endpoint_url("s3://yard/x") == "http://127.0.0.1:9"


def test_digest_covers_names_and_contents_not_places(tmp_path: Path) -> None:
    for name in ("p", "q"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("same")
    first, second = (find_files([f"{tmp_path}/{n}/*.txt"]) for n in "pq")
    assert first.digest == second.digest
    (tmp_path / "q" / "a.txt").write_text("changed")
    assert find_files([f"{tmp_path}/q/*.txt"]).digest != first.digest
    assert find_files([f"{tmp_path}/*/*.txt"], exclude=["q/*"]).refs[0].name == "p/a.txt"


def test_digest_cache_notices_change(tmp_path: Path) -> None:
    file, cache = tmp_path / "a.txt", tmp_path / "cache.json"
    file.write_text("one")
    first = find_files([str(file)], cache=cache)
    assert find_files([str(file)], cache=cache) == first
    file.write_text("two")
    assert find_files([str(file)], cache=cache).digest != first.digest
    cache.write_text("not json")
    assert find_files([str(file)], cache=cache).refs[0].bytes == 3


def test_nothing_found_and_all_excluded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        find_files([str(tmp_path / "*.none")])
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="check the paths and the exclude"):
        find_files([str(tmp_path / "*.txt")], exclude=["*"])


def test_a_killed_writer_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "f.bin"
    write_bytes(str(target), b"old" * 1000)
    code = (
        "import sys, itertools\nfrom modelyard.storage import write_bytes\nprint('go', flush=True)\n"
        "for i in itertools.count():\n    write_bytes(sys.argv[1], bytes([65 + i % 26]) * 3_000_000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.4)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / ".f.bin.4242.tmp").write_bytes(b"half")
    assert [name for name, _ in list_files(str(tmp_path))] == ["f.bin"]
    data = read_bytes(str(target))
    assert len(data) in (3000, 3_000_000)
    assert len(set(data)) in (1, 3)
