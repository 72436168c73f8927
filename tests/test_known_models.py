"""Known models do what their constructions say, and their true edges are those that matter: NumPy proves both."""

import re
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from edge_reference import EdgeReference
from known_places import Place, known_places

from mlx_hooks import HookedModel, HookError, attribution_points, direct_logit_attribution
from mlx_hooks.analysis.circuits.edge_attribution import attribute_edges
from mlx_hooks.analysis.circuits.edge_runs import EdgeAblation, EdgeRuns
from mlx_hooks.analysis.eval_data import eval_data_of
from mlx_hooks.analysis.known_models import (
    KNOWN_MODELS,
    KnownFraction,
    KnownHistogram,
    KnownIndirectObject,
    KnownInduction,
    KnownLinear,
    KnownModel,
    KnownModularAddition,
    KnownReverse,
    KnownRouter,
    fourier_energy,
)
from mlx_hooks.analysis.known_models.indirect_object import BACK, CLAUSE, GIVER, LENGTH, SAY, TO
from mlx_hooks.analysis.known_models.planted_router import SHIFTS
from mlx_hooks.analysis.known_models.programs import Program
from mlx_hooks.selftest import selftest

HAND_BUILT = ("induction", "ioi")
CHANGES = "an edit that changes a value changes the logits"
PROGRAMS = ("frac_prevs", "reverse", "histogram")


def kinds_of(ablation: str, known: KnownModel) -> tuple[str | None, ...]:
    """Which prompts tell different edges: zeros and means know nothing of the corrupted ones."""
    return known.kinds if ablation == "corrupted" else (None,)


BY_KIND = [
    (name, ablation, kind)
    for name, made in KNOWN_MODELS.items()
    for ablation in made().true_edges
    for kind in kinds_of(ablation, made())
]


@pytest.fixture(scope="module", params=KNOWN_MODELS)
def known(request: pytest.FixtureRequest) -> KnownModel:
    return KNOWN_MODELS[request.param]()


def logits_of(model: HookedModel, tokens: list[int]) -> np.ndarray:
    """[pos, d_vocab]"""
    return np.array(model([tokens]))[0].astype(np.float64)


def test_every_known_model_is_built_at_once_and_trusted(known: KnownModel) -> None:
    # Processor time, the best of three: on a machine with other work a clock tells of that work.
    times = []
    for _ in range(3):
        start = time.process_time()
        model = known.hooked()
        times.append(time.process_time() - start)
    assert min(times) < 1
    assert not model.untrusted
    report = selftest(model)
    # What nothing reads cannot change the logits, and a model whose parts are known has such parts.
    failed = [check for check in report.checks if not check.passed and check.name != CHANGES]
    assert not failed, str(report)
    assert known.name in KNOWN_MODELS
    assert known.description.endswith(".")
    assert model.model(mx.array([[0]])).dtype == mx.float32


def test_pairs_are_eval_data_that_the_model_gets_right(known: KnownModel) -> None:
    model = known.hooked()
    for kind in known.kinds:
        pairs = known.pairs(4, seed=1, kind=kind)
        assert pairs == known.pairs(4, seed=1, kind=kind)
        assert pairs != known.pairs(4, seed=2, kind=kind)
        assert len(eval_data_of(model, pairs)) == 4
        for pair in pairs:
            clean, corrupted = (logits_of(model, pair[which])[-1] for which in ("clean", "corrupted"))
            assert clean.argmax() == pair["answer"]
            difference = [row[pair["answer"]] - row[pair["wrong"]] for row in (clean, corrupted)]
            assert difference[0] > difference[1] + 1e-2


