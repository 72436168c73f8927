"""Neuron statistics: what NumPy says of all rows at once, and the rows that were put there."""

import json
from typing import Any

import numpy as np
import pytest

from mlx_hooks import HookError
from mlx_hooks.analysis.neurons import analyse_neurons, draw_neurons
from mlx_hooks.analysis.pictures import png
from mlx_hooks.storage.rows import ArrayRows

RANDOM = np.random.default_rng(0)
VALUES = RANDOM.normal(size=(1000, 6)).astype(np.float32) + np.array([0, 0.5, 1000, -8, 0, 0], np.float32)
VALUES[:, 4] = -np.abs(VALUES[:, 4])
VALUES[:, 5] = np.where(np.arange(1000) < 5, 3, 0)
LABELS = {
    "tokens": np.arange(1000) % 50,
    "sequence": np.arange(1000) // 10,
    "position": np.arange(1000) % 10,
    "step": np.full(1000, 7),
    "rank": np.zeros(1000),
    "session": np.zeros(1000),
}
ROWS = ArrayRows(VALUES, "blocks.0.mlp.hook_post", ["d_mlp"], **LABELS)


@pytest.mark.parametrize("size", [1, 64, 333, 5000])
def test_statistics_are_those_of_all_rows_whatever_the_parts(size: int) -> None:
    found = analyse_neurons(ROWS, {"part_size": size})
    exact = VALUES.astype(np.float64)
    for name, expected in {
        "mean_activation": exact.mean(axis=0),
        "max_activation": exact.max(axis=0),
        # The third neuron's mean is a thousand times its deviation.
        "std": exact.std(axis=0),
        "mean_abs": np.abs(exact).mean(axis=0),
        "firing_rate": (exact > 0).mean(axis=0),
        "sparsity": (exact > 0).mean(axis=0),
        "zero_fraction": (exact <= 0).mean(axis=0),
    }.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-9, err_msg=name)
    assert found["max_activation"][3] < 0 or exact[:, 3].max() > 0
    assert (found["n_dead"], found["dead_neurons"]) == (2 - (exact[:, 3].max() > 0), [3, 4][-found["n_dead"] :])
    assert found["rare_neurons"] == sorted({*found["dead_neurons"], 5})
    assert found["notes"] == []
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("size", [1, 64, 5000])
def test_top_tokens_are_the_rows_with_the_highest_activations(size: int) -> None:
    found = analyse_neurons(ROWS, {"part_size": size, "top_tokens": 3}, lambda token: f"<{token}>")
    for neuron in range(6):
        told = found["top_tokens"][neuron]
        assert told["neuron"] == neuron
        order = np.lexsort((np.arange(1000), -VALUES[:, neuron]))[:3]
        assert [row["row"] for row in told["tokens"]] == order.tolist()
        for row, at in zip(told["tokens"], order, strict=True):
            assert row == {
                "activation": float(VALUES[at, neuron]), "row": at, "token_id": at % 50, "token": f"<{at % 50}>",
                "sequence": at // 10, "position": at % 10, "step": 7,
            }  # fmt: skip


@pytest.mark.parametrize("size", [7, 64, 5000])
def test_of_equal_activations_the_earlier_rows_are_told(size: int) -> None:
    values = np.zeros((300, 2), np.float32)
    values[:, 1] = np.random.default_rng(0).integers(0, 3, size=300)
    found = analyse_neurons(ArrayRows(values), {"part_size": size, "top_tokens": 40})["top_tokens"]
    assert [row["row"] for row in found[0]["tokens"]] == list(range(40))
    assert [row["row"] for row in found[1]["tokens"]] == np.flatnonzero(values[:, 1] == 2)[:40].tolist()


def test_only_the_strongest_neurons_tell_their_tokens() -> None:
    found = analyse_neurons(ROWS, {"top_neurons": 2, "top_tokens": 1})
    strongest = np.sort(np.argsort(-VALUES.max(axis=0))[:2])
    assert [told["neuron"] for told in found["top_tokens"]] == strongest.tolist()
    assert analyse_neurons(ROWS, {"top_tokens": 0})["top_tokens"] == []


def test_the_first_positions_can_be_left_out() -> None:
    found = analyse_neurons(ROWS, {"skip_positions": 1, "part_size": 37})
    kept = VALUES[LABELS["position"] > 0].astype(np.float64)
    assert found["rows"] == 900
    np.testing.assert_allclose(found["mean_activation"], kept.mean(axis=0), rtol=1e-9)
    assert all(row["position"] > 0 for told in found["top_tokens"] for row in told["tokens"])
    at = found["top_tokens"][1]["tokens"][0]
    assert VALUES[at["row"], 1] == np.float32(at["activation"]) == kept[:, 1].max()
    with pytest.raises(HookError, match="No row is behind the first 10 positions"):
        analyse_neurons(ROWS, {"skip_positions": 10})
    with pytest.raises(HookError, match="skip_positions needs the rows' positions"):
        analyse_neurons(ArrayRows(VALUES), {"skip_positions": 1})


def test_a_threshold_moves_what_counts_as_firing() -> None:
    found = analyse_neurons(ROWS, {"threshold": 1000.0})
    np.testing.assert_allclose(found["firing_rate"], (VALUES > 1000).mean(axis=0))
    assert found["dead_neurons"] == [0, 1, 3, 4, 5]


def test_dimensions_of_a_stream_are_called_what_they_are() -> None:
    found = analyse_neurons(ArrayRows(VALUES, "blocks.0.hook_resid_post", ["d_model"]))
    assert "no neurons" in found["notes"][0]
    assert found["top_tokens"][0]["tokens"][0].keys() == {"activation", "row"}
    heads = ArrayRows(VALUES.reshape(1000, 2, 3), "blocks.0.attn.hook_z", ["head", "d_head"])
    found = analyse_neurons(heads)
    assert (found["shape"], found["axes"], len(found["std"])) == ([2, 3], ["head", "d_head"], 6)


def test_progress_comes_to_its_end() -> None:
    seen: list[tuple[int, int]] = []
    analyse_neurons(ROWS, {"part_size": 400}, progress=lambda *done: seen.append(done))
    assert seen == [(400, 1000), (800, 1000), (1000, 1000)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ArrayRows(np.ones((4, 2, 3)), "blocks.0.attn.hook_pattern", ["head", "key"]), {}, "holds attention over keys"),
        (ArrayRows(np.array([[1.0], [np.nan]]), "x"), {}, "The activations of x are not finite"),
        (ROWS, {"top_token": 1}, "NeuronOptions has no field 'top_token'"),
        (ROWS, {"rare_below": 2.0}, "rare_below must be less than or equal to 1"),
    ],
)
def test_what_cannot_be_analysed_is_refused(rows: ArrayRows, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        analyse_neurons(rows, options)


def test_the_picture_is_drawn() -> None:
    (title, figure), *others = draw_neurons(analyse_neurons(ROWS))
    assert (title, others) == ("Firing rates and activations", [])
    assert png(figure).startswith(b"\x89PNG")
    # All neurons alike.
    draw_neurons(analyse_neurons(ArrayRows(np.zeros((3, 2)))))
