"""Activation patching: what a model's construction says is found, and a sweep is what single runs are."""

import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every_architecture import PHI3SMALL, needs_block_sparse
from known_places import known_places
from tiny_models import make_model

from mlx_hooks import ActivationCache, HookedModel, HookError
from mlx_hooks.analysis.circuits.metrics import metric_of
from mlx_hooks.analysis.circuits.patching import (
    PatchingOptions,
    PatchingResult,
    activation_patching,
    draw_patching,
    grid_of,
)
from mlx_hooks.analysis.eval_data import EvalBatch, eval_data_of
from mlx_hooks.analysis.known_models import KNOWN_MODELS, KnownInduction
from mlx_hooks.analysis.patched_runs import Cell, PatchedRuns
from mlx_hooks.analysis.pictures import png
from mlx_hooks.coverage.models import tiny_model

INDUCTION = KnownInduction()
SWEEPS: list[dict[str, Any]] = [
    {"sweep": "layer x position"},
    {"sweep": "layer x position", "component": "mlp_out"},
    {"sweep": "layer x head", "component": "pattern"},
    {"sweep": "layer x head", "component": "k"},
    {"sweep": "layer x head x position", "component": "q"},
    {"sweep": "layer x head x position"},
    {"sweep": "component"},
]


def pairs(n: int, length: int = 6, differs_at: int = 1, seed: int = 0, d_vocab: int = 40) -> list[dict[str, Any]]:
    """Random prompts whose partners have one other token."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        clean, (answer, wrong, other) = rng.integers(1, d_vocab, length), rng.permutation(d_vocab)[:3].tolist()
        corrupted = clean.copy()
        corrupted[differs_at] = other if other != clean[differs_at] else (other + 1) % d_vocab
        found.append(
            {"clean": clean.tolist(), "corrupted": corrupted.tolist(), "answer": answer, "wrong": wrong}
        )  # fmt: skip
    return found


def one_by_one(model: HookedModel, batch: EvalBatch, cell: Cell, direction: str, cache: ActivationCache) -> mx.array:
    """Logits of a run of its own with one cell put in, as an intervention."""
    tokens, length = (batch.corrupted if direction == "denoising" else batch.tokens), batch.tokens.shape[1]
    given: dict[str, Any] = {} if cell.heads is None else {"heads": list(cell.heads)}
    if cell.positions is not None:
        given["positions"] = [p % length for p in cell.positions]
    made = []
    for name in cell.hook_points:
        records = cache.records[name]
        for record in records:
            passes = {"passes": [record.pass_index]} if len(records) > 1 else {}
            made.append({"hook_point": name, "type": "patch", "source": record.value} | given | passes)
    with model.intervening(made):
        return model.model(mx.array(tokens))


def check_against_single_runs(model: HookedModel, data: Any, direction: str, **options: Any) -> None:
    data = eval_data_of(model, data)
    found = activation_patching(model, data, direction=direction, **options)
    metric, named = metric_of(options.get("metric"), data), {k: v for k, v in options.items() if k != "rows"}
    cells = grid_of(model, data, PatchingOptions(**named)).cells
    assert np.isfinite(found.patched[0]).sum() == len(cells) > 1
    names = list({name for cell in cells.values() for name in cell.hook_points})
    for batch in data.batches(8):
        plain = model.model(mx.array(batch.tokens))
        _, cache = model.run_with_cache(batch.tokens if direction == "denoising" else batch.corrupted, names)
        for place, cell in cells.items():
            expected = metric.numbers(one_by_one(model, batch, cell, direction, cache), batch, plain)
            actual = found.patched[(batch.indices, *(np.full(len(batch.indices), i) for i in place))]
            np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5, err_msg=str(cell))


@pytest.mark.parametrize("options", SWEEPS, ids=lambda o: "-".join(o.values()).replace(" ", ""))
def test_a_sweep_is_what_a_run_for_each_cell_is(options: dict[str, Any], model: HookedModel) -> None:
    for direction in ("denoising", "noising"):
        check_against_single_runs(model, pairs(2, length=4), direction, **options, rows=5)


@pytest.mark.parametrize(
    "name",
    ["mamba", "gemma3_text", "gemma3n", "deepseek_v2", "iquestloopcoder", PHI3SMALL, "qwen3_moe", "recurrent_gemma"],
)
def test_a_sweep_is_exact_on_models_of_other_forms(name: str) -> None:
    # State spaces; windows of keys; several streams and shared keys; latent keys; layers that run again; experts;
    # attention that differs with a KV cache.
    model = HookedModel(tiny_model(name))
    check_against_single_runs(model, pairs(2, length=4), "denoising", sweep="component")
    later = pairs(2, length=4, differs_at=2)
    if "blocks.0.attn.hook_z" in model.hook_points:
        check_against_single_runs(model, later, "noising", sweep="layer x head x position")
    if "blocks.0.attn.hook_pattern" in model.hook_points:
        check_against_single_runs(model, later, "noising", sweep="layer x head", component="pattern")
        check_against_single_runs(model, later, "denoising", sweep="layer x head", component="attn_scores")
    if model.hook_points["blocks.0.hook_resid_pre"].axes[0] == "batch":
        check_against_single_runs(model, later, "noising", sweep="layer x position")


class OtherwiseWithKeysBefore(nn.Module):
    """Turns queries and keys as a rotary embedding does; where keys were before, they are a little longer."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        return self.rope(x, offset=offset) * (1.02 if offset else 1.0)