@pytest.mark.parametrize(("name", "ablation", "kind"), BY_KIND)
def test_an_edge_is_true_when_replacing_it_alone_changes_the_answer(
    name: str, ablation: EdgeAblation, kind: str | None
) -> None:
    known = KNOWN_MODELS[name]()
    pairs = known.pairs(3, seed=3, kind=kind)
    runs = EdgeRuns(known.hooked(), pairs, ablation=ablation)
    edges = [edge.name for edge in runs.graph.edges]
    changes = runs.without([[edge] for edge in edges]) - runs.plain
    effects = dict(zip(edges, changes, strict=True))
    true = known.edges(ablation, kind)
    assert true <= set(edges)
    assert known.forced <= set(edges)
    for edge, values in effects.items():
        assert np.abs(values).max() > 1e-2 if edge in true else np.abs(values).max() < 1e-4, edge
    # The engine's runs agree with formulas that know nothing of it.
    expected = EdgeReference.of(known.module()).effects(pairs, ablation)
    assert set(expected) == set(edges)
    for edge in edges:
        np.testing.assert_allclose(effects[edge], expected[edge], rtol=2e-5, atol=2e-4, err_msg=edge)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_the_reference_computes_what_the_model_computes(name: str) -> None:
    known = KNOWN_MODELS[name]()
    model, reference = known.hooked(), EdgeReference.of(known.module())
    for pair in known.pairs(3, seed=4):
        expected, _ = reference.run(pair["clean"])
        np.testing.assert_allclose(logits_of(model, pair["clean"]), expected, rtol=1e-6, atol=4e-5)


def test_what_is_not_there_is_refused() -> None:
    known = KnownInduction()
    with pytest.raises(HookError, match="induction has no true edges by 'zero': it is made for corrupted."):
        known.edges("zero")
    with pytest.raises(HookError, match="induction has no prompts of kind 'giver': match, question, value."):
        known.pairs(2, kind="giver")
    with pytest.raises(HookError, match="no prompts of kind"):
        KnownIndirectObject().edges(kind="match")
    with pytest.raises(HookError, match=re.escape("induction has no true edges by [1]: it is made for corrupted.")):
        known.edges([1])  # type: ignore[arg-type]
    with pytest.raises(HookError, match="linear has no true edges by 'noise'"):
        KnownLinear().edge_effects(KnownLinear().pairs(1), "noise")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is a whole number of 1 or more, got 0."),
        ({"n": -1}, "n is a whole number of 1 or more, got -1."),
        ({"n": 1.5}, "n is a whole number of 1 or more, got 1.5."),
        ({"n": True}, "n is a whole number of 1 or more, got True."),
        ({"n": 1, "seed": -1}, "seed is a whole number of 0 or more, got -1."),
        ({"n": 1, "seed": None}, "seed is a whole number of 0 or more, got None."),
    ],
)
def test_numbers_and_seeds_of_pairs_are_checked(options: dict[str, Any], message: str, known: KnownModel) -> None:
    with pytest.raises(HookError, match=re.escape(message)):
        known.pairs(**options)


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (KnownInduction, {"vocabulary": 5}, "vocabulary is a whole number of 6 or more, got 5."),
        (KnownInduction, {"length": 19}, "length is a whole number of 20 or more, got 19."),
        (KnownInduction, {"previous_head": 7}, "previous_head is a whole number from 0 to 1, got 7."),
        (KnownInduction, {"n_heads": 0}, "n_heads is a whole number of 1 or more, got 0."),
        (KnownIndirectObject, {"n_heads": 0}, "n_heads is a whole number of 1 or more, got 0."),
        (KnownIndirectObject, {"mover_head": 9}, "mover_head is a whole number from 0 to 2, got 9."),
        (KnownIndirectObject, {"duplicate_head": -1}, "duplicate_head is a whole number from 0 to 2, got -1."),
        (KnownIndirectObject, {"n_names": 2}, "n_names is a whole number of 3 or more, got 2."),
        (KnownIndirectObject, {"n_words": 0}, "n_words is a whole number of 1 or more, got 0."),
        (KnownFraction, {"n_letters": 1}, "n_letters is a whole number of 2 or more, got 1."),
        (KnownFraction, {"mean_head": 4}, "mean_head is a whole number from 0 to 3, got 4."),
        (KnownReverse, {"n_letters": 9}, "n_letters is a whole number of 10 or more, got 9."),
        (KnownReverse, {"looking_head": "3"}, "looking_head is a whole number from 0 to 3, got '3'."),
        (KnownHistogram, {"n_letters": 1}, "n_letters is a whole number of 2 or more, got 1."),
        (KnownHistogram, {"same_head": 4}, "same_head is a whole number from 0 to 3, got 4."),
        (KnownLinear, {"n_layers": 0}, "n_layers is a whole number of 1 or more, got 0."),
        (KnownLinear, {"vocabulary": 1}, "vocabulary is a whole number of 2 or more, got 1."),
        (KnownLinear, {"n_heads": 1.0}, "n_heads is a whole number of 1 or more, got 1.0."),
        (KnownLinear, {"density": 1.5}, "density is a number from 0 to 1, got 1.5."),
        (KnownLinear, {"density": "all"}, "density is a number from 0 to 1, got 'all'."),
        (KnownLinear, {"seed": -1}, "seed is a whole number of 0 or more, got -1."),
        (KnownRouter, {"vocabulary": 9}, "vocabulary is a whole number of 10 or more, got 9."),
    ],
)
def test_options_that_make_no_model_are_refused(made: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=re.escape(message)):
        made(**options)


