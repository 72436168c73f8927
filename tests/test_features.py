"""Principal components and clusters: those that were put there are found, and NumPy's decomposition agrees."""

import json
import threading
import time
from typing import Any

import numpy as np
import pytest

from mlx_hooks import HookError
from mlx_hooks.analysis.features import analyse_features, draw_features, fit_features
from mlx_hooks.analysis.pictures import png
from mlx_hooks.storage.rows import ArrayRows


def grouped(n: int = 600, width: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows around three centres, and which: shares of a half, a third and a sixth."""
    random = np.random.default_rng(seed)
    which = np.repeat([0, 1, 2], [n // 2, n // 3, n - n // 2 - n // 3])
    random.shuffle(which)
    centres = 6 * random.normal(size=(3, width))
    return (centres[which] + random.normal(size=(n, width))).astype(np.float32), which


VALUES, WHICH = grouped()
ROWS = ArrayRows(
    VALUES,
    "blocks.1.hook_resid_post",
    ["d_model"],
    tokens=WHICH * 10 + np.arange(600) % 2,
    position=np.arange(600) % 6 + 1,
)


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    found = fit_features(ROWS, {"n_components": 5})
    centred = VALUES.astype(np.float64) - VALUES.astype(np.float64).mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    shares = singular**2 / (singular**2).sum()
    np.testing.assert_allclose(found.explained_variance, shares[:5], rtol=1e-8)
    np.testing.assert_allclose(np.abs(found.components @ axes[:5].T), np.eye(5), atol=1e-6)
    np.testing.assert_allclose(found.coordinates, centred @ found.components.T, atol=1e-8)
    assert (found.components[np.arange(5), np.abs(found.components).argmax(axis=1)] > 0).all()
    told = analyse_features(ROWS, {"n_components": 5})
    assert told["explained_variance"] == found.explained_variance.tolist()
    np.testing.assert_allclose(told["cumulative"], np.cumsum(shares[:5]), rtol=1e-8)
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize("options", [{}, {"clustering": "hdbscan"}, {"n_clusters": 3}])
def test_the_groups_that_were_put_there_are_found(options: dict[str, Any]) -> None:
    found = fit_features(ROWS, options)
    assert found.labels is not None
    assert np.mean(found.labels == WHICH) > 0.98
    told = analyse_features(ROWS, options, spell=lambda token: f"<{token}>")["clusters"]
    assert told["n_clusters"] == 3
    assert told["silhouette"] > 0.6
    for cluster, size in zip(told["clusters"], (300, 200, 100), strict=True):
        assert cluster["size"] == pytest.approx(size, abs=6)
        own = 10 * cluster["cluster"]
        assert {token["token_id"] for token in cluster["top_tokens"]} == {own, own + 1}
        assert cluster["top_tokens"][0]["token"] in (f"<{own}>", f"<{own + 1}>")
        assert cluster["top_tokens"][0]["lift"] == pytest.approx(600 / size, rel=0.05)
        assert all(WHICH[row["row"]] == cluster["cluster"] for row in cluster["closest"])
    if not options:
        assert max(told["silhouettes"], key=told["silhouettes"].get) == "3"


@pytest.mark.parametrize("n", [10, 16, 17])
def test_components_of_few_rows_are_those_of_a_singular_value_decomposition_too(n: int) -> None:
    # Some rows are there twice: the last directions have no variance, and are across all others still.
    values = np.concatenate([VALUES[: n - 4], VALUES[:4]])
    found = fit_features(ArrayRows(values), {"clustering": "none"})
    centred = values.astype(np.float64) - values.astype(np.float64).mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    count = min(n - 1, 16)
    np.testing.assert_allclose(found.explained_variance, (singular**2 / (singular**2).sum())[:count], atol=1e-12)
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(count), atol=1e-10)
    np.testing.assert_allclose(np.abs((found.components @ axes[:count].T).diagonal())[:5], 1, atol=1e-8)


def test_other_threads_go_on_meanwhile() -> None:
    # A decomposition that held the interpreter would keep a server from answering.
    rows = ArrayRows(np.random.default_rng(0).normal(size=(900, 1000)))
    fit_features(rows, {"max_rows": 20})
    gaps: list[float] = []
    is_done = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not is_done.wait(0.002):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    fit_features(rows, {"clustering": "none"})
    taken = time.perf_counter() - start
    is_done.set()
    ticker.join()
    assert max(gaps) < taken / 2


def test_there_are_no_more_components_than_rows_allow() -> None:
    assert analyse_features(ArrayRows(VALUES[:4]))["n_components"] == 3
    assert analyse_features(ArrayRows(VALUES))["n_components"] == 16
    assert analyse_features(ArrayRows(VALUES), {"n_components": 2})["n_components"] == 2
    two = analyse_features(ArrayRows(VALUES[:2]))
    assert two["explained_variance"] == [pytest.approx(1)]
    assert two["clusters"] is None
    assert "too few different rows" in two["notes"][0]


def test_rows_that_are_all_the_same_have_no_components() -> None:
    # Float32's rounding of a mean is no variance.
    found = analyse_features(ArrayRows(np.full((40, 3), 0.1, np.float32)))
    assert (found["n_components"], found["explained_variance"], found["clusters"]) == (0, [], None)
    assert "All rows are the same" in found["notes"][0]
    draw_features(found)


def test_many_rows_are_sampled_and_a_seed_tells_it_again() -> None:
    options = {"max_rows": 200, "seed": 4}
    found = analyse_features(ROWS, options)
    assert (found["rows"], found["rows_used"]) == (600, 200)
    assert "Of 600 rows 200 were drawn" in found["notes"][0]
    assert analyse_features(ROWS, options) == found
    rows = fit_features(ROWS, options).indices
    assert len(np.unique(rows)) == 200
    assert fit_features(ROWS, options | {"seed": 5}).indices.tolist() != rows.tolist()


def test_the_first_token_is_named_where_it_is_what_varies() -> None:
    position = np.arange(600) % 6
    values = VALUES.copy()
    values[position == 0] += 500
    rows = ArrayRows(values, "x", position=position)
    assert "Rows at position 0 make up" in analyse_features(rows)["notes"][0]
    kept = analyse_features(rows, {"skip_positions": 1})
    assert kept["notes"] == []
    np.testing.assert_allclose(
        kept["explained_variance"], analyse_features(ArrayRows(VALUES[position > 0]))["explained_variance"]
    )
    with pytest.raises(HookError, match="Fewer than 2 rows"):
        analyse_features(rows, {"skip_positions": 6})


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ArrayRows(np.ones((1, 3))), {}, "at least 2 rows, got 1"),
        (ArrayRows(np.ones((4, 2, 3)), "p", ["head", "key"]), {}, "holds attention over keys"),
        (ArrayRows(np.array([[1.0], [np.inf]]), "x"), {}, "x are not finite in 1 of 2 rows, the first at row 1."),
        (ROWS, {"clustering": "dbscan"}, "clustering must be 'kmeans', 'hdbscan' or 'none', got 'dbscan'"),
        (ROWS, {"n_clusters": 1}, "n_clusters must be greater than or equal to 2"),
    ],
)
def test_what_cannot_be_analysed_is_refused(rows: ArrayRows, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        analyse_features(rows, options)


def test_rows_that_are_not_finite_are_named() -> None:
    values, step = VALUES.copy(), np.repeat([0, 200, 400], 200)
    values[450:453, 3] = np.nan
    rows = ArrayRows(values, "x", position=np.arange(600) % 6, step=step)
    message = (
        r"x are not finite in 3 of 600 rows, the first at step 400, position 0, row 450; other steps than 400 can be"
    )
    with pytest.raises(HookError, match=message):
        analyse_features(rows, {"max_rows": 590})
    values[::200] = np.inf
    with pytest.raises(HookError, match=r"in 6 of 600 rows, the first at step 0, position 0, row 0\.$"):
        analyse_features(ArrayRows(values, "x", position=np.arange(600) % 6, step=step))


@pytest.mark.parametrize("options", [{}, {"clustering": "none"}, {"n_components": 1}])
def test_the_picture_is_drawn(options: dict[str, Any]) -> None:
    seen: list[tuple[int, int]] = []
    ((title, figure),) = draw_features(analyse_features(ROWS, options, lambda *done: seen.append(done)))
    assert title == "Components and clusters"
    assert png(figure).startswith(b"\x89PNG")
    assert seen[-1] == (3, 3)