def runs_of(model: HookedModel) -> PatchedRuns:
    """Runs with something put in at the last of six positions."""
    batch = next(eval_data_of(model, pairs(2, differs_at=4)).batches(8))
    assert batch.corrupted is not None
    return PatchedRuns(model, batch.corrupted, batch.tokens, [Cell(("blocks.0.attn.hook_z",), (5,))])


def test_runs_begin_at_the_beginning_where_the_model_attends_otherwise_with_keys_before() -> None:
    assert runs_of(HookedModel(make_model("llama"))).can_continue
    bent = make_model("llama")
    for layer in bent.layers:
        layer.self_attn.rope = OtherwiseWithKeysBefore(layer.self_attn.rope)
    model = HookedModel(bent)
    assert not runs_of(model).can_continue
    check_against_single_runs(model, pairs(2, differs_at=4), "denoising", sweep="layer x position")


@needs_block_sparse
def test_tokens_that_a_model_never_says_do_not_hinder_runs_that_continue() -> None:
    # Block-sparse attention sees later positions: what is put in at a position changes those before it.
    sparse, dense = tiny_model("phi3small"), tiny_model("phi3small")
    assert not runs_of(HookedModel(sparse)).can_continue
    for layer in dense.layers:
        layer.self_attn.block_sparse = False
    model = HookedModel(dense)
    assert runs_of(model).can_continue
    check_against_single_runs(model, pairs(2, differs_at=2, length=4), "noising", sweep="layer x position")


def test_cells_of_several_hook_points_follow_what_they_put_in_before(llama: HookedModel) -> None:
    z, mlp, stream = "blocks.0.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.2.hook_resid_pre"
    cells = [
        {"hook_point": names, "positions": positions}
        for names in ([z, mlp], [z, stream], [mlp, stream], [z])
        for positions in (2, [1, 3], -1)
    ]
    check_against_single_runs(llama, pairs(2), "denoising", sweep=cells)
    check_against_single_runs(
        llama, pairs(2), "noising", sweep=[*cells, {"hook_point": [z, "hook_embed"], "positions": 3}]
    )


def test_sweeps_are_exact_by_any_metric(llama: HookedModel) -> None:
    def says_much(logits: mx.array, batch: EvalBatch) -> mx.array:
        return logits.max(axis=-1).sum(axis=-1)

    for metric in (says_much, "kl", "probability", "loss"):
        check_against_single_runs(llama, pairs(3), "denoising", sweep="layer x position", metric=metric)


def test_prompts_of_several_lengths_run_apart(llama: HookedModel) -> None:
    data = [*pairs(2, 4), *pairs(3, 6, seed=1), *pairs(1, 4, seed=2)]
    with pytest.raises(HookError, match='The prompts have 4 to 6 tokens, .* give align "start" or "end"'):
        activation_patching(llama, data)
    for align, positions in (("start", range(4)), ("end", range(-4, 0))):
        check_against_single_runs(llama, data, "noising", sweep="layer x position", align=align)
        found = activation_patching(llama, data, align=align)
        assert found.axes["position"] == tuple(map(str, positions))
    # The examples keep their order.
    alone = np.concatenate([activation_patching(llama, [one], align="end").clean for one in data])
    np.testing.assert_allclose(found.clean, alone, atol=1e-5)
    check_against_single_runs(llama, data, "noising", sweep="layer x head")