SMALLEST = [
    KnownInduction(6, 20, 1, 0, 0),
    KnownIndirectObject(3, 1, 1, 0, 0, 0),
    KnownFraction(2, 2, 0),
    KnownReverse(10, 1, 0, 0),
    KnownHistogram(2, 2, 0),
    KnownLinear(2, 1, 1, density=1.0),
    KnownModularAddition(3, (1,), 2),
    KnownRouter(10),
]


@pytest.mark.parametrize("known", SMALLEST, ids=lambda known: known.name)
def test_the_smallest_models_that_are_allowed_are_right(known: KnownModel) -> None:
    model = known.hooked()
    for kind in known.kinds:
        pairs = known.pairs(6, seed=2, kind=kind)
        for pair in pairs:
            clean, corrupted = (logits_of(model, pair[which])[-1] for which in ("clean", "corrupted"))
            assert clean.argmax() == pair["answer"]
            difference = [row[pair["answer"]] - row[pair["wrong"]] for row in (clean, corrupted)]
            assert difference[0] > difference[1] + 1e-2
        runs = EdgeRuns(model, pairs)
        edges = [edge.name for edge in runs.graph.edges]
        changes = np.abs(runs.without([[edge] for edge in edges]) - runs.plain).max(axis=-1)
        assert {edge for edge, change in zip(edges, changes, strict=True) if change > 1e-3} == known.edges(kind=kind)


# Patching


def effects_of_places(model: HookedModel, pair: dict[str, Any], direction: str) -> Iterator[tuple[Place, float]]:
    """What a run with one place put in recovers of the logit difference, or damages; a run for each place."""

    def difference(interventions: list[dict[str, Any]], tokens: list[int]) -> float:
        logits, _ = model.run_with_cache([tokens], (), interventions=interventions)
        row = np.array(logits)[0, -1].astype(np.float64)
        return float(row[pair["answer"]] - row[pair["wrong"]])

    clean, corrupted = difference([], pair["clean"]), difference([], pair["corrupted"])
    own, other = ("corrupted", "clean") if direction == "denoising" else ("clean", "corrupted")
    before = corrupted if direction == "denoising" else clean
    _, cache = model.run_with_cache([pair[other]])
    n_layers, n_heads, n = model.cfg.n_layers, model.cfg.n_heads, len(pair["clean"])
    points = [(("stream", layer), f"blocks.{layer}.hook_resid_pre") for layer in range(n_layers)]
    points.append((("stream", n_layers), f"blocks.{n_layers - 1}.hook_resid_post"))
    points += [(("mlp", layer), f"blocks.{layer}.hook_mlp_out") for layer in range(n_layers)]
    places: list[tuple[Place, dict[str, Any]]] = []
    for position in range(n):
        at = {"type": "patch", "source": cache, "positions": [position]}
        for where, name in points:
            # Indirect objects have attention alone.
            if name in model.hook_points:
                places.append(((*where, position), at | {"hook_point": name}))
        for layer in range(n_layers):
            point = {"hook_point": f"blocks.{layer}.attn.hook_z"}
            places += [(("head", layer, head, position), at | point | {"heads": [head]}) for head in range(n_heads)]
    for place, intervention in places:
        change = difference([intervention], pair[own]) - before
        yield place, change / (clean - corrupted) * (1 if direction == "denoising" else -1)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, made in KNOWN_MODELS.items() for kind in made().kinds]
)
def test_patching_finds_what_was_built_at_its_places_and_nothing_elsewhere(
    name: str, kind: str, direction: str
) -> None:
    known = KNOWN_MODELS[name]()
    (pair,) = known.pairs(1, seed=5, kind=kind)
    expected = known_places(known, kind, pair, direction)
    found = dict(effects_of_places(known.hooked(), pair, direction))
    assert set(expected) <= set(found)
    told = {place: expected.get(place, 0.0) for place in found}
    assert {place: found[place] for place in found if not np.isnan(told[place])} == pytest.approx(
        {place: value for place, value in told.items() if not np.isnan(value)}, abs=1e-4
    )


