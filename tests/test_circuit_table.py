"""The table of known circuits: methods find them, controls fail, and docs/circuits.md says what is measured."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from mlx_hooks import HookError
from mlx_hooks.analysis.circuits import known_table
from mlx_hooks.analysis.circuits.edge_attribution import EdgeScores, attribute_edges
from mlx_hooks.analysis.circuits.edge_runs import EdgeAblation, EdgeRuns
from mlx_hooks.analysis.circuits.evaluation import Chance, edge_auc, permuted_answers
from mlx_hooks.analysis.circuits.known_table import (
    COMPLETE_WITH,
    HEADING,
    INCOMPLETE,
    KnownSurvey,
    MethodRow,
    OfKind,
    document,
    placed,
    survey,
    surveys,
)
from mlx_hooks.analysis.circuits.pruning import acdc
from mlx_hooks.analysis.eval_data import EvalData
from mlx_hooks.analysis.known_models import KNOWN_MODELS, KnownIndirectObject
from mlx_hooks.analysis.known_models.indirect_object import GIVER

DOCUMENT = Path(__file__).parent.parent / "docs" / "circuits.md"
TRACR_STYLE = ("frac_prevs", "reverse", "histogram")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
LOOSE = {
    "seconds": np.inf,
    "of the whole change": 0.02,
    "of random circuits": 0.02,
    "of the true circuit, answers permuted": 0.02,
    # Edges without effect are in the order of how float32 is rounded.
    "of EAP-IG, random edges called true": 0.15,
    "of EAP-IG, answers permuted": 0.02,
}
"""How far apart numbers may be, by column; all others are the same anywhere."""
LOOSE_ROW = "| `reverse` | **corrupted** | eap |"
LOOSE_IN_ROW = {"least AUC by kind": 0.01, "least faithfulness by kind": 1.0}
"""Of 'length' a true edge has next to no gradient: where plain EAP puts it is a matter of rounding."""


@pytest.fixture(scope="module")
def surveyed() -> list[KnownSurvey]:
    """All known models by all their ablations, measured as the command does."""
    return list(surveys())


@pytest.fixture(params=list(KNOWN_MODELS))
def measured(request: pytest.FixtureRequest, surveyed: list[KnownSurvey]) -> list[KnownSurvey]:
    """Of one model."""
    return [found for found in surveyed if found.name == request.param]


def test_eap_ig_and_acdc_find_the_circuit_under_the_ablation_that_is_meant(measured: list[KnownSurvey]) -> None:
    (meant,) = [found for found in measured if found.is_meant]
    auc = {row.method: row.auc for row in meant.rows}
    least = 0.9 if meant.name in TRACR_STYLE else 1.0
    assert min(auc["eap-ig"], auc["acdc"], auc["exact"]) >= least
    assert all(row.faithfulness == pytest.approx(1, abs=1e-3) for row in meant.rows if row.auc == 1)


def test_eap_ig_and_acdc_find_the_circuit_of_each_kind_of_prompts(measured: list[KnownSurvey]) -> None:
    (meant,) = [found for found in measured if found.is_meant]
    kinds = KNOWN_MODELS[meant.name]().kinds
    for row in meant.rows:
        assert tuple(each.kind for each in row.by_kind) == (kinds if len(kinds) > 1 else ())
        if row.method != "eap":
            assert all(each.auc == 1 for each in row.by_kind)
            assert all(each.faithfulness == pytest.approx(1, abs=1e-3) for each in row.by_kind)


def test_a_kind_is_judged_by_its_own_prompts_and_edges(measured: list[KnownSurvey]) -> None:
    known = KNOWN_MODELS[measured[0].name]()
    for found in measured:
        kinds = known.kinds if len(known.kinds) > 1 else ()
        (row,) = [row for row in found.rows if row.method == "eap-ig"]
        for i, kind in enumerate(kinds):
            own = known.pairs(known_table.PAIRS)[i :: len(kinds)]
            runs = EdgeRuns(known.hooked(), own, ablation=cast(EdgeAblation, found.ablation))
            auc = edge_auc(attribute_edges(runs), known.edges(found.ablation, kind), known.forced)
            assert row.by_kind[i].auc == pytest.approx(auc)


@pytest.mark.parametrize(("steps", "auc"), [(5, "0.9955"), (100, "0.9970")])
def test_against_the_subject_eap_ig_alone_ranks_a_false_edge_as_the_notes_say(steps: int, auc: str) -> None:
    known = KnownIndirectObject()
    pairs = [{**pair, "wrong": pair["clean"][GIVER]} for pair in known.pairs(8, kind="subject")]
    runs, true = EdgeRuns(known.hooked(), pairs, ablation="corrupted"), known.edges(kind="subject")
    scores = attribute_edges(runs, options={"steps": steps})
    assert "embed->L2H2<v>" not in true
    assert abs(scores["embed->L2H2<v>"]) > 10 * min(abs(scores[edge]) for edge in true)
    assert f"{edge_auc(scores, true):.4f}" == auc
    strongest = sorted(scores.edges, key=lambda edge: -abs(scores[edge]))[: len(true)]
    assert true - {*strongest} == {"embed->L2H2<k>"}
    assert [edge_auc(known_table.METHODS[name](runs), true) for name in ("eap", "exact", "acdc")] == [1, 1, 1]
    assert "ranks what the mover reads there above true edges" in known.notes
    assert f"{auc} with {steps}" in known.notes
    assert "embed->L2H2<k> is not among the strongest" in known.notes


def test_the_true_circuit_is_faithful_and_the_controls_fail(measured: list[KnownSurvey]) -> None:
    for found in measured:
        assert found.faithfulness == pytest.approx(1, abs=1e-3)
        assert abs(found.random_faithfulness) < 0.2
        assert found.random.mean == pytest.approx(0.5, abs=0.05)
        assert found.wrong_edges.mean == pytest.approx(0.5, abs=0.05)
        # Single draws keep a good deal by chance.
        assert abs(found.permuted_faithfulness.mean) < 0.2
        assert found.permuted_faithfulness.high < 0.9


def test_random_scores_and_circuits_are_as_many_as_is_told(surveyed: list[KnownSurvey]) -> None:
    for found in surveyed:
        # Of so many draws none is alone, and the ends lie apart.
        assert found.random.low < found.random.mean - 0.05 < found.random.mean + 0.05 < found.random.high
        assert found.wrong_edges.low < found.wrong_edges.mean < found.wrong_edges.high
        kept = found.permuted_faithfulness
        assert kept.low < kept.mean - 0.1 < kept.mean + 0.1 < kept.high


def test_asked_for_its_own_answers_the_circuit_keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def own(data: EvalData, seed: int) -> EvalData:
        asked.append(seed)
        return data

    monkeypatch.setattr(known_table, "permuted_answers", own)
    found = survey("frac_prevs", methods=["eap-ig"], pairs=6)
    kept = found.permuted_faithfulness
    assert [kept.low, kept.mean, kept.high] == pytest.approx([1, 1, 1], abs=1e-3)
    assert found.permuted.low == found.permuted.high == found.rows[0].auc
    assert asked == list(range(known_table.PERMUTATIONS))


@pytest.mark.parametrize(("name", "ablation"), [("frac_prevs", "zero"), ("ioi", "corrupted"), ("linear", "mean")])
def test_what_is_kept_of_other_answers_is_what_runs_of_their_own_keep(name: str, ablation: EdgeAblation) -> None:
    known = KNOWN_MODELS[name]()
    runs = EdgeRuns(known.hooked(), known.pairs(12), ablation=ablation, batch_size=5)
    outside = [edge.name for edge in runs.graph.edges if edge.name not in known.edges(ablation)]
    asked = [permuted_answers(runs.data, seed) for seed in range(3)]
    expected = []
    for data in asked:
        own = EdgeRuns(runs.model, data, ablation=ablation)
        expected.append((own.without([outside])[0] - own.ablated).mean())
    kept = known_table._kept_asked(runs, known.edges(ablation), asked)
    assert kept == pytest.approx(expected, abs=1e-4)
    assert np.ptp(kept) > 0.05


def test_searches_get_the_first_pairs_and_are_judged_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    known, given = KNOWN_MODELS["linear"](), list[int]()

    def ranked(runs: EdgeRuns) -> dict[str, float]:
        given.append(len(runs.data))
        # True edges first but for the last ones: what such a circuit keeps differs from pair to pair.
        order = [edge.name for edge in runs.graph.edges if edge.name in known.edges()]
        order = [*order[:-4], *(edge.name for edge in runs.graph.edges if edge.name not in order), *order[-4:]]
        return {name: 1 / (1 + place) for place, name in enumerate(order)}

    monkeypatch.setitem(known_table.METHODS, "acdc", ranked)
    monkeypatch.setitem(known_table.METHODS, "eap", ranked)
    found = survey("linear", methods=["eap", "eap-ig", "acdc"])
    assert given == [known_table.PAIRS, known_table.SEARCHED]
    eap, _, acdc = found.rows
    assert acdc.faithfulness == eap.faithfulness
    few = survey("linear", methods=["eap", "eap-ig"], pairs=known_table.SEARCHED)
    assert abs(few.rows[0].faithfulness - acdc.faithfulness) > 0.02


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt2", {}, "There is no known model 'gpt2': induction, ioi, "),
        (["ioi"], {}, "There is no known model ['ioi']: "),
        ("ioi", {"ablation": "mean"}, "ioi has no true edges by 'mean': it is made for corrupted, zero."),
        ("ioi", {"methods": ["eap"]}, "methods are of eap, eap-ig, acdc, exact, with eap-ig among them, got ['eap']."),
        ("ioi", {"methods": ["eap-ig", "x"]}, "with eap-ig among them, got ['eap-ig', 'x']."),
        ("ioi", {"pairs": 5}, "pairs is a whole number of 6 or more, got 5."),
        ("linear", {"pairs": 1}, "pairs is a whole number of 2 or more, got 1."),
    ],
)
def test_what_cannot_be_measured_is_told(name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=re.escape(message)):
        survey(name, **options)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_as_few_pairs_as_are_allowed_are_measured(name: str) -> None:
    found = survey(name, methods=["eap-ig"], pairs=2 * len(KNOWN_MODELS[name]().kinds))
    assert found.faithfulness == pytest.approx(1, abs=1e-3)


# Integrated gradients


def gaps(name: str, steps: int) -> tuple[np.ndarray, np.ndarray, EdgeScores]:
    """What the scores of the embedding's edges add up to less the whole change, that change, [example], the scores."""
    known = KNOWN_MODELS[name]()
    pairs = known.pairs(2 * len(known.kinds) if steps < 100 else len(known.kinds))
    runs = EdgeRuns(known.hooked(), pairs, ablation="corrupted")
    scores = attribute_edges(runs, options={"steps": steps})
    assert scores.by_example is not None
    assert runs.corrupted is not None
    of_embedding = [name.startswith("embed->") for name in scores.edges]
    change = runs.corrupted - runs.plain
    return scores.by_example[:, of_embedding].sum(axis=1) - change, change, scores


