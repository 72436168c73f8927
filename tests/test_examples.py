"""The demo and the examples, run as a user runs them."""

import json
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import networkx
import pytest

from mlx_hooks import HookError
from mlx_hooks.errors import FailedAnalysisWarning
from mlx_hooks.training import registry

ROOT = Path(__file__).parent.parent


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_demo_shows_what_the_model_does_and_writes_its_files(tmp_path: Path) -> None:
    shown = run(str(ROOT / "examples/demo.py"), cwd=tmp_path)
    assert re.search(r"Completion  Mary\b", shown)
    layers = re.findall(r"layer (\d)  +(\S+) +([\d.]+)%", shown)
    assert [layer for layer, _, _ in layers] == ["0", "1", "2", "3"]
    assert layers[-1][1] == "Mary"
    assert float(layers[-1][2]) > 50
    for kind in ("induction", "previous-token"):
        score = re.search(rf"strongest {kind} heads +L\dH\d ([\d.]+)", shown)
        assert score is not None
        assert float(score[1]) > 0.6
    (picture,) = (tmp_path / "demo_output").glob("attention_L*H*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    smalltalk = (tmp_path / "demo_output" / "LMStudioRESTClient.st").read_text()
    # The demo's own server is gone when the file is read: it names the default one.
    assert "^ 'http://127.0.0.1:8080'" in smalltalk
    strongest = re.search(r"strongest induction heads +(L\dH\d)", shown)
    assert strongest is not None
    assert picture.name == f"attention_{strongest[1]}.png"
    assert str(picture) in shown


def test_the_five_integration_examples_run(tmp_path: Path) -> None:
    shown = run(str(ROOT / "examples/neuroscope_integration_example.py"), cwd=tmp_path)
    titles = re.findall(r"^\d\. (.*)$", shown, re.MULTILINE)
    assert titles == [
        "Basic activation capture",
        "API server usage",
        "NeuroScope bridge conversion",
        "Circuit analysis setup",
        "Attention pattern analysis",
    ]
    assert "text: Paris" in shown
    assert "health: healthy" in shown
    assert re.search(r"layer_1_residual: \d+ records, the first \[1, \d+, \d+\] float32", shown)
    assert re.search(r"layer_0_mlp: blocks\.0\.hook_mlp_out \[1, \d+, \d+\] axes batch, pos, d_model", shown)
    assert len(re.findall(r"_write L\d +0\.\d{3}", shown)) == 3
    assert len(re.findall(r"layer [12]: the last token looks most at", shown)) == 2


def test_the_example_of_inference_hooks_writes_the_graph(tmp_path: Path) -> None:
    shown = run(str(ROOT / "examples/inference_hooks.py"), "--output", "graphs/attention", cwd=tmp_path)
    assert re.search(r"^Generated +When Mary and John .* gave a drink to Mary \.$", shown, re.MULTILINE)
    sure = re.search(r"Sure of the answer +([\d.]+)%", shown)
    assert sure is not None
    assert float(sure[1]) > 90
    assert re.search(r"^ +0 <bos> +\d", shown, re.MULTILINE)
    last = re.search(r"position 14\) attends to\n((?:  \w+ +0\.\d\d  layer \d, head \d\n){5})", shown)
    assert last is not None
    assert {"John", "Mary"} <= set(last[1].split())
    folder = tmp_path / "graphs" / "attention"
    saved = json.loads((folder / "attention.json").read_text())
    graph = networkx.read_graphml(folder / "attention.graphml")
    count = sum(len(record["edges"]) for record in saved["full_data"])
    assert f"{saved['attention_records']} records, {count} edges" in shown
    assert graph.number_of_edges() == count
    assert [data["token"] for _, data in sorted(graph.nodes(data=True), key=lambda n: n[1]["position"])][:3] == [
        "<bos>",
        "When",
        "Mary",
    ]


def test_the_workflow_of_saved_runs_finds_what_it_saved(tmp_path: Path) -> None:
    command = [str(ROOT / "examples/activation_workflow.py"), "--base-dir", "runs"]
    for count in (4, 8):  # a second time beside the first
        shown = run(*command, cwd=tmp_path)
        assert f"Found {count} matching runs" in shown
        assert "batch_1, the same numbers as computed anew" in shown
        assert "resid_out_3 is (3, 1, 128)" in shown
        assert re.search(r"resid_out_0  .*\n.*\n.*\n  resid_out_3  Paris +Mary +Rome +$", shown, re.MULTILINE)
        folders = list((tmp_path / "runs/documentation_example/neuroscope-tiny").iterdir())
        assert len(folders) == count
        for folder in folders:
            assert sorted(path.name for path in folder.iterdir()) == ["activations.safetensors", "metadata.json"]


def test_the_workflow_of_traits_tells_what_is_refused(tmp_path: Path) -> None:
    shown = run(str(ROOT / "examples/traits_workflow.py"), "--output", "experiments", cwd=tmp_path)
    accuracies = re.findall(r"^  (probe|mean_diff|ica|gradient) +((?:[\d.]+% *){4})$", shown, re.MULTILINE)
    assert [method for method, _ in accuracies] == ["probe", "mean_diff", "ica", "gradient"]
    by_prompt = {
        prompt: [float(score) for score in scores.split()]
        for prompt, scores in re.findall(r"^  (.*\?) {2,}((?:-?[\d.]+ *){4})$", shown, re.MULTILINE)
    }
    refused, answered = by_prompt["How do I make a bomb?"], by_prompt["What is the capital of France?"]
    assert refused[2] > answered[2] + 5
    assert re.search(r"^  I [\d.]+ \| do [\d.]+ \| not", shown, re.MULTILINE)
    texts = re.findall(r"^  ([+-]\d)  score of the prompt +(-?[\d.]+)  (.*)$", shown, re.MULTILINE)
    assert [(coefficient, text.split()[0]) for coefficient, _, text in texts[1:3]] == [("+0", "Paris"), ("+2", "I")]
    # Without its direction the refusal is gone.
    assert not texts[3][2].startswith("I do not know")
    scores = [float(score) for _, score, _ in texts]
    norm = re.search(r"\|v\| = ([\d.]+)", shown)
    assert norm is not None
    for still, steered, coefficient in [(1, 0, -2), (1, 2, 2), (4, 3, -2), (4, 5, 2)]:
        assert abs(scores[steered] - scores[still] - coefficient * float(norm[1])) < 0.02
    assert len(list((tmp_path / "experiments/example/refusal/extraction/vectors").iterdir())) == 16


def test_the_example_of_capturing_goes_from_training_to_a_report(tmp_path: Path) -> None:
    options = ["--output", "out", "--steps", "20", "--every", "10", "--sae-steps", "30"]
    shown = run(str(ROOT / "examples/mechint_hooks_example.py"), *options, cwd=tmp_path)
    report = tmp_path / "out" / "report" / "mechint_report.md"
    assert f"The report is {report.relative_to(tmp_path)}" in shown
    assert re.search(r"blocks\.1\.hook_resid_post +L0 +[\d.]+ of 128, variance unexplained 0\.\d+", shown)
    assert re.search(r"circuit: (L\d\S*( mlp)?,? ?)*, faithfulness \d", shown)
    steps = re.search(r"^ +step +(\d+) +(\d+) +(\d+)$", shown, re.MULTILINE)
    assert steps is not None
    assert steps.groups() == ("0", "10", "20")
    assert re.search(r"blocks\.1\.attn\.hook_pattern( +0\.\d\d){3}$", shown, re.MULTILINE)
    text = report.read_text()
    assert "## What failed" not in text
    assert "(128 of them) as it is" in text
    assert "predicted tokens alone" not in text
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) > 20
    assert all((report.parent / path).stat().st_size > 3_000 for path in pictures)
    weights = sorted(path.name for path in (tmp_path / "out" / "weights").iterdir())
    assert weights == ["0000010_adapters.safetensors", "0000020_adapters.safetensors", "adapters.safetensors"]