@pytest.mark.parametrize("name", HAND_BUILT)
def test_direct_logit_attribution_sums_to_the_logit_difference(name: str) -> None:
    known = KNOWN_MODELS[name]()
    model = known.hooked()
    says = f"L1H{KnownInduction().induction_head}" if name == "induction" else f"L2H{KnownIndirectObject().mover_head}"
    for pair in known.pairs(3, seed=6):
        _, cache = model.run_with_cache([pair["clean"]], attribution_points(model))
        found = direct_logit_attribution(cache, (pair["answer"], pair["wrong"]), model=model, positions=-1)
        row = logits_of(model, pair["clean"])[-1]
        difference = row[pair["answer"]] - row[pair["wrong"]]
        parts = {part.name: float(part.values[0, 0]) for part in found.contributions}
        assert sum(parts.values()) == pytest.approx(difference, abs=1e-5)
        assert parts.pop(says) == pytest.approx(difference, abs=1e-5)
        assert max(map(abs, parts.values())) < 1e-5


# Indirect objects


@pytest.mark.parametrize(
    "known",
    [KnownIndirectObject(), KnownIndirectObject(5, 3, 2, duplicate_head=0, inhibition_head=1, mover_head=1)],
    ids=["usual", "small"],
)
def test_indirect_objects_are_the_closed_form(known: KnownIndirectObject) -> None:
    model = known.hooked()
    rng = np.random.default_rng(7)
    prompts = [pair[which] for pair in known.pairs(6, seed=7) for which in ("clean", "corrupted")]
    prompts += [[0, *rng.integers(1, known.words.stop, 19).tolist()] for _ in range(3)]
    heads = zip(("duplicate", "inhibition", "mover"), known.circuit_heads, strict=True)
    points = {name: (f"blocks.{layer}.attn.hook_pattern", head) for name, (layer, head) in heads}
    for prompt in prompts:
        expected = known.closed_form(prompt)
        logits, cache = model.run_with_cache([prompt])
        np.testing.assert_allclose(np.array(logits)[0], expected["logits"], atol=2e-5)
        for name, (point, head) in points.items():
            np.testing.assert_allclose(cache.numpy(point)[0, head], expected[name], atol=2e-6)


def test_the_three_heads_look_where_the_story_says() -> None:
    known = KnownIndirectObject()
    for pair in known.pairs(5, seed=8, kind="giver"):
        prompt, last = pair["clean"], LENGTH - 1
        assert prompt[last] == TO
        form = known.closed_form(prompt)
        subject, other = prompt.index(pair["wrong"]), prompt.index(pair["answer"])
        assert {subject, other} <= set(CLAUSE)
        assert form["duplicate"][GIVER, subject] > 0.99999
        assert form["inhibition"][last, last - BACK] > 0.99999
        assert form["mover"][last, other] > 0.99999
        assert form["logits"][last, pair["answer"]] == pytest.approx(SAY, rel=1e-5)
        # Without a repeated name the mover shares itself between the two.
        other_form = known.closed_form(pair["corrupted"])
        np.testing.assert_allclose(other_form["mover"][last, [subject, other]], 0.5, atol=1e-5)


# Programs


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_computed_at_every_position(name: str) -> None:
    known = KNOWN_MODELS[name]()
    assert isinstance(known, Program)
    model, rng = known.hooked(), np.random.default_rng(9)
    prompts = [known.prompt(rng) for _ in range(200)]
    said = np.array(model(prompts)).argmax(axis=-1)
    expected = [known.program(prompt) for prompt in prompts]
    asked = [(i, at) for i, row in enumerate(expected) for at, token in enumerate(row) if token is not None]
    assert len({expected[i][at] for i, at in asked}) > 6
    wrong = [(prompts[i], at) for i, at in asked if said[i, at] != expected[i][at]]
    assert not wrong


