"""Captures in S3: against a real HTTP service."""

import base64
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from s3_server import BUCKET, S3Server, s3_server
from shard_making import LAYER, LAYERS, columns, killer, values, write_step
from tiny_models import make_model

from mlx_hooks import CaptureWarning, HookedModel, HookError, MechIntConfig, MechIntHooks, UploadWarning
from mlx_hooks.storage import remote
from mlx_hooks.storage.remote import Backlog, RemoteFolder, cache_folder
from mlx_hooks.storage.shards import ShardReader, ShardWriter, fetch, upload
from mlx_hooks.training.writer import open_writer


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server(monkeypatch) as server:
        yield server


@pytest.fixture
def folder(s3: S3Server) -> RemoteFolder:
    return RemoteFolder(BUCKET, "experiments/exp001/")


def refusal(do: Callable[[], Any]) -> str:
    with pytest.raises(HookError) as caught:
        do()
    return str(caught.value)


def file_of(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


# --- A folder in a bucket. ---


def test_what_is_written_is_read(folder: RemoteFolder) -> None:
    assert folder.url == "s3://captures/experiments/exp001"
    assert folder.read("manifest.json") is None
    folder.write("manifest.json", b"{}")
    RemoteFolder(BUCKET, "experiments").write("exp0011", b"")  # its name begins alike
    assert RemoteFolder.of_url(folder.url).read("manifest.json") == b"{}"
    folder.below("rank_001").write("manifest.json", b"[]")
    assert folder.names() == ["manifest.json", "rank_001/manifest.json"]
    assert folder.below("rank_001").names() == ["manifest.json"]
    assert RemoteFolder(BUCKET).names()[0] == "experiments/exp001/manifest.json"


def test_a_file_arrives_whole(folder: RemoteFolder, tmp_path: Path) -> None:
    path = file_of(tmp_path / "a", 100_000)
    digest = folder.put(path, "a")
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    folder.get("a", tmp_path / "b", digest)
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_a_large_file_goes_in_parts(
    folder: RemoteFolder, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART", 5 * 2**20)
    path = file_of(tmp_path / "a", 11 * 2**20)
    assert folder.put(path, "a") == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [method for method, _ in s3.requests].count("POST") >= 2  # one begins, one ends the parts
    folder.get("a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_the_checksum_of_parts_is_the_one_that_s3_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PART", 4)
    (tmp_path / "a").write_bytes(b"abcdefghij")
    parts = b"".join(hashlib.sha256(part).digest() for part in (b"abcd", b"efgh", b"ij"))
    told = base64.b64encode(hashlib.sha256(parts).digest()).decode() + "-3"
    assert remote._digests(tmp_path / "a") == (10, hashlib.sha256(b"abcdefghij").digest(), told)


def test_what_arrives_otherwise_is_no_upload(
    folder: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_of(tmp_path / "a", 1000)
    send = folder._client.upload_file
    other = file_of(tmp_path / "b", 1000)
    monkeypatch.setattr(folder._client, "upload_file", lambda _, *args, **kw: send(str(other), *args, **kw))
    assert refusal(lambda: folder.put(path, "a")).endswith("cannot take a: it did not arrive as it was sent.")


def test_what_was_changed_there_is_not_fetched(folder: RemoteFolder, tmp_path: Path) -> None:
    digest = folder.put(file_of(tmp_path / "a", 10), "a")
    folder.write("a", b"other")
    assert "its checksum differs" in refusal(lambda: folder.get("a", tmp_path / "b", digest))
    assert not (tmp_path / "b").exists()
    assert refusal(lambda: folder.get("c", tmp_path / "b")).endswith("cannot give c: there is no such object.")


def test_what_fails_for_a_moment_is_tried_again(folder: RemoteFolder, s3: S3Server, tmp_path: Path) -> None:
    fails = iter([True, True])
    s3.fails = lambda method, path: next(fails, False)
    folder.put(file_of(tmp_path / "a", 10), "a")
    assert next(fails, None) is None
    assert folder.names() == ["a"]


# --- What is impossible is told in one sentence. ---


def test_no_bucket(s3: S3Server, tmp_path: Path) -> None:
    there_is_none = RemoteFolder("none", "x")
    path = file_of(tmp_path / "a", 10)
    for do in (
        lambda: there_is_none.read("a"),
        lambda: there_is_none.write("a", b""),
        lambda: there_is_none.put(path, "a"),
        there_is_none.names,
    ):
        assert "there is no bucket 'none'" in refusal(do)


def test_no_service(folder: RemoteFolder, s3: S3Server, tmp_path: Path) -> None:
    s3.stop()
    path = file_of(tmp_path / "a", 10)
    for do in (lambda: folder.read("a"), lambda: folder.write("a", b""), lambda: folder.put(path, "a")):
        assert refusal(do).endswith(f": 127.0.0.1:{s3.port} does not answer.")
    s3.start()
    assert folder.read("a") is None


def test_a_service_that_fails(folder: RemoteFolder, s3: S3Server, tmp_path: Path) -> None:
    s3.fails = lambda method, path: method == "PUT"
    path = file_of(tmp_path / "a", 10)
    for do in (lambda: folder.write("a", b""), lambda: folder.put(path, "a")):
        assert refusal(do).endswith("cannot take a: the service answers Service Unavailable.")


def test_no_credentials(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "there are no credentials; set AWS_ACCESS_KEY_ID" in refusal(lambda: RemoteFolder(BUCKET).read("a"))
    monkeypatch.setenv("AWS_PROFILE", "unknown")
    assert "unknown" in refusal(lambda: RemoteFolder(BUCKET).read("a"))


def test_no_permission(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError

    def deny(**_: Any) -> None:
        answer = {"Error": {"Code": "AccessDenied", "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise ClientError(answer, "PutObject")  # type: ignore[arg-type]

    monkeypatch.setattr(folder._client, "put_object", deny)
    assert "access is denied (AccessDenied); the credentials must" in refusal(lambda: folder.write("a", b""))


def test_a_bucket_name_that_is_none(s3: S3Server) -> None:
    assert 'Invalid bucket name "a/b"' in refusal(lambda: RemoteFolder("a/b").read("a"))


@pytest.mark.parametrize("url", ["s3://", "http://bucket/prefix", "s3:///prefix", ""])
def test_what_is_no_address(url: str) -> None:
    assert refusal(lambda: RemoteFolder.of_url(url)) == f"An address in S3 is s3://bucket/prefix, got {url!r}."


def test_without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert refusal(lambda: RemoteFolder(BUCKET)) == (
        "S3 needs boto3, which is not installed: pip install 'neuroscope-mlx[s3]'."
    )


def test_boto3_is_imported_when_it_is_used() -> None:
    code = "import sys, mlx_hooks, mlx_hooks.storage.remote; print({'boto3', 'botocore'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_nothing_of_the_credentials_is_shown(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:a-password@127.0.0.1:9")
    told = refusal(lambda: RemoteFolder(BUCKET).write("a", b""))
    assert told.endswith("127.0.0.1:9 does not answer.")
    assert "a-secret" not in told
    assert "an-id" not in told


def test_folders_of_fetched_captures_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    urls = ["s3://a/b/c", "s3://a/b_c", "s3://a/../../b", "s3://a"]
    folders = [cache_folder(url) for url in urls]
    assert len(set(folders)) == 4
    assert {folder.parent for folder in folders} == {tmp_path / "neuroscope-mlx" / "captures"}


# --- Work in the background. ---


def test_work_is_done_in_order_in_another_thread() -> None:
    done: list[tuple[str, bool]] = []
    backlog = Backlog(lambda name: done.append((name, threading.current_thread() is threading.main_thread())))
    for name in "abc":
        backlog.add(name)
    assert backlog.close(10) == {}
    assert done == [("a", False), ("b", False), ("c", False)]
    assert "neuroscope-uploads" not in {thread.name for thread in threading.enumerate()}


def test_what_failed_is_told_and_tried_again() -> None:
    problems = {"a": HookError("no way"), "c": ValueError()}
    done = []

    def work(name: str) -> None:
        if name in problems:
            raise problems[name]
        done.append(name)

    backlog = Backlog(work)
    for name in "abc":
        backlog.add(name)
    assert backlog.wait(10)
    assert backlog.failed == {"a": "no way", "c": "ValueError"}
    del problems["a"]
    backlog.retry()
    assert backlog.close(10) == {"c": "ValueError"}
    assert done == ["b", "a"]


def test_closing_waits_no_longer_than_it_is_told() -> None:
    started, go_on = threading.Event(), threading.Event()
    done = []

    def work(name: str) -> None:
        started.set()
        go_on.wait(10)
        done.append(name)

    backlog = Backlog(work)
    backlog.add("a")
    started.wait(10)
    backlog.add("b")
    begun = time.monotonic()
    assert backlog.close(0.1) == dict.fromkeys("ab", "it was not done after 0.1 s")
    assert time.monotonic() - begun < 5
    go_on.set()
    backlog._thread.join(10)
    assert done == ["a"]


# --- Captures on their way there. ---


class Captured:
    """Writers of one folder and one place in S3."""

    def __init__(self, folder: Path, remote: RemoteFolder, *, keep_local: bool) -> None:
        self.folder, self.remote, self.keep_local = folder, remote, keep_local

    def open(self, **options: Any) -> ShardWriter:
        return ShardWriter(self.folder, layers=LAYERS, remote=self.remote, keep_local=self.keep_local, **options)

    @property
    def local(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    @property
    def here(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text())

    @property
    def there(self) -> dict[str, Any]:
        return json.loads(self.remote.read("manifest.json") or b"{}")


SHARDS = [f"activations_shard_00000{n}_step_{n}.safetensors" for n in range(4)]


@pytest.fixture
def s3_only(folder: RemoteFolder, tmp_path: Path) -> Captured:
    return Captured(tmp_path / "cache", folder, keep_local=False)


@pytest.fixture
def both(folder: RemoteFolder, tmp_path: Path) -> Captured:
    return Captured(tmp_path / "cache", folder, keep_local=True)


def test_both_keeps_the_files_here_and_there(both: Captured, tmp_path: Path) -> None:
    with both.open() as writer:
        write_step(writer, 0)
        write_step(writer, 1)
    assert both.local == both.remote.names() == [*SHARDS[:2], "manifest.json"]
    assert both.here == both.there
    for entry in both.here["shards"]:
        assert (entry["local"], entry["remote"]) == (True, f"{both.remote.url}/{entry['file']}")
        both.remote.get(entry["file"], tmp_path / "copy", entry["sha256"])
        assert (tmp_path / "copy").read_bytes() == (both.folder / entry["file"]).read_bytes()


def test_s3_keeps_the_files_there_alone(s3_only: Captured) -> None:
    with s3_only.open() as writer:
        write_step(writer, 0)
        write_step(writer, 1)
    assert s3_only.local == ["manifest.json"]
    assert s3_only.remote.names() == [*SHARDS[:2], "manifest.json"]
    assert [entry["local"] for entry in s3_only.here["shards"]] == [False, False]
    assert s3_only.there["total_rows"] == 12


def test_a_file_stays_until_it_is_there_with_all_its_bytes(
    s3_only: Captured, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = s3_only.remote._client.upload_file

    def damaged(path: str, *args: Any, **options: Any) -> None:
        other = Path(path).with_suffix(".other")
        other.write_bytes(Path(path).read_bytes()[:-1] + b"?")
        send(str(other), *args, **options)
        other.unlink()

    monkeypatch.setattr(s3_only.remote._client, "upload_file", damaged)
    with pytest.warns(UploadWarning, match="did not arrive as it was sent"), s3_only.open() as writer:
        write_step(writer, 0)
    assert s3_only.local == [SHARDS[0], "manifest.json"]
    assert s3_only.there["shards"] == []


def test_the_manifest_there_names_what_is_there(both: Captured, s3: S3Server) -> None:
    s3.fails = lambda method, path: SHARDS[1] in path
    with both.open(upload_seconds=20) as writer:
        for step in range(3):
            write_step(writer, step)
        with pytest.warns(UploadWarning):
            writer.close()
    assert [entry["file"] for entry in both.there["shards"]] == [SHARDS[0], SHARDS[2]]
    assert (both.there["total_shards"], both.there["total_rows"]) == (2, 12)
    assert both.here["total_shards"] == 3


def test_uploads_that_fail_are_told_once_and_made_later(s3_only: Captured, s3: S3Server) -> None:
    with s3_only.open() as writer:
        s3.stop()
        write_step(writer, 0)
        assert writer._backlog is not None
        assert writer._backlog.wait(20)
        with pytest.warns(UploadWarning) as caught:
            write_step(writer, 1)
        assert writer._backlog.wait(20)
        write_step(writer, 2)  # warnings are errors: it says nothing
        assert writer._backlog.wait(20)
        assert s3_only.local == [*SHARDS[:3], "manifest.json"]
        s3.start()
    assert str(caught[0].message) == (
        f"1 of the shards in {s3_only.folder} could not be uploaded ({s3_only.remote.url} cannot give manifest.json: "
        f"127.0.0.1:{s3.port} does not answer). Nothing is lost: they stay there, and are tried again with the next "
        "rows, and at the end."
    )
    assert s3_only.local == ["manifest.json"]
    assert s3_only.there["total_shards"] == 3


def test_what_failed_is_tried_again_with_the_next_rows(s3_only: Captured, s3: S3Server) -> None:
    with s3_only.open() as writer:
        assert writer._backlog is not None
        for step in (0, 2):
            s3.fails = lambda method, path: method == "PUT" and "shard" in path
            write_step(writer, step)
            assert writer._backlog.wait(20)
            s3.fails = lambda method, path: False
            with pytest.warns(UploadWarning):  # the second time too, since it worked in between
                write_step(writer, step + 1)
            assert writer._backlog.wait(20)
            assert s3_only.local == ["manifest.json"]
            assert s3_only.there["total_shards"] == step + 2
        write_step(writer, 4)


def test_what_could_not_be_uploaded_at_all_is_uploaded_when_capturing_goes_on(s3_only: Captured, s3: S3Server) -> None:
    writer = s3_only.open(upload_seconds=20)
    s3.stop()
    write_step(writer, 0)
    with pytest.warns(UploadWarning, match=r"1 of the shards .* when capturing to this folder goes on, or by"):
        writer.close()
    writer.close()
    assert s3_only.local == [SHARDS[0], "manifest.json"]
    assert ShardReader(s3_only.folder).steps == [0]
    s3.start()
    s3_only.open().close()
    assert s3_only.local == ["manifest.json"]
    assert s3_only.remote.names() == [SHARDS[0], "manifest.json"]


def test_what_is_there_is_not_sent_again_when_its_manifest_fails(s3_only: Captured, s3: S3Server) -> None:
    with s3_only.open() as writer:
        s3.fails = lambda method, path: method == "PUT" and path.endswith("manifest.json")
        write_step(writer, 0)
        assert writer._backlog is not None
        assert writer._backlog.wait(20)
        assert s3_only.local == [SHARDS[0], "manifest.json"]  # nobody could find it there
        s3.fails = lambda method, path: False
    assert s3_only.local == ["manifest.json"]
    assert [path.endswith(SHARDS[0]) for method, path in s3.requests if method == "PUT"].count(True) == 1


def test_writing_does_not_wait_for_uploads(both: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    send = both.remote._client.upload_file
    monkeypatch.setattr(both.remote._client, "upload_file", lambda *a, **k: (goes_on.wait(30), send(*a, **k)))
    with both.open() as writer:
        begun = time.monotonic()
        for step in range(4):
            write_step(writer, step)
        assert time.monotonic() - begun < 5
        assert both.there["total_shards"] == 0
        goes_on.set()
    assert both.there["total_shards"] == 4


def test_closing_does_not_wait_for_ever(both: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()
    send = both.remote._client.upload_file
    monkeypatch.setattr(both.remote._client, "upload_file", lambda *a, **k: (goes_on.wait(30), send(*a, **k)))
    writer = both.open(upload_seconds=0.2)
    write_step(writer, 0)
    with pytest.warns(UploadWarning, match=r"was not done after 0.2 s"):
        writer.close()
    before = both.here
    goes_on.set()
    assert writer._backlog is not None
    writer._backlog._thread.join(20)
    assert both.here == before  # another may write the folder now
    assert both.there["shards"] == []
    both.open().close()
    assert both.there["total_shards"] == 1


def test_who_interrupts_closing_can_go_on(both: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = both.open()
    write_step(writer, 0)
    assert writer._backlog is not None

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer._backlog, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    both.open().close()
    assert both.there["total_shards"] == 1
    monkeypatch.undo()
    writer._backlog.close(10)


def test_reports_are_uploaded_at_the_end(both: Captured) -> None:
    with both.open() as writer:
        writer.report({"step": 10, "train_loss": 2.5})
    assert both.there["training"] == [{"step": 10, "train_loss": 2.5}]
    assert both.there["sessions"][0]["ended"]


# --- Two runs and one place. ---


@pytest.fixture
def two(folder: RemoteFolder, tmp_path: Path) -> tuple[Captured, Captured]:
    one, other = (Captured(tmp_path / name, folder, keep_local=False) for name in ("one", "other"))
    return one, other


def settled(writer: ShardWriter) -> None:
    assert writer._backlog is not None
    assert writer._backlog.wait(20)


def test_two_runs_do_not_overwrite_each_other(two: tuple[Captured, Captured]) -> None:
    one, other = two
    first = one.open()
    write_step(first, 0)
    settled(first)
    with other.open() as second:
        with pytest.warns(CaptureWarning):
            write_step(second, 0, n=4)
        write_step(first, 1)
        settled(first)
        with pytest.warns(UploadWarning, match=f"another run writes to {one.remote.url}: give each its own s3_prefix"):
            write_step(first, 2)
        write_step(second, 1, n=4)
    with pytest.warns(UploadWarning, match=r"2 of the shards"):
        first.close()
    assert one.local == [*SHARDS[1:3], "manifest.json"]
    assert other.local == ["manifest.json"]
    # All that each captured can be read.
    rows = ShardReader(one.folder).rows(0).sample(99)
    np.testing.assert_array_equal(rows.values, np.concatenate([values(step, 6) for step in range(3)]))
    assert [(entry["step"], entry["rows"]) for entry in ShardReader(one.remote.url).entries] == [(0, 4), (1, 4)]
    assert one.there["total_shards"] == 3


def test_a_run_whose_place_was_taken_asks_no_more(two: tuple[Captured, Captured], s3: S3Server) -> None:
    one, other = two
    first = one.open()
    other.open().close()
    write_step(first, 0)
    settled(first)
    del s3.requests[:]
    with pytest.warns(UploadWarning):
        write_step(first, 1)
    settled(first)
    with pytest.warns(UploadWarning):
        first.close()
    assert s3.requests == []


def test_two_runs_that_both_went_on_are_not_joined(two: tuple[Captured, Captured]) -> None:
    one, other = two
    with one.open() as writer:
        write_step(writer, 0)
    fetch(one.remote.url, other.folder)
    ShardWriter(one.folder, layers=LAYERS).close()
    other.open().close()
    assert f"{one.remote.url} was continued by another run than {one.folder}" in refusal(one.open)


def test_shards_of_the_same_name_are_not_joined(two: tuple[Captured, Captured]) -> None:
    one, other = two
    first = one.open()
    with other.open() as second:
        write_step(second, 0)
        write_step(first, 0)
        with pytest.warns(UploadWarning):
            first.close()
    assert "was continued by another run" in refusal(one.open)
    assert "was continued by another run" in refusal(lambda: upload(one.folder, one.remote.url))


def test_only_one_of_two_that_begin_at_once_has_the_place(
    two: tuple[Captured, Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    write = RemoteFolder.write

    def late(remote: RemoteFolder, *args: Any, **options: Any) -> str:
        monkeypatch.undo()
        other.open().close()
        return write(remote, *args, **options)

    monkeypatch.setattr(RemoteFolder, "write", late)
    # It has looked and found nobody there.
    assert "another run writes to" in refusal(one.open)
    ShardWriter(one.folder, layers=LAYERS).close()


def test_an_object_of_somebody_else_is_not_replaced(folder: RemoteFolder, tmp_path: Path) -> None:
    folder.write("a", b"other")
    assert "it has another object of this name" in refusal(lambda: folder.put(file_of(tmp_path / "a", 9), "a"))
    assert folder.read("a") == b"other"
    version = folder.version("a")
    (tmp_path / "a").write_bytes(b"other")
    assert folder.put(tmp_path / "a", "a") == hashlib.sha256(b"other").hexdigest()
    assert folder.version("a") == version
    for wrong in (None, '"0"'):
        assert "somebody else has written it" in refusal(lambda wrong=wrong: folder.write("a", b"", replaces=wrong))
    assert folder.write("a", b"new", replaces=version) == folder.version("a") != version
    assert folder.version("b") is None
    assert "somebody else" in refusal(lambda: folder.write("b", b"", replaces=version))


def test_a_service_without_conditions(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError

    put = folder._client.put_object

    def old(**given: Any) -> Any:
        if "IfNoneMatch" in given:
            raise ClientError({"Error": {"Code": "NotImplemented", "Message": "no"}}, "PutObject")
        return put(**given)

    monkeypatch.setattr(folder._client, "put_object", old)
    folder.write("a", b"x", replaces=None)
    assert folder.read("a") == b"x"


def test_an_answer_that_was_lost_is_no_other_run(both: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    write = RemoteFolder.write

    def lost(remote: RemoteFolder, *args: Any, **options: Any) -> str:
        write(remote, *args, **options)
        monkeypatch.undo()
        raise HookError("no answer")

    with both.open() as writer:
        monkeypatch.setattr(RemoteFolder, "write", lost)
        write_step(writer, 0)
        settled(writer)
        with pytest.warns(UploadWarning, match="no answer"):
            write_step(writer, 1)
    assert both.there["total_shards"] == 2


def test_numbers_go_on_after_shards_that_no_manifest_names(both: Captured, tmp_path: Path) -> None:
    both.remote.put(file_of(tmp_path / "a", 9), SHARDS[2])
    with both.open() as writer:
        assert write_step(writer, 0)[0].name == "activations_shard_000003_step_0.safetensors"


# --- Later. ---


@pytest.mark.parametrize("keep_local", [False, True])
def test_what_was_not_uploaded_can_be_uploaded_later(
    keep_local: bool, both: Captured, s3: S3Server, tmp_path: Path
) -> None:
    with both.open() as writer:
        write_step(writer, 0)
        settled(writer)
        s3.fails = lambda method, path: method == "PUT"
        write_step(writer, 1)
        settled(writer)
        with pytest.warns(UploadWarning):
            writer.close()
    assert both.there["total_shards"] == 1
    assert "cannot take" in refusal(lambda: upload(both.folder, both.remote.url))
    s3.fails = lambda method, path: False
    told: list[tuple[int, int]] = []
    upload(both.folder, both.remote.url, lambda *n: told.append(n), keep_local=keep_local)
    assert told == ([(1, 1)] if keep_local else [(1, 2), (2, 2)])
    assert both.there["total_shards"] == 2
    assert both.there["sessions"] == both.here["sessions"]
    assert both.local == ([*SHARDS[:2], "manifest.json"] if keep_local else ["manifest.json"])
    assert len(ShardReader(both.remote.url).rows(0)) == 12
    with both.open(), pytest.raises(HookError, match="being written"):
        upload(both.folder, both.remote.url)


def test_a_folder_of_ranks_is_uploaded(folder: RemoteFolder, tmp_path: Path) -> None:
    assert "There are no captured activations in" in refusal(lambda: upload(tmp_path, folder.url))
    for rank in (0, 1):
        with ShardWriter(tmp_path, layers=LAYERS, rank=rank, world_size=2, each_rank=True) as writer:
            write_step(writer, 0, n=rank + 1)
    upload(tmp_path, folder.url)
    assert len(ShardReader(folder.url).rows(0)) == 3


@pytest.mark.parametrize("each_rank", [False, True])
def test_captures_of_one_rank_and_of_all_are_not_mixed(each_rank: bool, folder: RemoteFolder, tmp_path: Path) -> None:
    def written(name: str, each_rank: bool, step: int = 0, **options: Any) -> Path:
        path = tmp_path / name
        with ShardWriter(path, layers=LAYERS, each_rank=each_rank, **options) as writer:
            write_step(writer, step)
        return path

    written("first", each_rank, remote=folder)
    before = folder.names()
    said = f"{folder.url} holds captures {'of all ranks' if each_rank else 'that one rank wrote'}: "
    said += f"give those of {'one rank' if each_rank else 'all ranks'} another s3_prefix."
    assert said in refusal(lambda: written("second", not each_rank, remote=folder))
    assert not (tmp_path / "second").exists()
    other = written("other", not each_rank)
    assert said in refusal(lambda: upload(other, folder.url))
    assert folder.names() == before
    assert f"{other} holds captures " in refusal(lambda: fetch(folder.url, other))
    written("first", each_rank, step=1, remote=folder)
    assert len(ShardReader(folder.url).entries) == 2


# --- Before training. ---


def config(tmp_path: Path, **options: Any) -> MechIntConfig:
    return MechIntConfig(
        **{"storage_path": tmp_path / "cache", "storage_backend": "s3", "s3_bucket": BUCKET, "s3_prefix": "x"} | options
    )


def test_a_configuration_leads_to_s3(s3: S3Server, tmp_path: Path) -> None:
    for backend, kept in (("s3", False), ("both", True)):
        prefix = f"exp/{backend}"
        folder = tmp_path / backend
        with open_writer(config(folder, storage_backend=backend, s3_prefix=prefix), LAYERS) as writer:
            write_step(writer, 0)
        assert (folder / "cache" / SHARDS[0]).exists() is kept
        assert RemoteFolder(BUCKET, prefix).names() == [SHARDS[0], "manifest.json"]
    for prefix in ("", "a b/c/"):
        with open_writer(config(tmp_path / f"at {prefix[:1]}", s3_prefix=prefix), LAYERS) as writer:
            write_step(writer, 0)
        assert len(ShardReader(f"s3://{BUCKET}/{prefix}").rows(0)) == 6
        assert RemoteFolder(BUCKET).read(f"{prefix}manifest.json") is not None
    ranks = config(tmp_path / "ranks", writing_ranks="all", s3_prefix="exp/all")
    with open_writer(ranks, LAYERS, rank=1, world_size=2) as writer:
        write_step(writer, 0)
    assert RemoteFolder(BUCKET, "exp/all").names() == [f"rank_001/{SHARDS[0]}", "rank_001/manifest.json"]


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        ({"bucket": "none"}, "there is no bucket 'none'"),
        ({"env": {"AWS_ACCESS_KEY_ID": None}}, "there are no credentials"),
        ({"env": {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}}, "127.0.0.1:9 does not answer"),
        ({"fails": "PUT"}, "cannot take manifest.json: the service answers"),
        ({"boto3": None}, "pip install 'neuroscope-mlx[s3]'"),
    ],
)
def test_what_is_impossible_fails_at_the_start(
    prepare: dict[str, Any], said: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in prepare.get("env", {}).items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    if "boto3" in prepare:
        monkeypatch.setitem(sys.modules, "boto3", None)
    s3.fails = lambda method, path: method == prepare.get("fails")
    for backend in ("s3", "both"):
        wanted = config(tmp_path, storage_backend=backend, s3_bucket=prepare.get("bucket", BUCKET))
        assert said in refusal(lambda wanted=wanted: open_writer(wanted, LAYERS))
        assert not (tmp_path / "cache" / "manifest.json").exists()
    ShardWriter(tmp_path / "cache", layers=LAYERS).close()  # nobody holds the folder


def test_no_bucket_is_named_in_the_configuration(tmp_path: Path) -> None:
    assert "needs s3_bucket" in refusal(lambda: config(tmp_path, s3_bucket=None))


# --- Going on. ---


def test_numbering_goes_on_after_what_is_there_alone(s3_only: Captured) -> None:
    with s3_only.open() as writer:
        write_step(writer, 0)
    with s3_only.open() as writer:
        write_step(writer, 1)
    assert s3_only.remote.names() == [*SHARDS[:2], "manifest.json"]
    assert [entry["session"] for entry in s3_only.there["shards"]] == [0, 1]


def test_a_file_that_is_said_to_be_gone_goes_when_capturing_goes_on(s3_only: Captured) -> None:
    with s3_only.open() as writer:
        path = write_step(writer, 0)[0]
    s3_only.remote.get(path.name, path)  # as if its writer had been killed before it removed the file
    ShardWriter(s3_only.folder, layers=LAYERS).close()
    assert s3_only.local == ["manifest.json"]


@pytest.mark.parametrize("keep_local", [False, True])
def test_on_another_machine_the_manifest_there_is_continued(
    keep_local: bool, folder: RemoteFolder, tmp_path: Path
) -> None:
    first = Captured(tmp_path / "first", folder, keep_local=keep_local)
    with first.open() as writer:
        write_step(writer, 0)
    second = Captured(tmp_path / "second", folder, keep_local=keep_local)
    with second.open() as writer:
        write_step(writer, 1)
    assert [entry["file"] for entry in second.there["shards"]] == SHARDS[:2]
    assert ShardReader(tmp_path / "second").rows(0).sample(99).values.tolist() == [
        *values(0, 6).tolist(), *values(1, 6).tolist(),
    ]  # fmt: skip
    # The first goes on after the second.
    with first.open() as writer:
        write_step(writer, 2)
    assert [(entry["file"], entry["session"]) for entry in first.there["shards"]] == [(SHARDS[n], n) for n in range(3)]
    assert [session["session"] for session in first.there["sessions"]] == [0, 1, 2]


def test_what_does_not_go_together_is_refused(both: Captured, tmp_path: Path) -> None:
    with both.open() as writer:
        write_step(writer, 0)
    other = Captured(tmp_path / "other", both.remote, keep_local=True)
    with ShardWriter(other.folder, layers=LAYERS) as writer:
        write_step(writer, 0)
    assert "holds other captures than" in refusal(other.open)
    moved = Captured(both.folder, RemoteFolder(BUCKET, "elsewhere"), keep_local=True)
    assert f"is at {both.remote.url}, not at s3://captures/elsewhere: go on there" in refusal(moved.open)
    layers = {LAYER: LAYERS[LAYER] | {"shape": [8]}}
    assert "and now they are [d_model 8]" in refusal(
        lambda: ShardWriter(tmp_path / "new", layers=layers, remote=both.remote)
    )
    both.remote.write("manifest.json", b"{")
    assert "cannot read s3://captures/experiments/exp001/manifest.json: it is no manifest" in refusal(both.open)


def test_what_was_captured_locally_first_is_uploaded_too(both: Captured) -> None:
    with ShardWriter(both.folder, layers=LAYERS) as writer:
        write_step(writer, 0)
    with both.open() as writer:
        write_step(writer, 1)
    assert both.there["total_shards"] == 2


def test_killed_at_any_moment_everything_arrives(s3_only: Captured) -> None:
    generator = random.Random(0)
    with killer(s3_only.remote.url) as kill:
        # A busy machine may take long to begin.
        for _ in range(20):
            kill(s3_only.folder, 1.0)
            if "manifest.json" in s3_only.remote.names() and "manifest.json" in s3_only.local:
                break
        for _ in range(5):
            for entry in s3_only.here["shards"]:
                assert entry["remote"] or (s3_only.folder / entry["file"]).exists()
            there = s3_only.remote.names()
            assert all(entry["file"] in there for entry in s3_only.there["shards"])
            kill(s3_only.folder, generator.uniform(0.2, 0.5))
    s3_only.open().close()
    assert s3_only.local == ["manifest.json"]
    told = s3_only.there["shards"]
    assert [entry["step"] for entry in told] == list(range(len(told)))
    assert len(told) > 5
    assert s3_only.remote.names() == [*(entry["file"] for entry in told), "manifest.json"]
    rows = ShardReader(s3_only.folder).rows(0)
    np.testing.assert_array_equal(
        rows.sample(10_000).values, np.concatenate([values(step, 6) for step in range(len(told))])
    )


# --- Reading from there. ---


def test_what_is_there_is_read_when_it_is_needed(
    s3_only: Captured, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_only.open() as writer:
        write_step(writer, 0)
        write_step(writer, 1)
    for place in (s3_only.remote.url, s3_only.folder):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg" / type(place).__name__))
        del s3.requests[:]
        reader = ShardReader(place)
        assert reader.steps == [0, 1]
        assert not any("shard" in path for _, path in s3.requests)
        np.testing.assert_array_equal(reader.rows(0, steps=[1]).sample(9).values, values(1, 6))
        assert not any(SHARDS[0] in path for _, path in s3.requests)
        np.testing.assert_array_equal(reader.rows(0).sample(99).values[:6], values(0, 6))
        fetched = [path for method, path in s3.requests if method == "GET" and "shard" in path]
        assert len(fetched) == 2
        # Another reader finds the files.
        np.testing.assert_array_equal(ShardReader(place).rows(0).sample(99).values[:6], values(0, 6))
        assert [path for method, path in s3.requests if method == "GET" and "shard" in path] == fetched


def test_another_capture_at_the_same_place_is_not_mistaken(folder: RemoteFolder, tmp_path: Path) -> None:
    """Where the first one was removed."""
    for n in (0, 1):
        with ShardWriter(tmp_path / f"cache{n}", layers=LAYERS, remote=folder) as writer:
            writer.write({LAYER: values(n, 6)}, step=0, **columns(n, 6))
        np.testing.assert_array_equal(ShardReader(folder.url).rows(0).sample(6).values, values(n, 6))
        for name in folder.names():
            folder._client.delete_object(Bucket=BUCKET, Key=f"{folder.prefix}/{name}")


def test_the_folders_of_ranks_are_read_from_there(folder: RemoteFolder, tmp_path: Path) -> None:
    for rank in (0, 1):
        with ShardWriter(
            tmp_path / "cache", layers=LAYERS, remote=folder, rank=rank, world_size=2, each_rank=True, keep_local=False
        ) as writer:
            write_step(writer, 0, n=rank + 1)
    for place in (folder.url, tmp_path / "cache", fetch(folder.url, tmp_path / "fetched")):
        part = ShardReader(place).rows(0).sample(9)
        assert part.rank is not None
        assert part.rank.tolist() == [0, 1, 1]


def test_only_what_is_missing_is_fetched(both: Captured, s3: S3Server, tmp_path: Path) -> None:
    with both.open() as writer:
        for step in range(3):
            write_step(writer, step)
    told: list[tuple[int, int]] = []
    copy = fetch(both.remote.url, tmp_path / "copy", lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert ShardReader(copy).steps == [0, 1, 2]
    (copy / SHARDS[0]).unlink()
    (copy / SHARDS[1]).write_bytes((copy / SHARDS[1]).read_bytes()[:-1] + b"?")
    del s3.requests[:]
    fetch(both.remote.url, copy)
    assert {path.rpartition("/")[2] for method, path in s3.requests if "shard" in path} == set(SHARDS[:2])
    for name in SHARDS[:3]:
        assert (copy / name).read_bytes() == (both.folder / name).read_bytes()
    # Capturing goes on from a copy.
    with Captured(copy, both.remote, keep_local=True).open() as writer:
        write_step(writer, 3)
    assert both.there["total_shards"] == 4


def test_a_folder_of_other_captures_is_not_fetched_to(both: Captured, tmp_path: Path) -> None:
    both.open().close()
    with ShardWriter(tmp_path / "other", layers=LAYERS):
        assert "is being written by another run" in refusal(lambda: fetch(both.remote.url, tmp_path / "other"))
    assert "holds other captures" in refusal(lambda: fetch(both.remote.url, tmp_path / "other"))
    for use in (lambda: fetch(f"s3://{BUCKET}/none", tmp_path / "x"), lambda: ShardReader(f"s3://{BUCKET}/none")):
        assert refusal(use) == f"There are no captured activations in s3://{BUCKET}/none: it has no manifest.json."


def test_nothing_of_the_credentials_is_written(both: Captured) -> None:
    with both.open() as writer:
        write_step(writer, 0)
    for path in both.folder.iterdir():
        content = path.read_bytes()
        assert b"a-secret" not in content
        assert b"an-id" not in content


def test_what_a_training_captures_arrives(s3: S3Server, tmp_path: Path) -> None:
    model = make_model("llama")
    hooks = MechIntHooks(config(tmp_path, sample_layers=[1], save_hidden_every_n_steps=2, verbose=False))
    hooks.register_hooks(model)
    batch = mx.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    for step in range(3):
        hooks.on_training_step(batch=batch, global_step=step)
    hooks.on_train_end(None, model)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["manifest.json"]
    reader = ShardReader(f"s3://{BUCKET}/x")
    assert reader.steps == [0, 2]
    _, cache = HookedModel(model).run_with_cache(batch, "blocks.1.hook_resid_post")
    expected = cache.numpy("blocks.1.hook_resid_post").reshape(8, -1)
    np.testing.assert_array_equal(reader.rows(1, steps=[2]).sample(8).values, expected)