def induction_pairs() -> list[dict[str, Any]]:
    """Pairs whose corrupted token, the one before the answer, stands at position 3; the answer's at 4."""
    found = INDUCTION.pairs(60, kind="match")
    return [pair for pair in found if pair["clean"][3] != pair["corrupted"][3]]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_recovery_is_1_where_the_induction_circuit_was_built_and_0_elsewhere(direction: str) -> None:
    model, data = INDUCTION.hooked(), induction_pairs()
    assert len(data) > 2
    last = len(data[0]["clean"]) - 1
    previous, induction = INDUCTION.previous_head, INDUCTION.induction_head
    expected: dict[tuple[str, str], list[tuple[int, ...]]] = {
        ("layer x head x position", "z"): [(0, previous, 4), (1, induction, last)],
        ("layer x head", "z"): [(0, previous), (1, induction)],
        ("layer x head", "k"): [(1, induction)],
        ("layer x head", "v"): [(0, previous)],
        ("layer x head", "q"): [],
        ("layer x head", "pattern"): [(1, induction)],
        ("layer x position", "resid_pre"): [(0, 3), (1, 4)],
        ("layer x position", "resid_post"): [(0, 4), (1, last)],
        ("layer x position", "attn_out"): [(0, 4), (1, last)],
        ("layer x position", "mlp_out"): [],
    }
    for (sweep, component), places in expected.items():
        found = activation_patching(model, data, sweep, component=component, direction=direction)
        meant = np.zeros(found.effects.shape)
        for place in places:
            meant[place] = 1
        np.testing.assert_allclose(found.effects, meant, atol=1e-4, err_msg=f"{sweep} {component}")
    found = activation_patching(model, data, "component", direction=direction)
    ones = {f"L0H{previous}", f"L1H{induction}", "L0 attn", "L1 attn"}
    meant = [float(name in ones) for name in found.axes["component"]]
    np.testing.assert_allclose(found.effects, meant, atol=1e-4)


def shares(found: PatchingResult) -> np.ndarray:
    """What each example recovers, or damages, by itself: [example, ...] as the sweep's axes are."""
    rest = [1] * (found.patched.ndim - 1)
    before = found.corrupted if found.direction == "denoising" else found.clean
    change = (found.patched - before.reshape(-1, *rest)) / (found.clean - found.corrupted).reshape(-1, *rest)
    return change if found.direction == "denoising" else -change


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, made in KNOWN_MODELS.items() for kind in made().kinds]
)
def test_sweeps_find_what_was_built_at_its_places_and_nothing_elsewhere(name: str, kind: str, direction: str) -> None:
    known = KNOWN_MODELS[name]()
    model, data = known.hooked(), known.pairs(6, kind=kind)
    expected = [known_places(known, kind, pair, direction) for pair in data]
    sweeps = {"stream": ("layer x position", "resid_pre"), "head": ("layer x head x position", "z")}
    if "blocks.0.hook_mlp_out" in model.hook_points:
        sweeps["mlp"] = ("layer x position", "mlp_out")
    for what, (sweep, component) in sweeps.items():
        found = shares(activation_patching(model, data, sweep, component=component, direction=direction))
        meant = np.zeros(found.shape)
        for i, places in enumerate(expected):
            for (part, layer, *rest), share in places.items():
                # The stream behind the last layer is no layer's resid_pre.
                if part == what and layer < model.cfg.n_layers:
                    meant[(i, layer, *rest)] = share
        np.testing.assert_allclose(np.where(np.isnan(meant), np.nan, found), meant, atol=1e-4, err_msg=what)
    # All positions together: each token has its part, or one has all.
    found_parts = activation_patching(model, data, "component", direction=direction)
    matter = set()
    for label, measured in zip(found_parts.axes["component"], shares(found_parts).T, strict=True):
        if not label.endswith("attn"):
            layer = int(label[1])
            part = ("mlp", layer) if label.endswith("mlp") else ("head", layer, int(label[3:]))
            told = [sum(share for place, share in places.items() if place[:-1] == part) for places in expected]
            np.testing.assert_allclose(measured, told, atol=1e-4, err_msg=label)
            matter |= {label} if np.abs(told).max() > 1e-3 else set()
    inside = {edge.partition("->")[0] for edge in known.edges("corrupted", kind)} - {"embed"}
    assert matter == inside if direction == "noising" else matter <= inside


