"""``neuroscope circuits``."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import networkx
import pytest

from mlx_hooks.analysis.circuits import finding, known_table
from mlx_hooks.analysis.circuits.circuit import Circuit
from mlx_hooks.cli import circuits as cli
from mlx_hooks.cli import main

NAMES = (("Mary", "John"), ("Tom", "Anna"), ("Emma", "Lucy"), ("Paul", "James"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    text = "When {} and {} went to the store , {} gave a drink to"
    listed = [
        {"clean": text.format(a, b, b), "corrupted": text.format(a, b, a), "answer": a, "wrong": b} for a, b in NAMES
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(listed))
    return tmp_path / "prompts.json"


def test_a_circuit_is_found_shown_and_written(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    written = {name: tmp_path / f"circuit.{end}" for name, end in
               [("save", "json"), ("graphml", "graphml"), ("neuronpedia", "np.json"), ("picture", "dot")]}  # fmt: skip
    files = [part for name, path in written.items() for part in (f"--{name}", str(path))]
    assert main(["circuits", "neuroscope-tiny", str(prompts), "--judge", str(prompts), *files]) == 0
    shown = capsys.readouterr().out
    circuit = Circuit.load(written["save"])
    assert shown.startswith(f"{len(circuit)} of 479 edges, {len(circuit.nodes)} nodes: embed, ")
    assert 0.9 <= float(shown.split("faithfulness  ")[1].split()[0]) <= 1.1
    assert "The strongest edges, by eap-ig" in shown
    assert "Written: " + str(written["save"]) in shown
    assert len(circuit) < 479 / 3
    assert networkx.read_graphml(written["graphml"], force_multigraph=True).number_of_edges() == len(circuit)
    assert json.loads(written["neuronpedia"].read_text())["metadata"]["prompt_tokens"][2] == "Mary"
    assert json.loads(written["neuronpedia"].read_text())["metadata"]["slug"] == written["neuronpedia"].stem
    assert written["picture"].read_text().startswith("digraph")


def test_the_strongest_edges_as_json(prompts: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["circuits", "neuroscope-tiny", str(prompts), "--method", "eap", "--edges", "30", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < len(found["circuit"]["edges"]) <= 30
    assert found["circuit"]["metadata"]["method"] == "eap"
    assert set(found["validation"]["faithfulness"]) == {"mean", "low", "high", "n"}


def test_metric_ablation_all_prompts_and_those_that_judge_are_as_asked(
    prompts: Path, capsys: pytest.CaptureFixture
) -> None:
    many, few = prompts.with_name("many.json"), prompts.with_name("few.json")
    listed = json.loads(prompts.read_text())
    many.write_text(json.dumps(listed * 17))
    few.write_text(json.dumps(listed[:3]))
    options = ["--metric", "probability", "--ablation", "mean", "--edges", "60", "--json"]
    assert main(["circuits", "neuroscope-tiny", str(few), "--judge", str(many), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    about = found["circuit"]["metadata"]
    assert (about["metric"], about["ablation"]) == ("probability", "mean")
    assert found["validation"]["faithfulness"]["n"] == 68
    assert (found["validation"]["metric"], found["validation"]["ablation"]) == ("probability", "mean")


def test_acdc_from_the_command_line(prompts: Path, capsys: pytest.CaptureFixture) -> None:
    one = prompts.with_name("one.json")
    one.write_text(json.dumps(json.loads(prompts.read_text())[:1]))
    options = ["--method", "acdc", "--threshold", "1"]
    assert main(["circuits", "neuroscope-tiny", str(one), *options]) == 0
    assert "The strongest edges, by acdc" in capsys.readouterr().out


def test_steps_are_as_asked(prompts: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["circuits", "neuroscope-tiny", str(prompts), "--steps", "2", "--edges", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["circuit"]["metadata"]["settings"]["steps"] == 2


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda listed: [each["clean"] for each in listed], [], "A logit difference needs wrong answers"),
        (lambda listed: listed[:1], ["--ablation", "mean"], "The mean by position of example 0"),
        (lambda listed: [listed[0] | {"answer": "Mary John"}], [], "answer of example 0"),
        (lambda listed: [listed[0] | {"corrupted": "When"}], [], "clean and corrupted have as many tokens"),
    ],
)
def test_prompts_that_cannot_judge_are_told_before_the_search(
    change: Callable[[list], list],
    options: list[str],
    message: str,
    prompts: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finding, "find_circuit", lambda *_, **__: pytest.fail("it searched"))
    judge = prompts.with_name("judge.json")
    judge.write_text(json.dumps(change(json.loads(prompts.read_text()))))
    assert main(["circuits", "neuroscope-tiny", str(prompts), "--judge", str(judge), *options]) == 1
    assert f"{judge}: {message}" in capsys.readouterr().err


def test_known_circuits_are_written_as_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = known_table.survey("frac_prevs", methods=("eap-ig", "acdc"))
    monkeypatch.setattr(known_table, "surveys", lambda: iter([found]))
    assert main(["circuits", "--known", "--write", str(tmp_path / "circuits.md")]) == 0
    assert capsys.readouterr().out == "frac_prevs, corrupted: eap-ig 1.000, acdc 1.000\n"
    assert (tmp_path / "circuits.md").read_text() == known_table.document([found])
    (tmp_path / "circuits.md").write_text(f"# A guide\n\n{known_table.HEADING}\n\nOld figures.\n")
    assert main(["circuits", "--known", "--write", str(tmp_path / "circuits.md")]) == 0
    assert (tmp_path / "circuits.md").read_text() == f"# A guide\n\n{known_table.document([found])}"
    (tmp_path / "circuits.md").write_bytes(b"# A guide\r\n\r\nIts own.\r\n")
    assert main(["circuits", "--known", "--write", str(tmp_path / "circuits.md")]) == 0
    written = (tmp_path / "circuits.md").read_bytes().decode()
    assert written == f"# A guide\r\n\r\nIts own.\r\n\n{known_table.document([found])}"
    capsys.readouterr()
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(cli, "_shown", lambda what: nullcontext(lambda *progress: told.append(progress)))
    assert main(["circuits", "--known"]) == 0
    assert capsys.readouterr().out == known_table.document([found])
    assert told == [(1, len(known_table.planned()))]


def test_what_is_edited_while_known_circuits_are_measured_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, page = known_table.survey("frac_prevs", methods=("eap-ig", "acdc")), tmp_path / "circuits.md"

    def measured_while_edited() -> Iterator[known_table.KnownSurvey]:
        page.write_text("Edited.\n")
        yield found

    page.write_text("Old.\n")
    monkeypatch.setattr(known_table, "surveys", measured_while_edited)
    assert main(["circuits", "--known", "--write", str(page)]) == 0
    assert page.read_text() == f"Edited.\n\n{known_table.document([found])}"


def test_a_page_that_cannot_be_read_is_told_before_known_circuits_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_table, "surveys", lambda: pytest.fail("it measured"))
    page = tmp_path / "latin.md"
    page.write_bytes(b"caf\xe9")
    assert main(["circuits", "--known", "--write", str(page)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"neuroscope: {page} is no page in UTF-8 that can be read: ")
    assert shown.count("\n") == 1
    assert page.read_bytes() == b"caf\xe9"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a model and a file of prompts, or --known"),
        (["neuroscope-tiny"], "Give a model and a file of prompts"),
        (["neuroscope-tiny", "{}/none.json"], "There is no file {}/none.json."),
        (["neuroscope-tiny", "{}/broken.json"], "{}/broken.json is no list of prompts that can be read"),
        (["neuroscope-tiny", "{}/empty.json"], "{}/empty.json is no list of prompts"),
        (["neuroscope-tiny", "{}/texts.json", "--neuronpedia", "{}/x.json"], "--neuronpedia draws the first prompt's"),
        (["neuroscope-tiny", "{}/texts.json", "--picture", "{}/x.svg"], "A circuit is drawn to .png or .dot"),
        (["neuroscope-tiny", "{}/texts.json", "--save", "{}/texts.json"], "which is read here"),
        (["neuroscope-tiny", "{}/texts.json", "--method", "acdc"], "acdc cuts by threshold"),
        (["neuroscope-tiny", "{}/texts.json", "--method", "eap", "--steps", "5"], "--steps is of eap-ig"),
        (["neuroscope-tiny", "{}/texts.json", "--write", "{}/x.md"], "--write is where --known writes its table"),
        (["neuroscope-tiny", "{}/same.json"], "{}/same.json: clean and corrupted of example 0 are the same"),
        (["neuroscope-tiny", "{}/texts.json", "--edges", "0"], "--edges is a whole number from 1 on, got 0."),
        (["--known", "neuroscope-tiny"], "--known measures models and prompts of its own in one way: leave out model."),
        (["--known", "--steps", "5"], "leave out --steps."),
        (["--known", "--method", "eap"], "leave out --method."),
        (["--known", "--metric", "loss"], "leave out --metric."),
        (["--known", "--ablation", "zero"], "leave out --ablation."),
        (["--known", "--edges", "0"], "leave out --edges."),
        (["--known", "--threshold", "0"], "leave out --threshold."),
        (["--known", "--faithfulness", "0.9"], "leave out --faithfulness."),
        (["--known", "--judge", "{}/texts.json"], "leave out --judge."),
        (["--known", "--picture", "{}/x.png"], "leave out --picture."),
        (["--known", "--json"], "leave out --json."),
        (["--known", "--write", "{}/no/x.md"], "cannot write {}/no/x.md"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "texts.json").write_text('["The capital of France is Paris ."]')
    (tmp_path / "same.json").write_text('[{"clean": "The", "corrupted": "The", "answer": "a", "wrong": "dog"}]')
    assert main(["circuits", *(part.replace("{}", str(tmp_path)) for part in arguments)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("neuroscope: ")
    assert message.replace("{}", str(tmp_path)) in shown
    assert shown.count("\n") == 1
