"""Path patching against a forward pass in NumPy, and on models whose paths are known; estimates of sweeps."""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from graph_reference import GraphReference

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.circuits.attribution_patching import attribution_patching
from mlx_hooks.analysis.circuits.edge_runs import EdgeRuns
from mlx_hooks.analysis.circuits.patching import PatchingOptions, activation_patching, draw_patching, grid_of
from mlx_hooks.analysis.circuits.path_patching import path_patching
from mlx_hooks.analysis.eval_data import eval_data_of
from mlx_hooks.analysis.known_models import KnownIndirectObject, KnownInduction, KnownLinear
from mlx_hooks.analysis.pictures import png

PAIRS = [
    {"clean": [5, 9, 2, 31, 7], "corrupted": [5, 9, 3, 30, 7], "answer": 11, "wrong": 12},
    {"clean": [1, 8, 22, 3, 40], "corrupted": [2, 8, 21, 3, 41], "answer": 10, "wrong": 9},
]
RECEIVERS: list[Any] = ["L1H2<q>", "L1 mlp", "L2H0", ["L2 mlp", "logits"]]


def edges_to(receiver: Any, grouped: bool) -> list[str]:
    """The inputs behind the receivers above, as the oracle calls them."""
    kv = "KV0" if grouped else "H0"
    if receiver == "L2H0":
        return ["L2H0<q>", f"L2{kv}<k>", f"L2{kv}<v>"]
    return [receiver] if isinstance(receiver, str) else receiver


def difference(logits: np.ndarray) -> np.ndarray:
    return np.array([row[-1, pair["answer"]] - row[-1, pair["wrong"]] for row, pair in zip(logits, PAIRS, strict=True)])


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_paths_are_those_of_an_independent_forward_pass(model: HookedModel, direction: str) -> None:
    found = path_patching(model, PAIRS, RECEIVERS, direction=direction)
    oracle = GraphReference(model.model)
    sides = [[pair[which] for pair in PAIRS] for which in ("clean", "corrupted")]
    base, source = sides if direction == "noising" else sides[::-1]
    instead, _ = oracle.run_with(source)
    senders, receivers = found.axes["sender"], found.axes["receiver"]
    assert receivers == ("L1H2<q>", "L1 mlp", "L2H0", "L2 mlp + logits")
    assert senders == tuple(instead)
    order = list(instead)
    for i, sender in enumerate(senders):
        for j, receiver in enumerate(RECEIVERS):
            reads = [r for r in edges_to(receiver, oracle.n_kv < oracle.n_heads) if _is_before(sender, r, order)]
            values = found.patched[:, i, j]
            if not reads:
                assert np.isnan(values).all()
                continue
            _, logits = oracle.run_with(base, {f"{sender}->{r}": instead[sender] for r in reads})
            np.testing.assert_allclose(values, difference(logits), rtol=2e-4, atol=2e-4, err_msg=f"{sender} {receiver}")
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["effects"][order.index("L2 mlp")][:3] == [None, None, None]
    assert told["sweep"] == "path"


def _is_before(sender: str, receiver: str, order: list[str]) -> bool:
    """Whether a node writes before an input reads; heads of a layer are before its MLP."""
    if receiver == "logits":
        return True
    reader = receiver.split("<")[0].replace("KV", "H")
    layer = int(reader[1])
    before = [name for name in order if name == "embed" or int(name[1]) < layer]
    if reader.endswith("mlp"):
        before += [name for name in order if name.startswith(f"L{layer}H")]
    return sender in before


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_how_many_prompts_run_together_changes_nothing(
    llama: HookedModel, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"senders": ["L0H1", "L1 mlp"], "direction": direction, "metric": "kl"}
    together = path_patching(llama, PAIRS, RECEIVERS, **options)
    # Prompts of one length, which so long ones would leave alone.
    monkeypatch.setattr(EdgeRuns, "_examples_at_once", lambda runs: 1)
    alone = path_patching(llama, PAIRS, RECEIVERS, **options)
    np.testing.assert_allclose(alone.patched, together.patched, rtol=1e-4, atol=1e-6)
    assert np.nanmax(np.abs(together.patched)) > 1e-3


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_known_paths_are_1_and_all_others_0(direction: str) -> None:
    known = KnownIndirectObject()
    (_, duplicate), (_, inhibition), (_, mover) = known.circuit_heads
    ways = [
        (f"L0H{duplicate}", f"L1H{inhibition}<v>"),
        (f"L1H{inhibition}", f"L2H{mover}<q>"),
        (f"L2H{mover}", "logits"),
        ("embed", f"L0H{duplicate}<q>"),
    ]
    data = known.pairs(5, kind="giver")
    found = path_patching(known.hooked(), data, [receiver for _, receiver in ways], direction=direction)
    meant = np.where(np.isnan(found.effects), np.nan, 0.0)
    for i, sender in enumerate(found.axes["sender"]):
        for j, receiver in enumerate(found.axes["receiver"]):
            if (sender, receiver) in ways:
                meant[i, j] = 1
    np.testing.assert_allclose(found.effects, meant, atol=1e-4)