def test_programs_are_what_their_names_say() -> None:
    fractions, reverse, histogram = (KNOWN_MODELS[name]() for name in PROGRAMS)
    values = [float(fraction) for fraction in fractions.fractions]
    said = [values[token - fractions.n_letters] for token in fractions.program([0, 1, 0, 0])]
    np.testing.assert_allclose(said, [1, 1 / 2, 2 / 3, 3 / 4])
    assert reverse.program([0, 5, 6, 7, 1, 7, 6, 5]) == [None, None, None, None, 7, 6, 5, None]
    assert histogram.program([0, 2, 3, 2, 2]) == [None, 5, 5, 6, 7]  # 4 + 1, 4 + 1, 4 + 2, 4 + 3


@pytest.mark.parametrize("name", ["frac_prevs", "histogram"])
def test_a_number_is_said_exactly(name: str) -> None:
    """The logit of a number v is SHARP (2 v f - v^2), where f is the program's: highest at v = f."""
    known = KNOWN_MODELS[name]()
    model, rng = known.hooked(), np.random.default_rng(13)
    values = np.array([float(value) for value in (known.counts if name == "histogram" else known.fractions)])
    for prompt in [known.prompt(rng) for _ in range(20)]:
        said = logits_of(model, prompt)[:, -len(values) :]
        for row, token in zip(said, known.program(prompt), strict=True):
            if token is not None:
                right = values[token - (model.cfg.d_vocab - len(values))]
                np.testing.assert_allclose(row, known.SHARP * (2 * values * right - values**2), atol=1e-2)


@pytest.mark.parametrize("name", PROGRAMS)
def test_distractors_write_and_are_not_read(name: str) -> None:
    known = KNOWN_MODELS[name]()
    _, written = EdgeReference(known.module()).run(known.pairs(1)[0]["clean"])
    circuit = {end for edge in known.edges("zero") for end in edge.replace("<", "->").split("->")}
    idle = {node: value for node, value in written.items() if node not in circuit}
    loud = [node for node, value in idle.items() if np.abs(value).max() > 0.1]
    silent = [node for node, value in idle.items() if not value.any()]
    assert len(loud) >= 3
    assert silent


def test_what_reads_positions_alone_is_true_by_zeros_and_not_by_corrupted_prompts() -> None:
    known = KnownReverse()
    assert known.edges("corrupted") < known.edges("zero")
    assert known.edges("zero") - known.edges("corrupted") == {
        "embed->L0H1<q>", "embed->L0H1<v>", "embed->L0 mlp", "embed->L1H3<k>"
    }  # fmt: skip


# A linear model


@pytest.mark.parametrize("known", [KnownLinear(), KnownLinear(9, 3, 2, seed=1)], ids=["usual", "three layers"])
@pytest.mark.parametrize("ablation", ["corrupted", "zero", "mean"])
def test_edge_effects_of_a_linear_model_are_products_of_matrices(known: KnownLinear, ablation: EdgeAblation) -> None:
    pairs = known.pairs(4, seed=10)
    expected = known.edge_effects(pairs, ablation)
    assert {edge for edge, values in expected.items() if values.any()} == known.edges(ablation)
    for edge, values in EdgeReference(known.module()).effects(pairs, ablation).items():
        np.testing.assert_allclose(values, expected[edge], atol=1e-5)
    # One gradient gives what replacing each edge gives.
    found = attribute_edges(EdgeRuns(known.hooked(), pairs, ablation=ablation), options={"method": "eap"})
    assert set(found.edges) == set(expected)
    for edge, score in zip(found.edges, found.values, strict=True):
        assert score == pytest.approx(expected[edge].mean(), abs=2e-5), edge