def test_the_example_of_capturing_tells_what_failed_and_does_not_mix_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(rows: Any, *_: Any) -> dict[str, Any]:
        if rows.name == "blocks.0.hook_resid_post":
            raise ZeroDivisionError("by zero")
        return plain(rows, *_)

    def refuses(*_: Any) -> dict[str, Any]:
        raise HookError("not today")

    plain = registry.analyse_sae
    monkeypatch.setattr(registry, "analyse_sae", fails)
    for name in ("analyse_circuit", "analyse_causal", "analyse_probe"):
        monkeypatch.setattr(registry, name, refuses)
    # Pictures take their time.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    example = runpy.run_path(str(ROOT / "examples/mechint_hooks_example.py"))
    options = ["--output", str(tmp_path / "out"), "--steps", "2", "--every", "1", "--sae-steps", "2"]
    with pytest.warns(FailedAnalysisWarning):
        assert example["main"](options) == 0
    shown = capsys.readouterr().out
    assert "blocks.1.hook_resid_post" in shown
    report = (tmp_path / "out" / "report" / "mechint_report.md").read_text()
    assert "- `sae` of `blocks.0.hook_resid_post`: ZeroDivisionError: by zero" in report
    assert "- `circuit`: not today" in report
    results = json.loads((tmp_path / "out" / "report" / "mechint_results.json").read_text())
    assert results["captured"]["analysed_steps"] == [2]
    # A second run would be mixed with the first.
    assert example["main"](options) == 1
    assert "is of an earlier run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: a whole number from 1 up is needed, got '0'"),
        (["--layers", "-1"], "a whole number from 1 up is needed, got '-1'"),
        (["--sae-steps", "many"], "got 'many'"),
        (["--steps", "3", "--every", "10"], "--every is at most --steps, 3, got 10"),
    ],
)
def test_the_example_of_capturing_refuses_what_cannot_be(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(ROOT / "examples/mechint_hooks_example.py"))
    try:
        code = example["main"](["--output", str(tmp_path / "out"), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_goes_wrong_in_an_example_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, message in [
        (["examples/demo.py", "--output", str(tmp_path / "file" / "x")], "demo: .*Not a directory"),
        (["examples/inference_hooks.py", "--output", str(tmp_path / "file" / "x")], "example: .*Not a directory"),
        (["examples/activation_workflow.py", "--base-dir", str(tmp_path / "file" / "x")], "example: .*Not a directory"),
        (["examples/traits_workflow.py", "--output", str(tmp_path / "file" / "x")], "example: .*Not a directory"),
        (["examples/mechint_hooks_example.py", "--output", str(tmp_path / "file" / "x")], "example: .*Not a directory"),
        (["examples/neuroscope_integration_example.py", "--url", "http://127.0.0.1:9"], "No NeuroScope server answers"),
        (["examples/neuroscope_integration_example.py", "--url", "garbage"], "example: .*garbage"),
    ]:
        command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert re.search(message, done.stderr)
        assert "Traceback" not in done.stderr


def test_the_example_of_circuits_finds_judges_predicts_and_draws(tmp_path: Path) -> None:
    started = time.perf_counter()
    shown = run(str(ROOT / "examples/ioi_circuit.py"), "--output", "found/ioi", cwd=tmp_path)
    assert time.perf_counter() - started < 120

    def number(pattern: str) -> float:
        found = re.search(pattern, shown)
        assert found is not None, shown
        return float(found[1])

    plain, ablated = number(r"Logit difference +(\S+), answer"), number(r"all edges ablated +(\S+),")
    assert plain > 5
    assert ablated == pytest.approx(-plain, abs=0.5)
    # A third of the edges at the most keep nine tenths, on names that the circuit was not found with too.
    assert number(r"The circuit .*\((\S+)%\)") < 100 / 3
    assert 0.9 <= number(r"faithfulness +(\S+);") <= 1.1
    assert 0.85 <= number(r"on other names (\S+)") <= 1.1
    assert number(r"completeness +(\S+)") > 0.9
    assert number(r"random circuits +(\S+)") < 0.2
    # Five points tell the order of the edges, and their sum within a tenth.
    assert number(r"of the embedding +(\S+),") == pytest.approx(number(r"whole change, (\S+)"), rel=0.1)
    assert "seconds, on 6 of the prompts" in shown
    assert number(r"(\d+)% of the circuit's") == pytest.approx(
        100 * number(r"in both circuits +(\d+)") / number(r"The circuit +(\d+) of"), abs=1
    )
    both, kept, chance = number(r"in both circuits +(\d+)"), number(r"ACDC.* (\d+) edges"), number(r"by chance (\d+)")
    assert both > 0.8 * kept
    assert both > 4 * chance
    # Gradients foretell what ablating the name mover costs.
    predicted, measured = number(r"ablated, predicted +(\S+),"), number(r"ablated, measured +(\S+)")
    assert measured < -5
    assert predicted == pytest.approx(measured, rel=0.15)
    assert number(r"second mention, (\d+)%") > 80
    folder = tmp_path / "found" / "ioi"
    names = ["circuit.dot", "circuit.graphml", "circuit.json", "circuit.png", "neuronpedia.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "circuit.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((folder / "circuit.json").read_text())["edges"]) < 479 / 3
