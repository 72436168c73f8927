"""Circuits: on a model whose circuit is known by construction it is found, whole and alone."""

import math
from collections.abc import Callable, Collection
from itertools import combinations
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.ablation import Bench
from mlx_hooks.analysis.circuit_search import Search, analyse_circuit, draw_circuit, smallest
from mlx_hooks.analysis.components import components_of
from mlx_hooks.analysis.eval_data import eval_data_of
from mlx_hooks.analysis.known_models import KnownInduction
from mlx_hooks.analysis.pictures import png

KNOWN = KnownInduction(n_heads=4, previous_head=3, induction_head=2)
CIRCUIT = ["L0H3", "L1H2"]


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel(KNOWN.model())


def pair(seed: int) -> dict[str, Any]:
    """What followed ``a``, and a corrupted prompt of the same tokens in which something else did."""
    a, b, c, d = (1 + np.random.default_rng(seed).permutation(KNOWN.vocabulary - 1)[:4]).tolist()
    return {"clean": [0, a, b, d, c, a], "corrupted": [0, d, b, a, c, a], "answer": b, "wrong": c}


def said_twice(seed: int) -> list[int]:
    words = (1 + np.random.default_rng(seed).permutation(KNOWN.vocabulary - 1)[:6]).tolist()
    return [0, *words, *words]


def test_the_circuit_is_the_two_heads_that_were_built(model: HookedModel) -> None:
    found = analyse_circuit(model, [pair(seed) for seed in range(5)])
    assert found["circuit"] == CIRCUIT
    assert found["faithfulness"]["mean"] == pytest.approx(1, abs=1e-4)
    assert found["complement"]["mean"] == pytest.approx(0, abs=1e-4)
    assert found["completeness"]["mean"] == pytest.approx(1, abs=1e-4)
    for component in found["components"]:
        meant = float(component["component"] in CIRCUIT)
        assert component["recovery"]["mean"] == pytest.approx(meant, abs=1e-4)
        assert component["damage"]["mean"] == pytest.approx(meant, abs=1e-4)
        assert component["in_circuit"] == bool(meant)
    assert found["random"]["sets"] == 10
    assert found["random"]["faithfulness"] == pytest.approx([0] * 10, abs=1e-4)
    # 16 times what is written, of which the head's share is 1 but for 2^-17 of each other key.
    assert found["levels"]["clean"]["mean"] == pytest.approx(16, abs=1e-3)
    assert found["levels"]["corrupted"]["mean"] == pytest.approx(-16, abs=1e-3)


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_texts_have_the_same_circuit_by_every_ablation(model: HookedModel, ablation: str) -> None:
    found = analyse_circuit(model, [said_twice(seed) for seed in range(4)], {"ablation": ablation})
    assert found["circuit"] == CIRCUIT
    assert found["faithfulness"]["mean"] == pytest.approx(1, abs=1e-3)
    assert found["levels"]["corrupted"] is None
    assert all(component["recovery"] is None for component in found["components"])


def test_recovery_is_that_of_a_forward_pass_written_out(llama: HookedModel) -> None:
    rows = np.random.default_rng(0).integers(0, 60, size=(3, 6)).tolist()
    prompts = [{"clean": row, "corrupted": [*row[:2], row[2] + 1, *row[3:]], "answer": 5, "wrong": 6} for row in rows]
    found = analyse_circuit(llama, prompts, {"components": ["mlp_out"], "random_sets": 2})
    name = "blocks.1.hook_mlp_out"

    def score(run: dict[str, np.ndarray]) -> float:
        return run["hook_logits"][0, -1, 5] - run["hook_logits"][0, -1, 6]

    runs = [[reference.forward(llama.model, [prompt[kind]]) for kind in ("clean", "corrupted")] for prompt in prompts]
    clean, corrupted = (np.mean([score(pair[i]) for pair in runs]) for i in (0, 1))
    patched = [
        score(reference.forward(llama.model, [prompt["corrupted"]], {name: lambda _, value=pair[0][name]: value}))
        for prompt, pair in zip(prompts, runs, strict=True)
    ]
    recovery = found["components"][1]["recovery"]
    assert recovery["mean"] == pytest.approx((np.mean(patched) - corrupted) / (clean - corrupted), rel=5e-3)

    def ablated(*layers: int) -> float:
        at = [f"blocks.{layer}.hook_mlp_out" for layer in layers]
        edits = [{n: lambda _, value=pair[1][n]: value for n in at} for pair in runs]
        done = [reference.forward(llama.model, [p["clean"]], e) for p, e in zip(prompts, edits, strict=True)]
        return np.mean([score(run) for run in done])

    damage = found["components"][1]["damage"]["mean"]
    assert damage == pytest.approx((clean - ablated(1)) / (clean - ablated(0, 1, 2)), rel=5e-3)
    out = [i for i in range(3) if f"L{i} mlp" not in found["circuit"]]
    faithfulness = (ablated(*out) - ablated(0, 1, 2)) / (clean - ablated(0, 1, 2))
    assert found["faithfulness"]["mean"] == pytest.approx(faithfulness, rel=5e-3, abs=1e-4)