@pytest.mark.parametrize("known", [KnownLinear(), KnownLinear(9, 3, 2, seed=1)], ids=["usual", "three layers"])
def test_the_parts_of_a_linear_model_add_up_to_all_of_it(known: KnownLinear) -> None:
    for pair in known.pairs(3, seed=12):
        runs = EdgeRuns(known.hooked(), [pair])
        assert runs.corrupted is not None
        (whole,) = runs.corrupted - runs.plain
        effects = {edge: float(effect[0]) for edge, effect in known.edge_effects([pair]).items()}
        first, last = ([e for e in effects if e.startswith("embed->")], [e for e in effects if e.endswith("->logits")])
        for cut in (first, last):
            assert sum(effects[edge] for edge in cut) == pytest.approx(whole, abs=1e-5)
        places = known_places(known, "tokens", pair, "denoising")
        for layer in range(known.n_layers + 1):
            assert sum(part for place, part in places.items() if place[:2] == ("stream", layer)) == pytest.approx(1)
        assert sum(abs(part) > 1e-2 for place, part in places.items() if place[:2] == ("stream", 0)) > 1


def test_a_linear_model_writes_what_its_matrices_say() -> None:
    known = KnownLinear()
    model = known.hooked()
    for pair in known.pairs(3, seed=11):
        written = known.written(pair["clean"])
        logits, cache = model.run_with_cache([pair["clean"]])
        np.testing.assert_allclose(np.array(logits)[0], written["logits"], atol=1e-5)
        for layer in range(known.n_layers):
            np.testing.assert_allclose(
                cache.numpy(f"blocks.{layer}.hook_mlp_out")[0], written[f"L{layer} mlp"], atol=1e-5
            )
        slope = known.gradients(len(pair["clean"]), pair["answer"], pair["wrong"])["logits"]
        assert not slope[:-1].any()


# Modular addition


def test_sums_are_right_and_their_logits_are_waves() -> None:
    known = KnownModularAddition()
    logits = known.all_logits(known.module())
    numbers = np.arange(known.modulus)
    np.testing.assert_array_equal(logits.argmax(axis=-1), np.add.outer(numbers, numbers) % known.modulus)
    for a, b in [(0, 0), (3, 7), (22, 22)]:
        np.testing.assert_allclose(logits[a, b], known.closed_form([a, b, known.equals])[:-1], atol=2e-4)


def test_the_embedding_is_of_the_known_frequencies_alone() -> None:
    known = KnownModularAddition()
    embedding = np.array(known.module().model.embed_tokens.weight)[: known.modulus]
    energy = fourier_energy(embedding)
    assert energy.shape == (12,)
    assert energy.sum() == pytest.approx(1)
    assert len(known.frequencies) <= 5
    assert energy[list(known.frequencies)].sum() > 0.9999
    # By hand: one wave of frequency 5 and one of 7 with twice its amplitude; a constant.
    angles = 2 * np.pi * np.arange(23) / 23
    mixed = np.stack([np.cos(5 * angles), 2 * np.sin(7 * angles)], axis=1)
    np.testing.assert_allclose(fourier_energy(mixed)[[5, 7]], [0.2, 0.8], atol=1e-12)
    np.testing.assert_allclose(fourier_energy(np.full((23, 2), 3.0))[0], 1)
    np.testing.assert_allclose(fourier_energy(1 + np.cos(5 * angles)[:, None])[[0, 5]], [2 / 3, 1 / 3], atol=1e-12)
    with pytest.raises(HookError, match="An embedding of zeros has no frequencies."):
        fourier_energy(np.zeros((23, 4)))
    with pytest.raises(HookError, match=re.escape("An embedding is [p, d_model] with an odd p, got [22, 4].")):
        fourier_energy(np.ones((22, 4)))


