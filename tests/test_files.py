"""Files and folders are there whole or not at all, whatever ends their writer."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_hooks import HookError
from mlx_hooks.storage.files import (
    HeldFolder,
    clear_left,
    is_temporary,
    locked,
    reading,
    remove_folder,
    try_file,
    whole_file,
    whole_folder,
    write_whole,
    writing,
)

ROOT = Path(__file__).parent.parent
LONG_AGO = time.time() - 24 * 3600


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "first, é")
    with whole_file(path) as draft:
        draft.write_text("second")
        assert path.read_text(encoding="utf-8") == "first, é"
        assert draft.suffix == ".json"
        assert [is_temporary(name) for name in names(tmp_path)] == [True, False]
    assert path.read_text() == "second"
    write_whole(path, b"third", durable=False)
    assert path.read_bytes() == b"third"
    assert names(tmp_path) == ["a.json"]


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(TypeError), whole_file(path) as draft:
        draft.write_bytes("half")  # type: ignore[arg-type]
    assert (names(tmp_path), path.read_text()) == (["a.json"], "old")


def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link, Path(os.devnull)):
        with pytest.raises(FileExistsError, match="it is a device or a pipe; name a file"):
            try_file(path)
        with pytest.raises(HookError, match=f"cannot write {path}: it is a device or a pipe"), writing(path):
            write_whole(path, "new")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    assert names(tmp_path) == ["link", "pipe"]


def test_what_a_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    link, file = tmp_path / "link.json", tmp_path / "other" / "file.json"
    link.symlink_to(file)
    for content in ("first", "second"):
        write_whole(link, content)
        assert (link.is_symlink(), file.read_text()) == (True, content)
    assert names(tmp_path / "other") == ["file.json"]


def test_a_folder_appears_with_all_that_is_in_it(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "run") as draft:
        (draft / "a").write_text("1")
        assert is_temporary(draft.name)
        assert not (tmp_path / "run").exists()
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["a"]
    with pytest.raises(TypeError), whole_folder(tmp_path / "other") as draft:
        (draft / "a").write_bytes("1")  # type: ignore[arg-type]
    assert names(tmp_path) == ["run"]


def test_a_folder_takes_nobodys_place(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("kept")
    with pytest.raises(OSError, match="not empty|exists"), whole_folder(tmp_path / "run") as draft:
        (draft / "a").write_text("1")
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["mine"]


def test_what_is_removed_is_gone_at_once(tmp_path: Path) -> None:
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "deep" / "a").write_text("1")
    remove_folder(tmp_path / "run")
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        remove_folder(tmp_path / "run")


def test_a_folder_is_removed_under_the_lock(tmp_path: Path) -> None:
    (tmp_path / "of" / "run").mkdir(parents=True)
    with locked(tmp_path):
        thread = threading.Thread(target=remove_folder, args=(tmp_path / "of" / "run",), kwargs={"drafts": tmp_path})
        thread.start()
        thread.join(0.3)
        # Who makes a folder in the emptied one holds the lock too.
        assert thread.is_alive()
        assert (tmp_path / "of" / "run").exists()
    thread.join(20)
    assert names(tmp_path) == []


WRITER = """
import sys, time
from pathlib import Path
from mlx_hooks.storage.files import whole_folder
with whole_folder(Path(sys.argv[1])) as draft:
    (draft / "a").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_is_cleared_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"writing\n"
            (left,) = tmp_path.iterdir()
            assert is_temporary(left.name)
            os.utime(left, (LONG_AGO, LONG_AGO))
            clear_left(tmp_path)
            assert left.exists()
        finally:
            writer.send_signal(signal.SIGKILL)
    assert not (tmp_path / "run").exists()
    (tmp_path / ".mine").mkdir()
    os.utime(tmp_path / ".mine", (LONG_AGO, LONG_AGO))
    (tmp_path / ".new.0.writing").touch()
    (tmp_path / ".old.0.writing").touch()
    os.utime(tmp_path / ".old.0.writing", (LONG_AGO, LONG_AGO))
    clear_left(tmp_path)
    assert names(tmp_path) == [".mine", ".new.0.writing"]


def test_what_is_removed_is_gone_before_the_first_file_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    seen: list[bool] = []
    real = shutil.rmtree

    def rmtree(path: Path, **how: bool) -> None:
        seen.append(run.exists())
        real(path, **how)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    remove_folder(run)
    assert seen == [False]
    assert names(tmp_path) == []


def test_one_holds_a_folder_at_a_time(tmp_path: Path) -> None:
    held = HeldFolder(tmp_path)
    with pytest.raises(BlockingIOError):
        HeldFolder(tmp_path)
    code = (
        f"from pathlib import Path\nfrom mlx_hooks.storage.files import HeldFolder\nHeldFolder(Path({str(tmp_path)!r}))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "BlockingIOError" in other.stderr
    held.release()
    held.release()
    HeldFolder(tmp_path).release()


def test_a_folder_is_held_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr("fcntl.flock", no_locks)
    held = [HeldFolder(tmp_path), HeldFolder(tmp_path)]
    for each in held:
        each.release()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HookError("it is of tomorrow.", field="format"), "DIR/a is no lens that can be read: it is of tomorrow."),
        (FileNotFoundError(2, "No such file", "DIR/b"), "There is no file DIR/b."),
        (FileNotFoundError("gone"), "There is no file DIR/a."),
        (PermissionError(13, "Permission denied"), "DIR/a cannot be read: Permission denied."),
        (KeyError("bias"), "DIR/a is no lens that can be read: its header lacks 'bias'."),
        (ValueError("it is empty"), "DIR/a is no lens that can be read: it is empty."),
        (RecursionError("too deep."), "DIR/a is no lens that can be read: too deep."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_goes_wrong_while_reading_is_told_of_the_file(error: Exception, message: str) -> None:
    with pytest.raises(HookError) as caught, reading("DIR/a", "lens", "its header"):
        raise error
    assert str(caught.value) == message
    assert caught.value.__cause__ is error
    assert caught.value.field == getattr(error, "field", None)


def test_what_is_no_fault_of_the_file_passes() -> None:
    with pytest.raises(AssertionError), reading("a", "lens"):
        raise AssertionError
