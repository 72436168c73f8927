"""Ablation: effects are those of a forward pass that is written out, and intervals those of a bootstrap by hand."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from every_architecture import IS_OLDER, OLDER, PHI3SMALL
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.ablation import analyse_causal, draw_causal
from mlx_hooks.analysis.components import components_of
from mlx_hooks.analysis.intervals import few, means, ratios
from mlx_hooks.analysis.known_models import KnownInduction
from mlx_hooks.analysis.pictures import png
from mlx_hooks.coverage.models import tiny_model

ROWS = np.random.default_rng(0).integers(0, 60, size=(3, 7)).tolist()
HOOKS = {"attn": "hook_attn_out", "mlp": "hook_mlp_out"}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits - logits.max(-1, keepdims=True)
    return top - np.log(np.exp(top).sum(-1, keepdims=True))


def effect(plain: np.ndarray, ablated: np.ndarray, row: list[int]) -> tuple[float, float]:
    """Change of the loss and KL in nats, from logits [pos, d_vocab] of one text."""
    p, q = (log_softmax(each)[:-1] for each in (plain, ablated))
    at = np.arange(len(row) - 1), np.array(row[1:])
    return float((p[at] - q[at]).mean()), float((np.exp(p) * (p - q)).sum(-1).mean())


def put_in(
    ablation: str, name: str, row: int, head: int | None, runs: list[dict[str, np.ndarray]], partner: int
) -> Any:
    """What the reference puts in the place of a value [1, pos, ...]."""
    values = np.concatenate([run[name] for run in runs])

    def edit(value: np.ndarray) -> np.ndarray:
        new = {
            "zero": np.zeros_like(value),
            "mean": np.broadcast_to(values.mean(axis=(0, 1)), value.shape),
            "position": values.mean(axis=0)[None],
            "resample": runs[partner][name],
        }[ablation]
        if head is None:
            return new
        value = value.copy()
        value[:, :, head] = new[:, :, head]
        return value

    return edit


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("ablation", ["zero", "mean", "position", "resample"])
def test_effects_are_those_of_a_forward_pass_written_out(kind: str, ablation: str) -> None:
    plain_model = make_model(kind)
    model = HookedModel(plain_model)
    options = {
        "ablations": [ablation if ablation != "position" else "mean"],
        "components": ["attn_out", "mlp_out", "heads"],
    }
    options |= {"mean_over": "position" if ablation == "position" else "all", "batch_size": 2}
    # Of two texts each is the other's partner.
    rows = ROWS[:2]
    found = analyse_causal(model, rows, options)
    runs = [reference.forward(plain_model, [row]) for row in rows]
    assert len(found["components"]) == 3 * 6
    for component in found["components"][::4]:
        head, layer = component["head"], component["layer"]
        name = f"blocks.{layer}." + ("attn.hook_z" if head is not None else HOOKS[component["component"].split()[-1]])
        expected = []
        for i, row in enumerate(rows):
            edit = put_in(ablation, name, i, head, runs, 1 - i)
            edited = reference.forward(plain_model, [row], {name: edit})
            expected.append(effect(runs[i]["hook_logits"][0], edited["hook_logits"][0], row))
        (got,) = component["ablations"].values()
        want = np.mean(expected, axis=0)
        assert abs(want[1]) > 1e-3
        np.testing.assert_allclose([got["loss_change"]["mean"], got["kl"]["mean"]], want, rtol=2e-3, atol=2e-5)
        assert got["logit_difference_change"] is None
    losses = [
        -log_softmax(run["hook_logits"][0])[np.arange(6), row[1:]].mean() for run, row in zip(runs, rows, strict=True)
    ]
    np.testing.assert_allclose(found["plain"]["loss"]["mean"], np.mean(losses), rtol=1e-4)


def test_a_block_is_all_that_it_adds(llama: HookedModel) -> None:
    found = analyse_causal(llama, ROWS, {"components": ["blocks"], "ablations": ["zero"]})
    runs = [reference.forward(llama.model, [row]) for row in ROWS]
    for layer, component in enumerate(found["components"]):
        changes = []
        for row, run in zip(ROWS, runs, strict=True):
            edits = {f"blocks.{layer}.hook_resid_post": lambda _, pre=run[f"blocks.{layer}.hook_resid_pre"]: pre}
            edited = reference.forward(llama.model, [row], edits)
            changes.append(effect(run["hook_logits"][0], edited["hook_logits"][0], row)[0])
        got = component["ablations"]["zero"]["loss_change"]
        np.testing.assert_allclose(got["mean"], np.mean(changes), rtol=2e-3, atol=2e-5)
        assert component["component"] == f"L{layer}"


def test_corrupted_partners_and_answers(llama: HookedModel) -> None:
    prompts = [
        {"clean": ROWS[i], "corrupted": [*ROWS[i][:2], 9 + i, *ROWS[i][3:]], "answer": 3, "wrong": 4} for i in range(3)
    ]
    found = analyse_causal(llama, prompts, {"ablations": ["resample"], "components": ["mlp_out"]})
    assert found["ablations"] == {"resample": "what the component is on the example's corrupted partner"}
    name = "blocks.1.hook_mlp_out"
    changes, losses = [], []
    for prompt in prompts:
        clean = reference.forward(llama.model, [prompt["clean"]])
        partner = reference.forward(llama.model, [prompt["corrupted"]])
        edited = reference.forward(llama.model, [prompt["clean"]], {name: lambda _, p=partner: p[name]})
        before, after = (run["hook_logits"][0, -1] for run in (clean, edited))
        changes.append((after[3] - after[4]) - (before[3] - before[4]))
        losses.append(log_softmax(before)[3] - log_softmax(after)[3])
    got = found["components"][1]["ablations"]["resample"]
    np.testing.assert_allclose(got["logit_difference_change"]["mean"], np.mean(changes), rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(got["loss_change"]["mean"], np.mean(losses), rtol=2e-3, atol=2e-5)
    assert got["kl"]["n"] == 3


@pytest.mark.skipif(IS_OLDER, reason=OLDER)
@pytest.mark.parametrize("name", ["nanbeige", "mamba", PHI3SMALL])
def test_layers_that_run_twice_mixers_and_tokens_that_cannot_be(name: str) -> None:
    # Held against functions at the hook points, which share nothing with interventions.
    model = HookedModel(tiny_model(name))
    rows = np.random.default_rng(1).integers(1, 40, size=(2, 5)).tolist()
    found = analyse_causal(model, rows, {"ablations": ["resample", "mean"]})
    component = found["components"][1]
    point = components_of(model)[1].points[0]
    caches = [model.run_with_cache(row, [point])[1].records[point] for row in rows]
    # One mean for each time that the layer runs.
    passes = [np.concatenate([cache[i].numpy() for cache in caches]).mean(axis=(0, 1)) for i in range(len(caches[0]))]
    for ablation in ("resample", "mean"):
        effects = []
        for i, row in enumerate(rows):
            given = iter(passes if ablation == "mean" else [record.numpy() for record in caches[1 - i]])
            before = model(row)
            edited = model.run_with_hooks(
                row, [(point, lambda value, _, given=given: mx.broadcast_to(mx.array(next(given)), value.shape))]
            )
            assert next(given, None) is None
            with np.errstate(invalid="ignore"):
                effects.append(effect(*(np.array(x[0], dtype=np.float64) for x in (before, edited)), row))
        got = component["ablations"][ablation]
        np.testing.assert_allclose(got["loss_change"]["mean"], np.mean(effects, axis=0)[0], rtol=2e-3, atol=1e-5)
        assert got["kl"]["mean"] > 0


def test_only_what_is_asked_for_counts(llama: HookedModel) -> None:
    # A batch of training: of the first row all is learned, of the second what follows its prompt.
    batch = mx.array(ROWS[:2]), mx.array([[0, 7], [4, 7]])
    found = analyse_causal(llama, [batch], {"ablations": ["zero"], "components": ["mlp_out"]})
    losses = []
    for row, first in zip(ROWS[:2], (1, 4), strict=True):
        logits = reference.forward(llama.model, [row])["hook_logits"][0]
        losses.append(-log_softmax(logits)[np.arange(first - 1, 6), row[first:]].mean())
    np.testing.assert_allclose(found["plain"]["loss"]["mean"], np.mean(losses), rtol=1e-4)
    assert found["eval_data"]["targets"] == 6 + 3


def test_lengths_and_batches_change_nothing(llama: HookedModel) -> None:
    rows = [ROWS[0], ROWS[1][:4], ROWS[2], ROWS[1]]
    one_by_one, together = (
        analyse_causal(llama, rows, {"batch_size": size, "ablations": ["zero", "mean"]}) for size in (1, 8)
    )
    for a, b in zip(one_by_one["components"], together["components"], strict=True):
        for ablation in ("zero", "mean"):
            got, want = (x["ablations"][ablation]["loss_change"]["mean"] for x in (a, b))
            assert got == pytest.approx(want, abs=2e-5)


def test_only_the_two_heads_that_are_there_matter() -> None:
    known = KnownInduction()
    rows = [
        [0, *words, *words]
        for seed in range(4)
        for words in [(1 + np.random.default_rng(seed).permutation(15)[:5]).tolist()]
    ]
    found = analyse_causal(HookedModel(known.model()), rows, {"components": ["heads", "mlp_out"]})
    meant = {f"L0H{known.previous_head}", f"L1H{known.induction_head}"}
    for component in found["components"]:
        for ablation, got in component["ablations"].items():
            assert (got["kl"]["mean"] > 0.1) == (component["component"] in meant), (component, ablation)
            if component["component"] not in meant:
                assert abs(got["loss_change"]["mean"]) < 1e-4


def test_resampling_leaves_out_who_has_no_partner(llama: HookedModel) -> None:
    found = analyse_causal(llama, [ROWS[0], ROWS[1][:4]], {"ablations": ["resample", "zero"]})
    ablations = found["components"][0]["ablations"]
    assert (ablations["resample"]["kl"]["n"], ablations["zero"]["kl"]["n"]) == (1, 2)
    assert "leaves out 1 of 2 examples" in found["notes"][1]
    nobody = analyse_causal(llama, [ROWS[0]], {"ablations": ["resample"]})
    assert nobody["components"][0]["ablations"]["resample"]["kl"] == {"mean": None, "low": None, "high": None, "n": 0}


def test_one_example_has_no_interval_and_says_so(llama: HookedModel) -> None:
    found = analyse_causal(llama, [ROWS[0]], {"ablations": ["zero"]})
    got = found["components"][0]["ablations"]["zero"]["loss_change"]
    assert got["mean"] is not None
    assert (got["low"], got["high"], got["n"]) == (None, None, 1)
    assert found["notes"] == ["Confidence intervals need at least 5 examples, got 1."]


def test_nothing_stays_behind_and_a_seed_tells_it_again(llama: HookedModel) -> None:
    before = np.array(llama.model(llama.to_tokens(ROWS)))
    seen: list[tuple[int, int]] = []
    options = {"ablations": ["resample"], "components": ["heads"], "seed": 3}
    first = analyse_causal(llama, ROWS, options, lambda *done: seen.append(done))
    assert analyse_causal(llama, ROWS, options) == first
    # And the batch as it is, and those that it is resampled from.
    assert seen == [(i + 1, 12 + 2) for i in range(12 + 2)]
    assert np.array_equal(np.array(llama.model(llama.to_tokens(ROWS))), before)


def test_the_pictures_are_drawn(llama: HookedModel) -> None:
    prompts = [{"clean": row, "corrupted": [*row[:3], 1, *row[4:]], "answer": 3, "wrong": 4} for row in ROWS]
    for data, parts in ((ROWS, ["heads", "blocks"]), (prompts, None), (ROWS[:1], None)):
        drawn = draw_causal(analyse_causal(llama, data, {"components": parts, "resamples": 100}))
        assert [title for title, _ in drawn] == ["One component at a time", "The strongest effects"]
        assert all(png(figure).startswith(b"\x89PNG") for _, figure in drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ablations": []}, "ablations names at least one"),
        ({"ablations": ["noise"]}, "ablations.* must be 'zero', 'mean' or 'resample', got 'noise'"),
        ({"components": ["heads", "heads"]}, "components names at least one, each once"),
        ({"confidence": 1.0}, "confidence must be less than 1"),
        ({"components": ["mixer_out"]}, "llama has no mixer_out to ablate"),
        ({"layers": 3}, "CausalOptions has no field 'layers'"),
    ],
)
def test_what_cannot_be_done_is_refused(llama: HookedModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        analyse_causal(llama, ROWS, options)


def test_components_in_forward_order(llama: HookedModel) -> None:
    assert [c.name for c in components_of(llama)] == [f"L{i} {part}" for i in range(3) for part in ("attn", "mlp")]
    heads = components_of(llama, ["mlp_out", "heads"])
    assert [c.name for c in heads][:6] == ["L0H0", "L0H1", "L0H2", "L0H3", "L0 mlp", "L1H0"]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    # Many samples of a skewed distribution with mean 1: each column is one.
    values = np.random.default_rng(0).exponential(size=(30, 400))
    found = means(values, resamples=500)
    covered = np.mean([e.low <= 1 <= e.high for e in found])
    assert 0.88 < covered < 0.98
    wide = means(values[:, :50], confidence=0.5, resamples=500)
    assert 0.3 < np.mean([e.low <= 1 <= e.high for e in wide]) < 0.7
    np.testing.assert_allclose([e.mean for e in found], values.mean(axis=0))


def test_intervals_of_few_or_equal_numbers() -> None:
    alone, equal, none = means(np.array([[1.0, 2.0, np.nan], [np.nan, 2.0, np.nan]]))
    assert (alone.mean, alone.low, alone.n) == (1.0, None, 1)
    assert (equal.mean, equal.low, equal.high) == (2.0, None, None)
    assert (none.mean, none.n) == (None, 0)
    five = means(np.full((5, 1), 2.0))[0]
    assert (five.mean, five.low, five.high) == (2.0, 2.0, 2.0)
    assert ratios(np.ones((4, 1)), np.ones(4))[0].low is None
    assert ratios(np.ones((5, 1)), np.ones(5))[0].low == 1
    assert few(20) == few(5, are_ratios=False) == []
    assert "need at least 5 examples, got 4" in few(4)[0]
    assert "fewer than 20 held-out texts, here 19" in few(19, "held-out texts")[0]


@pytest.mark.parametrize("n", [5, 10, 19])
def test_intervals_of_few_numbers_cover_the_truth_too(n: int) -> None:
    values = np.random.default_rng(n).normal(size=(n, 2000))
    assert 0.935 < np.mean([e.low <= 0 <= e.high for e in means(values)]) < 0.965


def test_a_model_that_cannot_read_several_tokens_is_told_of() -> None:
    # mlx-lm's olmo adds its mask, which may be a text, to the scores.
    with pytest.raises(HookError, match=r"olmo cannot read tokens of shape \[1, 4\]: Cannot perform"):
        analyse_causal(HookedModel(tiny_model("olmo")), [[1, 2, 3, 4]])


def test_intervals_of_ratios() -> None:
    generator = np.random.default_rng(1)
    below = 2 + generator.normal(size=40) / 4
    found, half = ratios(np.stack([below, below / 2 + generator.normal(size=40) / 4], axis=1), below)
    assert [found.mean, found.low, found.high] == pytest.approx([1, 1, 1])
    assert half.mean == pytest.approx(0.5, abs=0.1)
    assert 0.02 < half.high - half.low < 0.3
    # A mean that may have either sign divides nothing.
    (loose,) = ratios(generator.normal(size=(40, 1)), generator.normal(size=40))
    assert (loose.mean is not None, loose.low, loose.high) == (True, None, None)
    assert ratios(np.ones((3, 1)), np.zeros(3))[0].mean is None