def test_every_known_model_is_complete_or_it_is_told_why_not() -> None:
    assert {*COMPLETE_WITH} | {*INCOMPLETE} == {*KNOWN_MODELS}
    assert not {*COMPLETE_WITH} & {*INCOMPLETE}


@pytest.mark.parametrize("name", COMPLETE_WITH)
def test_integrated_gradients_are_complete(name: str) -> None:
    gap, change, scores = gaps(name, COMPLETE_WITH[name])
    assert np.abs(change).min() > 0.1
    assert np.abs(gap).max() < 1e-3
    assert scores.settings["integral"] - scores.settings["whole_change"] == pytest.approx(gap.mean(), abs=1e-4)


def test_between_kinks_more_points_come_closer_and_at_jumps_they_do_not() -> None:
    kinks = [np.abs(gap / change).max() for gap, change, _ in (gaps("histogram", steps) for steps in (20, 500))]
    assert kinks[1] < kinks[0] / 10
    assert 1e-3 < kinks[1] < 0.03
    jumps = [np.abs(gap / change).max() for gap, change, _ in (gaps("planted_router", steps) for steps in (50, 500))]
    assert jumps[0] > 0.05
    assert jumps[1] == pytest.approx(jumps[0], rel=0.2)


def test_a_difference_of_means_loses_edges_that_help_one_example_and_harm_another() -> None:
    known = KNOWN_MODELS["linear"]()
    runs = EdgeRuns(known.hooked(), known.pairs(24))
    threshold = 0.01 * float(np.abs(runs.plain - runs.ablated).mean())
    kept = {distance: {*acdc(runs, threshold, {"distance": distance}).kept} for distance in ("mean", "examples")}
    assert kept["examples"] == known.edges()
    assert kept["mean"] < known.edges()
    assert (len(kept["mean"]), len(known.edges())) == (10, 19)