def test_two_places_that_only_together_bring_the_answer_back_are_one_cell() -> None:
    model = INDUCTION.hooked()
    # What came before two tokens is exchanged: either place alone makes the head look at both.
    data = [{"clean": [0, 3, 5, 7, 6, 3], "corrupted": [0, 7, 5, 3, 6, 3], "answer": 5, "wrong": 6}]
    z, head = "blocks.0.attn.hook_z", INDUCTION.previous_head
    cells = [{"hook_point": z, "heads": head, "positions": at} for at in (2, 4, [2, 4], [-4, -2])]
    cells += [{"hook_point": ["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"]}]
    found = activation_patching(model, data, cells)
    np.testing.assert_allclose(found.effects, [0.5, 0.5, 1, 1, 1], atol=1e-4)
    assert found.sweep == "cells"
    assert found.axes["cell"][:3] == (
        f"{z}, head 1, position 2",
        f"{z}, head 1, position 4",
        f"{z}, head 1, positions 2, 4",
    )
    assert found.axes["cell"][4] == f"{z} and blocks.1.hook_mlp_out"


def test_cells_share_passes_and_what_changes_nothing_is_not_run(llama: HookedModel, monkeypatch: Any) -> None:
    rows: list[int] = []
    cells = list(
        grid_of(llama, eval_data_of(llama, pairs(2)), PatchingOptions(sweep="layer x head x position")).cells.values()
    )
    batch = next(eval_data_of(llama, pairs(2, differs_at=4)).batches(8))
    assert batch.corrupted is not None
    runs = PatchedRuns(llama, batch.corrupted, batch.tokens, cells)
    found = list(runs.logits())
    # 3 layers of 4 heads: 6 positions each, of which the first 4 are the same in both runs.
    (unchanged, nothing), *passes = found
    assert nothing is None
    assert [cells[i].positions for i in unchanged] == [(p,) for _ in range(12) for p in range(4)]
    rows = [logits.shape[0] for _, logits in passes if logits is not None]
    assert rows == [16, 16, 16]
    assert sorted(i for indices, _ in found for i in indices) == list(range(72))


def test_what_is_no_result_is_not_drawn() -> None:
    with pytest.raises(HookError, match="result is what a patching function answered, got dict"):
        draw_patching({})  # type: ignore[arg-type]


def test_a_result_tells_its_levels_its_strongest_places_and_intervals(llama: HookedModel) -> None:
    found = activation_patching(llama, pairs(6), "layer x head")
    above = found.patched.mean(axis=0) - found.corrupted.mean()
    np.testing.assert_allclose(found.effects, above / (found.clean.mean() - found.corrupted.mean()))
    top = found.top(3)
    sizes = np.sort(np.abs(found.effects).ravel())[::-1]
    assert [abs(effect) for _, effect in top] == pytest.approx(sizes[:3].tolist())
    with pytest.raises(HookError, match="n is a whole number from 0 on, got -1"):
        found.top(-1)
    estimates = found.estimates(resamples=200)
    assert len(estimates) == 12
    assert estimates[top[0][0]].mean == pytest.approx(top[0][1])
    few = activation_patching(llama, pairs(2), "layer x head")
    for name, wrong in (
        *(("confidence", each) for each in (95, 1, 0, -1, "x")),
        *(("resamples", each) for each in (0, -5, 2.5)),
        ("seed", -1),
    ):
        for result in (found, few):
            with pytest.raises(HookError, match=f"{name} must be ") as caught:
                result.estimates(**{name: wrong})
            assert caught.value.field == name
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["effect"] == "recovery"
    assert told["axes"] == {"layer": ["0", "1", "2"], "head": ["H0", "H1", "H2", "H3"]}
    assert np.array(told["effects"]) == pytest.approx(found.effects)
    assert told["levels"] == pytest.approx({"clean": found.clean.mean(), "corrupted": found.corrupted.mean()})
    noised = activation_patching(llama, pairs(6), "layer x head", direction="noising")
    assert noised.to_dict()["effect"] == "damage"
    below = noised.clean.mean() - noised.patched.mean(axis=0)
    np.testing.assert_allclose(noised.effects, below / (found.clean.mean() - found.corrupted.mean()))