def test_the_induction_head_hears_of_the_token_before_through_its_keys_alone() -> None:
    known = KnownInduction()
    previous, induction = f"L0H{known.previous_head}", f"L1H{known.induction_head}"
    receivers = [f"{induction}<{kind}>" for kind in "qkv"]
    found = path_patching(known.hooked(), known.pairs(5, kind="match"), receivers, senders=[previous, "embed"])
    np.testing.assert_allclose(found.effects, [[0, 1, 0], [0, 0, 0]], atol=1e-4)
    for metric in ("kl", "probability", "loss"):
        options = {"senders": [previous], "direction": "denoising", "metric": metric}
        back = path_patching(known.hooked(), known.pairs(5, kind="match"), receivers, **options)
        np.testing.assert_allclose(back.effects, [[0, 1, 0]], atol=1e-4)


def test_progress_and_pictures(llama: HookedModel) -> None:
    seen: list[tuple[int, int]] = []
    found = path_patching(llama, PAIRS, "L2 mlp", progress=lambda *at: seen.append(at))
    # Two baselines, what is put in, and all senders in one pass.
    assert seen == [(i, 4) for i in range(1, 5)]
    ((title, made),) = draw_patching(found)
    assert title == "Path patching"
    assert png(made).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("receivers", "options", "message"),
    [
        ([], {}, "receivers is empty"),
        ([[]], {}, "receivers is empty"),
        (5, {}, "receivers are inputs and lists of them, by name, got 5"),
        (["L1H0", 5], {}, "receivers are inputs and lists of them"),
        ("L9 mlp", {}, "no input 'L9 mlp'"),
        ("embed", {}, "no input 'embed'"),
        ("logits", {"senders": ["L0H7"]}, "no node 'L0H7'"),
        ("L0 mlp", {"senders": ["L1H0", "L2 mlp"]}, "None of L1H0, L2 mlp is before any of L0 mlp"),
        ("logits", {"direction": "up"}, "direction must be"),
        ("logits", {"ablation": "zero"}, "PathOptions has no field 'ablation'"),
    ],
)
def test_what_is_no_path_is_told(llama: HookedModel, receivers: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        path_patching(llama, PAIRS, receivers, **options)


# Attribution patching.


SWEEPS: list[dict[str, Any]] = [
    {"sweep": "layer x position"},
    {"sweep": "layer x position", "component": "attn_out"},
    {"sweep": "layer x head x position"},
    {"sweep": "layer x head", "component": "v"},
    {"sweep": "component"},
    {"sweep": [{"hook_point": "blocks.0.attn.hook_z", "positions": [1, 3], "heads": [0, 1]}]},
]


@pytest.mark.parametrize("options", SWEEPS, ids=["stream", "attn_out", "heads", "v", "components", "cell"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_estimates_of_a_linear_model_are_exact(options: dict[str, Any], direction: str) -> None:
    model = KnownLinear().hooked()
    data = [
        {"clean": [1, 2, 3, 4, 5], "corrupted": [1, 9, 3, 8, 5], "answer": 6, "wrong": 7},
        {"clean": [3, 1, 2, 11], "corrupted": [3, 10, 9, 11], "answer": 5, "wrong": 9},
    ]
    own = {"align": "end"} if "position" in str(options["sweep"]) and isinstance(options["sweep"], str) else {}
    estimated = attribution_patching(model, data, **options, **own, direction=direction)
    exact = activation_patching(model, data, **options, **own, direction=direction)
    np.testing.assert_allclose(estimated.patched, exact.patched, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(estimated.effects, exact.effects, atol=1e-5)
    assert np.abs(exact.effects).max() > 0.01
    assert (estimated.axes, estimated.sweep) == (exact.axes, exact.sweep)
    assert estimated.is_estimate
    assert not exact.is_estimate


def test_estimates_are_the_metric_s_slope(model: HookedModel) -> None:
    # A part of the way to the other run, from runs of their own: what is estimated is the whole way by the first step.
    data = eval_data_of(model, PAIRS)
    options = {"sweep": "layer x head x position", "component": "z"}
    estimated = attribution_patching(model, data, **options)
    batch = next(data.batches(8))
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    own, other = (model.run_with_cache(tokens, names)[1] for tokens in (batch.corrupted, batch.tokens))
    share = 2e-2
    for place, cell in list(grid_of(model, data, PatchingOptions(**options)).cells.items())[::7]:
        (name,) = cell.hook_points
        ends = []
        for step in (share, -share):
            moved = own[name] + step * (other[name] - own[name])
            limits = {"heads": list(cell.heads or ()), "positions": list(cell.positions or ())}
            with model.intervening([{"hook_point": name, "type": "patch", "source": moved, **limits}]):
                ends.append(difference(np.array(model(batch.corrupted))))
        slope = (ends[0] - ends[1]) / (2 * share)
        change = estimated.patched[(slice(None), *place)] - estimated.corrupted
        np.testing.assert_allclose(change, slope, atol=2e-3, rtol=2e-2, err_msg=str(cell))


def test_scores_that_are_masked_in_both_runs_change_nothing(llama: HookedModel) -> None:
    found = attribution_patching(llama, PAIRS, "layer x head", component="attn_scores")
    assert np.isfinite(found.patched).all()
    # A score's gradient is that of the softmax: what the rows of a part of the way give, head by head.
    data, share, name = eval_data_of(llama, PAIRS), 1e-2, "blocks.1.attn.hook_attn_scores"
    batch = next(data.batches(8))
    own, other = (llama.run_with_cache(tokens, name)[1][name] for tokens in (batch.corrupted, batch.tokens))
    for head in range(4):
        ends = []
        for way in (share, -share):
            step = mx.where(own == other, 0.0, other - own) * way
            add = {"hook_point": name, "type": "patch", "source": own + step, "heads": head}
            with llama.intervening([add]):
                ends.append(difference(np.array(llama(batch.corrupted))))
        change = found.patched[:, 1, head] - found.corrupted
        np.testing.assert_allclose(change, (ends[0] - ends[1]) / (2 * share), atol=2e-3, rtol=2e-2)
    assert np.abs(found.patched - found.corrupted[:, None, None]).max() > 0.01


def test_what_has_no_gradient_is_told(llama: HookedModel) -> None:
    with pytest.raises(HookError, match="gradient of kl at the clean run is 0: .* denoising, another metric") as raised:
        attribution_patching(llama, PAIRS, metric="kl", direction="noising")
    assert raised.value.field == "metric"
    assert np.abs(attribution_patching(llama, PAIRS, metric="kl").effects).max() > 0.01
    with pytest.raises(HookError, match="embed.hook_in holds mlx.core.int"):
        attribution_patching(llama, PAIRS, [{"hook_point": "embed.hook_in"}])
    with pytest.raises(HookError, match="A place is estimated at one hook point, got blocks.0.hook_attn_out and"):
        attribution_patching(llama, PAIRS, "component", components=["blocks"])
    assert draw_patching(attribution_patching(llama, PAIRS))[0][0] == "Attribution patching"