# The document

SECTION = f"{HEADING}\n\nNew.\n\n### Methods\n\nA table.\n"


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("", SECTION),
        ("# precious\n", f"# precious\n\n{SECTION}"),
        ("precious", f"precious\n\n{SECTION}"),
        ("precious\n\n", f"precious\n\n{SECTION}"),
        (f"# Guide\n\n{HEADING}\n\nOld.\n\n### Methods\n\nOld.\n", f"# Guide\n\n{SECTION}"),
        (f"{HEADING}\nOld.\n\n## Appendix\n\nprecious", f"{SECTION}\n## Appendix\n\nprecious"),
        (f"{HEADING}\r\nOld.\r\n# Another\r\nprecious\r\n", f"{SECTION}\n# Another\r\nprecious\r\n"),
        (f"{HEADING}\n\n```sh\n## Old.\n```\n## After\n", f"{SECTION}\n## After\n"),
        (f"~~~~\n{HEADING}\n~~~\n~~~~\n", f"~~~~\n{HEADING}\n~~~\n~~~~\n\n{SECTION}"),
        (f"{HEADING} by hand\n", f"{HEADING} by hand\n\n{SECTION}"),
        (f"Of {HEADING}\nprecious\n", f"Of {HEADING}\nprecious\n\n{SECTION}"),
    ],
    ids=[
        "nothing", "another heading", "no end of line", "a gap", "the last", "before another", "before a higher",
        "code in it", "code about it", "a longer heading", "in a line",
    ],
)  # fmt: skip
def test_the_section_takes_its_own_place_in_a_page_and_no_other(page: str, expected: str) -> None:
    assert placed(SECTION, page) == expected
    assert placed(SECTION, expected) == expected