def test_no_component_of_a_circuit_can_be_left_out(tiny: HookedModel) -> None:
    prompts = [
        {"clean": f"The capital of {a} is", "corrupted": f"The capital of {b} is", "answer": x, "wrong": y}
        for a, b, x, y in [("France", "Italy", "Paris", "Rome"), ("Italy", "Peru", "Rome", "Lima")]
    ]
    steps: list[tuple[int, int]] = []
    found = analyse_circuit(tiny, prompts, {"components": ["attn_out", "mlp_out"]}, lambda *done: steps.append(done))
    assert abs(found["faithfulness"]["mean"] - 1) <= 0.1 + 1e-6
    assert 0 < found["size"] < 8
    assert [c["component"] for c in found["components"] if c["in_circuit"]] == found["circuit"]
    search = Search(Bench(tiny, eval_data_of(tiny, prompts), components_of(tiny)), "resample")
    whole, nothing = search.of([c["component"] for c in found["components"]]).mean(), search.of([]).mean()

    def faithfulness(circuit: list[str]) -> float:
        return (search.of(circuit).mean() - nothing) / (whole - nothing)

    assert faithfulness(found["circuit"]) == pytest.approx(found["faithfulness"]["mean"])
    for name in found["circuit"]:
        assert abs(faithfulness([other for other in found["circuit"] if other != name]) - 1) > 0.1
    assert steps[-1] == (found["runs"], found["runs"])
    assert all(done <= total for done, total in steps)
    strict = analyse_circuit(tiny, prompts, {"components": ["attn_out", "mlp_out"], "faithfulness": 0.99})
    assert strict["size"] >= found["size"]
    assert abs(strict["faithfulness"]["mean"] - 1) <= 0.01 + 1e-6


def test_a_difference_that_may_be_none_has_no_shares(llama: HookedModel) -> None:
    # Three ask for one answer and two for the other: whether the model is right on average, chance decides.
    prompt = {"clean": [1, 2, 3, 4], "corrupted": [1, 5, 3, 4]}
    prompts = [prompt | {"answer": 6 + (i > 2), "wrong": 6 + (i < 3)} for i in range(5)]
    found = analyse_circuit(llama, prompts, {"components": ["mlp_out"]})
    assert found["faithfulness"]["low"] is None
    assert any("may be no better" in note for note in found["notes"])


def listed(shares: dict[str, float]) -> Callable[[Collection[str]], float]:
    """The faithfulness of sets that are listed; of others it is 0."""
    return lambda circuit: shares.get("".join(sorted(circuit)), 0.0)


def test_what_could_not_go_at_first_may_go_later() -> None:
    # b cannot go while c is there.
    shares = {"abc": 1.0, "ab": 1.0, "ac": 0.5, "a": 1.0, "b": 0.5, "bc": 0.5}
    assert smallest(listed(shares), {"a": 3.0, "b": 1.0, "c": 2.0}, 0.9) == (["a"], True)
    # Too much is not faithful either.
    shares = {"ab": 1.0, "a": 1.3, "b": 0.2}
    assert smallest(listed(shares), {"a": 1.0, "b": 1.0}, 0.9) == (["a", "b"], True)
    assert smallest(listed(shares), {"a": 1.0, "b": 1.0}, 0.6) == (["a"], True)


def test_where_nothing_can_go_at_first_a_circuit_is_grown() -> None:
    # Twelve, of which no single one can be left out: there are too many smaller sets to try them all.
    names = "abcdefghijkl"
    importance = {name: float(i) for i, name in enumerate(names)}
    assert smallest(listed({names: 1.0, "hijkl": 1.0, "hjl": 0.95}), importance, 0.9) == (list("hijkl"), False)
    assert smallest(listed({names: 1.0, "hijkl": 1.0, "hjkl": 0.95}), importance, 0.9) == (list("hjkl"), False)
    assert smallest(listed({names: 1.0}), importance, 0.9) == (list(names), False)


def test_all_smaller_sets_are_tried_where_they_are_few() -> None:
    importance = {name: float(i) for i, name in enumerate("abcdef")}
    assert smallest(listed({"abcdef": 1.0, "ace": 0.95}), importance, 0.9) == (["a", "c", "e"], True)
    assert smallest(listed({"abcdef": 1.0}), importance, 0.9) == (list("abcdef"), True)