def test_key_value_heads_are_named_and_positions_have_their_tokens(llama: HookedModel, tiny: HookedModel) -> None:
    assert activation_patching(llama, pairs(1), "layer x head", component="v").axes["head"] == ("KV0", "KV1")
    capitals = [
        {"clean": f"The capital of {a} is", "corrupted": f"The capital of {b} is", "answer": c, "wrong": d}
        for a, b, c, d in [("France", "Italy", " Paris", " Rome"), ("Italy", "France", " Rome", " Paris")]
    ]
    found = activation_patching(tiny, capitals)
    assert found.axes["position"] == ("0 <bos>", "1 The", "2 capital", "3 of", "4", "5 is")
    assert found.effects[0] == pytest.approx([0, 0, 0, 0, 1, 0], abs=1e-5)


def test_progress_comes_to_the_end(llama: HookedModel) -> None:
    seen: list[tuple[int, int]] = []
    activation_patching(llama, pairs(3), "layer x head", batch_size=2, progress=lambda *at: seen.append(at))
    # Of two batches: four baselines, four captures, and 12 cells each; nothing continues from its middle.
    assert seen[-1] == (32, 32)
    assert seen == sorted(seen)
    assert seen[0] == (1, 36)


def test_sweeps_are_drawn(llama: HookedModel) -> None:
    for sweep in ("layer x position", "layer x head", "layer x head x position", "component", [Cell(("hook_embed",))]):
        ((title, made),) = draw_patching(activation_patching(llama, pairs(2), sweep))
        assert title == "Activation patching"
        assert png(made).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweep": "layers"}, "sweep must be"),
        ({"sweep": []}, "sweep is empty"),
        ({"sweep": [3]}, "cell 0 is 3"),
        ({"sweep": [{"hook_point": "hook_embed", "layer": 1}]}, "A cell is a mapping with hook_point"),
        ({"sweep": [{"hook_point": "blocks.9.hook_mlp_out"}]}, "Unknown hook point 'blocks.9.hook_mlp_out'"),
        ({"sweep": [{"hook_point": "hook_embed", "heads": 1}]}, "hook_embed has no head axis"),
        ({"sweep": [{"hook_point": "hook_embed", "positions": []}]}, "positions of cell 0 is a whole number or a list"),
        (
            {"sweep": [{"hook_point": "hook_embed", "positions": 6}]},
            "Position 6 is outside the shortest prompt",
        ),
        ({"sweep": [{"hook_point": "blocks.0.attn.hook_z", "heads": [4]}]}, "Heads of .* are 0 to 3, got 4"),
        ({"sweep": [{"hook_point": "blocks.0.attn.hook_z", "heads": "all"}]}, "heads of cell 0 is a whole number"),
        ({"sweep": "layer x head", "component": "mlp_out"}, "a component with a head axis, .* mlp_out has none"),
        ({"sweep": "layer x position", "component": "stream"}, "Unknown component 'stream' in a block"),
        ({"sweep": "layer x position", "component": "mixer_out"}, "Unknown hook point 'blocks.0.mixer.hook_out'"),
        ({"sweep": "layer x head", "component": "result"}, "'blocks.0.attn.hook_result' is made of"),
        ({"sweep": "component", "component": "z"}, "component is of sweeps over layers"),
        ({"sweep": "layer x head", "components": ["heads"]}, 'components is of the sweep "component"'),
        ({"sweep": "component", "components": ["mixer_out"]}, "has no mixer_out"),
        ({"direction": "both"}, "direction must be"),
        ({"metric": "accuracy"}, "metric is a function or one of"),
        ({"metric": lambda logits, batch: logits[:, -1, 0] * 0}, "The metric is 0 of clean and of corrupted prompts"),
        ({"steps": 3}, "PatchingOptions has no field 'steps'"),
    ],
)
def test_what_cannot_be_patched_is_told(options: dict[str, Any], message: str, llama: HookedModel) -> None:
    with pytest.raises(HookError, match=message):
        activation_patching(llama, pairs(1), **options)


def test_data_without_partners_is_told(llama: HookedModel) -> None:
    for data in ([[1, 2, 3]], [{"clean": [1, 2], "answer": 3}]):
        with pytest.raises(HookError, match="Patching needs corrupted prompts"):
            activation_patching(llama, data)
    learned = HookedModel(make_model("gpt2"))
    with pytest.raises(HookError, match="hook_pos_embed has no named batch axis"):
        activation_patching(learned, pairs(1), [{"hook_point": "hook_pos_embed"}])