def test_the_loss_is_low_by_the_known_frequencies_and_high_without_them() -> None:
    known = KnownModularAddition()
    logits = known.all_logits(known.module())
    assert known.loss(logits) < 1e-6
    assert known.restricted_loss(logits) == pytest.approx(known.loss(logits), abs=1e-6)
    # Without them nothing is left: every number is as likely.
    assert known.excluded_loss(logits) == pytest.approx(np.log(known.modulus), abs=1e-3)
    # The control: by frequencies that the model does not have it is the other way round.
    other = KnownModularAddition(frequencies=(1, 5, 6, 7))
    assert other.restricted_loss(logits) == pytest.approx(np.log(known.modulus), abs=1e-3)
    assert other.excluded_loss(logits) < 1e-6
    # A model without its MLP knows nothing.
    model = known.hooked()
    with model.intervening([{"hook_point": "blocks.0.hook_mlp_out", "type": "zero"}]):
        assert known.loss(known.all_logits(model.model)) == pytest.approx(np.log(known.modulus), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modulus": 22}, "modulus is odd, got 22."),
        ({"modulus": 1}, "modulus is a whole number of 3 or more, got 1."),
        ({"modulus": "a"}, "modulus is a whole number of 3 or more, got 'a'."),
        ({"frequencies": ()}, "frequencies are different whole numbers from 1 to 11, got ()."),
        ({"frequencies": (2, 12)}, "frequencies are different whole numbers from 1 to 11, got (2, 12)."),
        ({"frequencies": (2, 2)}, "frequencies are different whole numbers from 1 to 11, got (2, 2)."),
        ({"frequencies": (2, 2.5)}, "frequencies are different whole numbers from 1 to 11, got (2, 2.5)."),
        ({"frequencies": 2}, "frequencies are different whole numbers from 1 to 11, got 2."),
        (
            {"modulus": 9, "frequencies": (3,)},
            "frequencies and modulus have no divisor in common, got (3,) and 9.",
        ),
        ({"n_heads": 1}, "n_heads is a whole number of 2 or more, got 1."),
    ],
    ids=["even", "one", "text", "none", "too high", "twice", "no number", "no list", "shared divisor", "one head"],
)
def test_frequencies_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=re.escape(message)):
        KnownModularAddition(**options)


def test_another_modulus_is_as_exact() -> None:
    known = KnownModularAddition(modulus=31, frequencies=(1, 4, 9, 14))
    logits = known.all_logits(known.module())
    numbers = np.arange(31)
    np.testing.assert_array_equal(logits.argmax(axis=-1), np.add.outer(numbers, numbers) % 31)


# A planted router


def test_every_token_goes_to_the_experts_that_were_planted() -> None:
    known = KnownRouter()
    model = known.hooked()
    tokens = np.random.default_rng(12).permutation(known.vocabulary).tolist()
    logits, cache = model.run_with_cache([tokens])
    np.testing.assert_allclose(np.array(logits)[0], known.closed_form(tokens), atol=2e-5)
    for layer in range(known.n_layers):
        chosen = cache.numpy(f"blocks.{layer}.mlp.hook_expert_indices")[0]
        weights = cache.numpy(f"blocks.{layer}.mlp.hook_expert_weights")[0]
        for token, ids, own in zip(tokens, chosen, weights, strict=True):
            found = dict(zip(ids.tolist(), own.tolist(), strict=True))
            expected = dict(zip(known.experts(layer, token), known.weights_of(token), strict=True))
            assert set(found) == set(expected)
            for expert, weight in expected.items():
                assert found[expert] == pytest.approx(weight, abs=1e-6)
    # Every expert has tokens, and tokens differ in their second expert from layer to layer.
    assert {expert for token in tokens for expert in known.experts(0, token)} == set(range(known.n_experts))
    assert any(known.experts(0, token) != known.experts(1, token) for token in tokens)
    assert len(set(SHIFTS)) == known.n_experts


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("expert", range(4))
def test_without_an_expert_only_its_tokens_change(layer: int, expert: int) -> None:
    known = KnownRouter()
    model = known.hooked()
    tokens = list(range(known.vocabulary))
    plain, cache = model.run_with_cache([tokens])
    outputs, indices = (cache.numpy(f"blocks.{layer}.mlp.hook_expert_{name}") for name in ("out", "indices"))
    without = np.where((indices == expert)[..., None], 0, outputs)
    edit = {"hook_point": f"blocks.{layer}.mlp.hook_expert_out", "type": "patch", "source": without}
    edited, _ = model.run_with_cache([tokens], (), interventions=[edit])
    np.testing.assert_allclose(np.array(edited)[0], known.closed_form(tokens, without=(layer, expert)), atol=2e-5)
    changes = np.abs(np.array(edited) - np.array(plain))[0].max(axis=-1)
    routed = [expert in known.experts(layer, token) for token in tokens]
    assert 0 < sum(routed) < len(tokens)
    for token, change in enumerate(changes):
        assert change > 1 if routed[token] else change < 1e-5, token
