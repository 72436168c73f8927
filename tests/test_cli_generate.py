"""``neuroscope generate``: text, a summary of the attention, and files of it."""

import json
import logging
from pathlib import Path

import networkx
import pytest

import mlx_hooks
from mlx_hooks import AttentionExtractionHook, HookedModel
from mlx_hooks.cli import main
from mlx_hooks.coverage.models import tiny_model

STORY = "When Mary and John went to the store , John gave a drink to"
GREEDY = ["--prompt", STORY, "--temperature", "0", "--max-tokens", "5"]


def test_text_comes_first_then_who_was_attended_to(tiny: HookedModel, capsys: pytest.CaptureFixture) -> None:
    hook = AttentionExtractionHook(0.2)
    tiny.generate(STORY, max_tokens=5, hooks=[hook])
    assert main(["generate", "neuroscope-tiny", *GREEDY, "--attention-threshold", "0.2"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == f"{STORY} Mary ."
    assert f"{hook.n_edges} attention weights above 0.2, in 64 records" in lines
    at = lines.index("Tokens that received the most attention (as key)")
    listed = [(line.split()[0].strip("'"), float(line.split()[1])) for line in lines[at + 1 : at + 11]]
    expected = [(token, round(total, 2)) for token, total in hook.attention_received_as_key("token").items()][:10]
    assert listed == expected
    counts = {line.split()[0]: int(line.split()[1]) for line in lines if " edges, mean " in line}
    assert counts == {name: stats["edge_count"] for name, stats in hook.layer_head_stats().items()}
    # The bar is on standard error.
    assert "3/5" in shown.err
    assert "token/s" not in shown.out


def test_without_hooks_the_text_stands_alone(capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "neuroscope-tiny", *GREEDY, "--no-hooks"]) == 0
    assert capsys.readouterr().out == f"{STORY} Mary .\n"


def test_a_prompt_beyond_the_models_context_is_told_in_one_sentence(capsys: pytest.CaptureFixture) -> None:
    records: list[logging.LogRecord] = []
    logger, handler = logging.getLogger("transformers.tokenization_utils_base"), logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    level = logger.level
    try:
        for words, told in ((10, 0), (200, 1)):
            arguments = ["--prompt", "a " * words, "--temperature", "0", "--max-tokens", "2", "--no-hooks"]
            assert main(["generate", "neuroscope-tiny", *arguments]) == 0
            shown = capsys.readouterr().err
            assert shown.count("neuroscope: the prompt has 201 tokens; the model was made for at most 128, ") == told
            assert "Token indices" not in shown
    finally:
        logger.removeHandler(handler)
    assert not records
    assert logger.level == level


def test_a_seed_repeats_the_text(tiny: HookedModel, capsys: pytest.CaptureFixture) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ["--prompt", STORY, "--temperature", "3", "--max-tokens", "12", "--top-k", "40", "--seed", seed]
        assert main(["generate", "neuroscope-tiny", *arguments, "--no-hooks"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    expected = tiny.generate(STORY, max_tokens=12, temperature=3.0, top_k=40, seed=1)
    assert texts[0].startswith(f"{STORY} {expected.text.split()[0]}")


def test_attention_is_saved_as_json_and_graphml(
    tiny: HookedModel, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hook = AttentionExtractionHook(0.1)
    tiny.generate(STORY, max_tokens=5, hooks=[hook])
    for name in ("attention.json", "attention.graphml"):
        target = tmp_path / name
        assert main(["generate", "neuroscope-tiny", *GREEDY, "--save-attention", str(target)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"Written: {target}"
    assert json.loads((tmp_path / "attention.json").read_text()) == hook.to_dict()
    graph = networkx.read_graphml(tmp_path / "attention.graphml", force_multigraph=True)
    assert graph.number_of_edges() == hook.n_edges
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attention.graphml", "attention.json"]


def test_activations_are_tracked_by_layer(capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "neuroscope-tiny", *GREEDY, "--track-activations"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("MLPs: length of what they read and add, mean over positions")
    assert [line.split()[:2] for line in lines[at + 1 :]] == [["layer", str(layer)] for layer in range(4)]
    assert all(float(number) > 0 for line in lines[at + 1 :] for number in line.split()[2:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save-attention", "a.txt"], "--save-attention writes .json or .graphml, by the file's name; got 'a.txt'"),
        (["--save-attention", "no/such/a.json"], "cannot write no/such/a.json: there is no folder"),
        (["--save-attention", "a.json", "--no-hooks"], "--no-hooks and --save-attention exclude each other"),
        (["--track-activations", "--no-hooks"], "--no-hooks and --track-activations exclude each other"),
        (["--save-attention", f"{'a' * 300}.json"], f"cannot write {'a' * 300}.json: File name too long"),
        (["--attention-threshold", "1"], "threshold is a number from 0 to below 1, got 1.0"),
        (["--temperature", "-1"], "temperature is a number from 0 up, got -1.0"),
        (["--top-k", "-1"], "top_k is a whole number from 0 up, got -1"),
        (["--max-tokens", "-1"], "max_tokens is a whole number from 0 up, got -1"),
        (["--seed", "-1"], "seed is a whole number from 0"),
    ],
)
def test_what_would_fail_later_is_said_at_once(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HookedModel, "from_pretrained", None)
    assert main(["generate", "neuroscope-tiny", "--prompt", STORY, *arguments]) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "folder/pytorch_model.bin", "folder/x.ckpt"])
def test_a_pytorch_checkpoint_says_how_to_bring_it(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    asked = path.parent if "folder" in name else path
    assert main(["generate", str(asked), "--prompt", STORY]) == 1
    shown = capsys.readouterr().err
    assert "is not a model folder" in shown
    assert "A PyTorch checkpoint is converted once, to a folder with config.json" in shown
    assert len(shown.splitlines()) == 1


def test_an_interrupt_leaves_nothing_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "attention.json"
    target.write_text("older")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for owner, name in [(AttentionExtractionHook, "on_layer_attention"), (json, "dump")]:
        monkeypatch.setattr(owner, name, interrupted)
        assert main(["generate", "neuroscope-tiny", *GREEDY, "--save-attention", str(target)]) == 130
        monkeypatch.undo()
        assert capsys.readouterr().err.splitlines()[-1] == "neuroscope: interrupted; nothing was written"
        assert target.read_text() == "older"
        assert list(tmp_path.iterdir()) == [target]


def test_a_model_without_attention_generates_all_the_same(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny: HookedModel
) -> None:
    model = HookedModel(tiny_model("mamba", vocab_size=tiny.cfg.d_vocab), tiny.tokenizer)
    monkeypatch.setattr(mlx_hooks.HookedModel, "from_pretrained", lambda name: model)
    assert main(["generate", "mamba", "--prompt", STORY, "--max-tokens", "2", "--seed", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["generate", "mamba", "--prompt", STORY, "--save-attention", "a.json"]) == 1
    assert "mamba has no attention pattern to show" in capsys.readouterr().err


def test_help_lists_the_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = capsys.readouterr().out
    for option in ("--prompt", "--max-tokens", "--temperature", "--top-k", "--save-attention", "--attention-threshold"):
        assert option in shown
    assert "--track-activations" in shown
    assert "--no-hooks" in shown