def differences(expected: str, written: str) -> Iterator[tuple[str | None, str | None]]:
    """Lines that say another thing: other words, or numbers further apart than another machine puts them."""
    headings: list[str] = []
    for one, other in zip_longest(expected.splitlines(), written.splitlines()):
        if one is None or other is None or one.count("|") != other.count("|"):
            yield one, other
            continue
        headings = [cell.strip() for cell in one.split("|")] if one.startswith("| model |") else headings
        columns = headings if one.startswith("|") else [""]
        cells = [line.split("|") if columns is headings else [line] for line in (one, other)]
        loose = LOOSE | LOOSE_IN_ROW if one.startswith(LOOSE_ROW) else LOOSE
        if not all(is_near(loose.get(heading), *each) for heading, *each in zip(columns, *cells, strict=True)):
            yield one, other


def is_near(apart: float | None, expected: str, written: str) -> bool:
    """Whether two cells say the same, or numbers that are so far apart at most."""
    if apart is None:
        return expected == written
    ours, theirs = ([float(number) for number in NUMBER.findall(cell)] for cell in (expected, written))
    is_alike = len(ours) == len(theirs) and NUMBER.sub("", expected) == NUMBER.sub("", written)
    return is_alike and all(abs(a - b) <= apart + abs(a) / 100 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.skipif(mx.metal.is_available(), reason="the table was written on the CPU build")
def test_the_document_says_what_is_measured(surveyed: list[KnownSurvey]) -> None:
    _, heading, section = DOCUMENT.read_text().partition(f"{HEADING}\n")
    told = list(differences(document(surveyed), heading + section))
    assert not told, "docs/circuits.md is out of date: neuroscope circuits --known --write docs/circuits.md"


def test_the_guard_sees_what_is_no_longer_so(surveyed: list[KnownSurvey]) -> None:
    listed = [found for found in surveyed if found.name in ("reverse", "frac_prevs")]
    text = document(listed)
    (meant, *_) = listed
    (row, ig, *others) = meant.rows
    assert not list(differences(text, text))
    slower = [replace(meant, rows=(replace(row, seconds=row.seconds + 5), ig, *others)), *listed[1:]]
    assert not list(differences(text, document(slower)))

    def of_letters(own: MethodRow, *judged: float) -> MethodRow:
        return replace(own, by_kind=(OfKind("letters", *judged),))

    changed = [
        text.replace(KNOWN_MODELS["reverse"]().description, "Letters."),
        text.replace("keep little of what", "keep all of what"),
        document(listed[1:]),
        document([replace(meant, rows=(replace(row, auc=row.auc - 0.03), ig, *others)), *listed[1:]]),
        document([replace(meant, permuted_faithfulness=Chance(0.9, 0.9, 0.9)), *listed[1:]]),
        document([replace(meant, random=replace(meant.random, high=0.99)), *listed[1:]]),
        document([replace(meant, n_true=meant.n_true + 1), *listed[1:]]),
        document([replace(meant, rows=(of_letters(row, 0.5, 1.0), ig, *others)), *listed[1:]]),
        document([replace(meant, rows=(row, of_letters(ig, 1.0, 0.9), *others)), *listed[1:]]),
        document([replace(meant, rows=(row, of_letters(ig, 0.995, 1.0), *others)), *listed[1:]]),
    ]
    assert all(list(differences(text, each)) for each in changed)


def test_the_document_is_made_of_surveys(surveyed: list[KnownSurvey]) -> None:
    one = [found for found in surveyed if found.name == "frac_prevs" and found.is_meant]
    text = document(one)
    assert "EAP-IG and ACDC have an AUC of 1.000 at the least, on all kinds of prompts together and on each" in text
    assert f"- `frac_prevs`: {KNOWN_MODELS['frac_prevs'].description}" in text
    assert text.count("\n| `frac_prevs` | **corrupted** |") == 5
    assert "True edges that are not among the strongest" not in text
    assert "For `histogram` none are enough" not in text
    (meant,) = [found for found in surveyed if found.name == "ioi" and found.is_meant]
    wrong = [replace(row, by_kind=(OfKind("subject", 0.5, -1.0), *row.by_kind)) for row in meant.rows]
    text = document([replace(meant, rows=tuple(wrong))])
    assert "EAP-IG and ACDC have an AUC of 0.500 at the least" in text
    assert "| eap-ig | 1.000 | 1.00 | 0.500 | -1.00 |" in text
    everything = document(surveyed)
    assert "- `reverse`, zero, eap-ig: `embed->L0 mlp`" in everything
    assert "For `planted_router` none are enough: the stream itself jumps" in everything
    assert all(f"\n| `{name}` | " in everything and f"\n- `{name}`: " in everything for name in KNOWN_MODELS)