def test_no_smaller_circuit_is_faithful_and_the_controls_are_others() -> None:
    # A model whose circuit no single removal leads to.
    model = HookedModel(make_model("llama", seed=3))
    random = np.random.default_rng(0)
    prompts = []
    for _ in range(6):
        clean = random.integers(1, 50, 6).tolist()
        corrupted = [*clean[:2], (clean[2] + 7) % 50, *clean[3:]]
        answers = {"answer": int(random.integers(1, 25)), "wrong": int(random.integers(26, 50))}
        prompts.append({"clean": clean, "corrupted": corrupted} | answers)
    options = {"components": ["attn_out", "mlp_out"], "random_sets": 30, "resamples": 100}
    found = analyse_circuit(model, prompts, options)
    search = Search(Bench(model, eval_data_of(model, prompts), components_of(model)), "resample")
    names = [c["component"] for c in found["components"]]
    whole, nothing = search.of(names).mean(), search.of([]).mean()

    def is_faithful(some: Collection[str]) -> bool:
        return abs((search.of(some).mean() - nothing) / (whole - nothing) - 1) <= 0.1

    sizes = [size for size in range(1, 7) if any(map(is_faithful, combinations(names, size)))]
    assert found["is_smallest"]
    assert found["size"] == sizes[0] < 6
    # All sets of this size but the circuit.
    assert found["random"]["sets"] == min(30, math.comb(6, found["size"]) - 1)


def test_a_circuit_is_judged_by_examples_that_it_was_not_chosen_with(llama: HookedModel) -> None:
    rows = np.random.default_rng(5).integers(0, 60, size=(12, 6)).tolist()
    prompts = [
        {"clean": row, "corrupted": [*row[:2], (row[2] + 7) % 60, *row[3:]], "answer": 5, "wrong": 6} for row in rows
    ]
    options = {"components": ["attn_out", "mlp_out"], "faithfulness": 0.7, "resamples": 100}
    # The same prompt once more is on the same side.
    found = analyse_circuit(llama, [*prompts, prompts[0]], options)
    held_out = found["held_out"]
    assert (found["chosen_with"] + found["judged_by"], len(held_out)) == (13, found["judged_by"])
    assert (0 in held_out) == (12 in held_out)
    assert found["faithfulness"]["n"] == found["judged_by"]
    # Other questions there change what is told of the circuit, and not the circuit.
    asked = [p | {"answer": 8, "wrong": 9} if i in held_out else p for i, p in enumerate([*prompts, prompts[0]])]
    again = analyse_circuit(llama, asked, options)
    assert again["circuit"] == found["circuit"]
    assert again["size"] < 6
    assert again["faithfulness"] != found["faithfulness"]
    names = [c["component"] for c in again["components"]]
    search = Search(Bench(llama, eval_data_of(llama, asked), components_of(llama)), "resample")
    whole, nothing, own = (search.of(c)[held_out].mean() for c in (names, [], again["circuit"]))
    assert again["faithfulness"]["mean"] == pytest.approx((own - nothing) / (whole - nothing))
    missed = abs(again["faithfulness"]["mean"] - 1) > 0.3
    assert any("held out the circuit does not reach" in note for note in again["notes"]) == missed
    few = analyse_circuit(llama, prompts[:9], options)
    assert (few["chosen_with"], few["judged_by"], few["held_out"]) == (9, 9, [])
    assert any("which flatters it" in note for note in few["notes"])


def test_one_prompt_has_no_interval(model: HookedModel) -> None:
    found = analyse_circuit(model, [pair(0)], {"random_sets": 0})
    assert found["circuit"] == CIRCUIT
    assert found["faithfulness"]["low"] is None
    assert found["random"] == {"sets": 0, "faithfulness": [], "mean": None}
    assert "Confidence intervals need at least 5 examples, got 1." in found["notes"]


def test_what_has_no_circuit_is_refused(model: HookedModel) -> None:
    # What is asked about stands where it stood.
    same = {"clean": [0, 1, 2, 3, 4, 1], "corrupted": [0, 1, 2, 4, 3, 1], "answer": 2, "wrong": 3}
    with pytest.raises(HookError, match="clean and corrupted prompts have the same metric"):
        analyse_circuit(model, [same], {"ablation": "zero"})
    with pytest.raises(HookError, match="Resampling takes activations from another example"):
        analyse_circuit(model, [said_twice(0)], {"ablation": "resample"})
    silent = KNOWN.model()
    silent.transformer.wte.weight = mx.zeros_like(silent.transformer.wte.weight)
    with pytest.raises(HookError, match="with all components ablated the metric is what it is without"):
        analyse_circuit(HookedModel(silent), [said_twice(0)], {"ablation": "zero"})


def test_the_pictures_are_drawn(model: HookedModel) -> None:
    for data, options in (([pair(0), pair(1)], {}), ([said_twice(0)], {"random_sets": 0})):
        drawn = draw_circuit(analyse_circuit(model, data, options))
        assert [title for title, _ in drawn] == ["The circuit among all components", "Faithfulness"]
        assert all(png(figure).startswith(b"\x89PNG") for _, figure in drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"faithfulness": 1.5}, "faithfulness must be less than or equal to 1, got 1.5"),
        ({"components": ["heads", "attn_out"]}, "components do not overlap"),
        ({"components": ["blocks", "mlp_out"]}, "components do not overlap"),
        ({"components": []}, "components names at least one"),
        ({"components": 5}, "components must be a list, got 5"),
    ],
)
def test_options_are_checked(model: HookedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        analyse_circuit(model, [pair(0)], options)
