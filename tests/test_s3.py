"""Captures in S3: against a real HTTP service."""

import base64
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import BUCKET, S3Server, s3_server

from mlx_hooks import HookError
from mlx_hooks.storage import remote
from mlx_hooks.storage.remote import Backlog, RemoteFolder, cache_folder


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
