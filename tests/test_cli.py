"""The ``neuroscope`` command."""

import json
from pathlib import Path

import pytest

from mlx_hooks import __version__
from mlx_hooks.cli import main


def test_info_shows_sizes_and_hook_points(capsys: pytest.CaptureFixture) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("HookedModel(llama: 4 layers")
    assert "blocks.{i}.attn.hook_pattern" in shown


def test_smalltalk_writes_the_client_for_a_server(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "client.st"
    assert main(["smalltalk", "-o", str(target), "--url", "http://127.0.0.1:9123"]) == 0
    assert "^ 'http://127.0.0.1:9123'" in target.read_text()
    assert capsys.readouterr().out.strip() == str(target)
    assert list(tmp_path.iterdir()) == [target]


def test_an_older_file_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "client.st"
    target.write_text("older")

    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["smalltalk", "-o", str(target)]) == 1
    assert target.read_text() == "older"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "/no/such/model"], "There is no model at '/no/such/model': give the bundled 'neuroscope-tiny'"),
        (["info", "."], "is not a model folder: it has no config.json"),
        (["smalltalk", "-o", "/no/such/folder/x.st"], "cannot write /no/such/folder/x.st"),
        (["smalltalk", "-o", "."], "cannot write .: it is a folder; name a file in it"),
        (["smalltalk", "--url", "no url"], "cannot write"),
        (["info", "~nobody-of-that-name/x"], "is no usable path"),
        (["info", "x" * 5000], "is no usable path"),
        (["info", "a/b"], "There is no folder 'a/b', and it could not be had as a Hugging Face id"),
        (["serve", "--host", "0.0.0.0", "--port", "0"], "give --api-key"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NEUROSCOPE_API_KEY", raising=False)
    assert main(arguments) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


def test_help_and_version(capsys: pytest.CaptureFixture) -> None:
    for arguments, words in [(["--version"], __version__), (["--help"], "serve"), (["serve", "--help"], "--api-key")]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["sing"], ["smalltalk", "--port", "1"]])
def test_an_unknown_command_or_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: neuroscope" in capsys.readouterr().err


def test_the_selftest_prints_its_report_and_answers_whether_it_passed(capsys: pytest.CaptureFixture) -> None:
    assert main(["selftest", "neuroscope-tiny"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("llama: passed")
    assert "ok     z = pattern @ v: off by" in shown
    assert main(["selftest", "neuroscope-tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["untrusted"] == []
    assert main(["selftest", "no/such/folder"]) == 1
    assert "There is no" in capsys.readouterr().err


def test_coverage_shows_or_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["coverage", "llama", "gpt2"]) == 0
    shown = capsys.readouterr().out
    assert "| `gpt2` |" in shown
    target = tmp_path / "architectures.md"
    assert main(["coverage", "llama", "gpt2", "-o", str(target)]) == 0
    assert capsys.readouterr().out.splitlines() == ["llama: ok", "gpt2: ok"]
    assert target.read_text() == shown
    assert main(["coverage", "gpt9"]) == 1
    assert "mlx-lm has no architecture 'gpt9'" in capsys.readouterr().err
