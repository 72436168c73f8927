"""The directions in which a layer's activations vary most, and the groups that they fall into.

Principal components are NumPy's, in float64: SciPy's decompositions hold all other threads of the process up.
Clusters are scikit-learn's k-means or HDBSCAN on the coordinates along them.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ..errors import HookError
from ..options import options, options_of
from ..storage.rows import RowPart, Rows
from .progress import Progress
from .threads import one_thread
from .top_rows import Spell, check_vectors, finite, from_position, told_row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STEPS = 3
"""Loading, components, clusters: what progress counts."""
_ROUNDING = 1e-6
"""Of the size of the rows: what they differ by no more than this in, they do not differ in."""
_CHOICES = range(2, 9)
"""Numbers of clusters among which the silhouette chooses."""
_SILHOUETTE_ROWS = 2000
_MUCH = 0.3
"""The share of the variance from which on the first positions are spoken of."""
_POINTS = 1000
"""Rows that the picture shows."""
_CLOSEST = 5
"""Rows next to a cluster's centre that are told."""


@options
class FeatureOptions:
    """Options of :func:`analyse_features`.

    Args:
        n_components: the most principal components; there are no more than dimensions, and fewer than rows.
        max_rows: of more rows so many are drawn.
        skip_positions: the first so many positions of each sequence are left out of those that are drawn.
        clustering: "kmeans", "hdbscan" (which leaves out what belongs nowhere) or "none".
        n_clusters: of k-means; None for the number, 2 to 8, with the highest silhouette.
        min_cluster_size: of HDBSCAN; None for a fiftieth of the rows, at least 5.
        top_tokens: tokens that are told of each cluster.
        seed: of what is drawn, and of where k-means begins.
    """

    n_components: Annotated[int, Field(ge=1)] = 50
    max_rows: Annotated[int, Field(ge=2)] = 10_000
    skip_positions: Annotated[int, Field(ge=0)] = 0
    clustering: Literal["kmeans", "hdbscan", "none"] = "kmeans"
    n_clusters: Annotated[int, Field(ge=2)] | None = None
    min_cluster_size: Annotated[int, Field(ge=2)] | None = None
    top_tokens: Annotated[int, Field(ge=0)] = 5
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


@dataclass(frozen=True, eq=False)
class Features:
    """What :func:`fit_features` found.

    Args:
        layer: the hook point's name.
        n_rows: rows there are; ``indices`` are those that were looked at, [row].
        mean: [width].
        components: [component, width], of length 1 each, the largest variance first. A component's sign is such that
            its largest number is positive.
        explained_variance: each component's share of the variance, [component].
        coordinates: of the rows along the components, [row, component].
        labels: each row's cluster, the largest is 0; -1 for none, [row]. None where none were looked for.
        silhouette: from -1 to 1, how much closer rows are to their own cluster than to the next; None without clusters.
        silhouettes: of the numbers of clusters that were tried.
        notes: what else is to be known.
    """

    layer: str
    n_rows: int
    indices: np.ndarray
    mean: np.ndarray
    components: np.ndarray
    explained_variance: np.ndarray
    coordinates: np.ndarray
    labels: np.ndarray | None = None
    silhouette: float | None = None
    silhouettes: dict[int, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def analyse_features(
    rows: Rows, options: FeatureOptions | dict | None = None, progress: Progress = None, spell: Spell = None
) -> dict[str, Any]:
    """Principal components and clusters of a layer's activations, as plain JSON values.

        found = analyse_features(ShardReader("mechint_cache").rows("blocks.2.hook_resid_post"))
        sum(found["explained_variance"][:10]), found["n_components"]
        found["clusters"]["clusters"][0]["top_tokens"]

    The components themselves, which are large, are :func:`fit_features`'s.

    Returns:
        ``explained_variance`` holds each component's share of the variance, ``cumulative`` their sums; of each cluster
        its ``size``, the tokens that are most typical of it (``lift``: how many times as often as in all rows) and the
        rows next to its centre; ``projection`` some rows along the first two components, for pictures.

    Raises:
        HookError: for fewer than two rows, attention patterns, and activations that are not finite.
    """
    chosen = options_of(FeatureOptions, options)
    part, found = _fitted(rows, chosen, progress)
    shares = found.explained_variance
    return {
        "layer": found.layer,
        "rows": found.n_rows,
        "rows_used": len(found.indices),
        "width": rows.width,
        "n_components": len(shares),
        "explained_variance": shares.tolist(),
        "cumulative": np.cumsum(shares).tolist(),
        "clusters": None if found.labels is None else _told_clusters(part, found, chosen, spell),
        "projection": _projection(found, chosen.seed),
        "notes": list(found.notes),
    }


def fit_features(rows: Rows, options: FeatureOptions | dict | None = None, progress: Progress = None) -> Features:
    """Principal components and clusters of a layer's activations, as arrays; see :func:`analyse_features`."""
    return _fitted(rows, options_of(FeatureOptions, options), progress)[1]


def _fitted(rows: Rows, chosen: FeatureOptions, progress: Progress) -> tuple[RowPart, Features]:
    check_vectors(rows)
    if len(rows) < 2:
        raise HookError(f"Principal components need at least 2 rows, got {len(rows)}.")

    def advance(step: int) -> None:
        if progress is not None:
            progress(step, _STEPS)

    # In stored order, so that the rows drawn can be told.
    drawn = np.random.default_rng(chosen.seed).choice(len(rows), min(chosen.max_rows, len(rows)), replace=False)
    indices = np.sort(drawn)
    part = rows.take(indices)
    kept = from_position(part, chosen.skip_positions)
    indices, part = indices[kept], part.at(kept)
    if len(part) < 2:
        raise HookError(
            f"Fewer than 2 rows are behind the first {chosen.skip_positions} positions.", field="skip_positions"
        )
    values = finite(part, rows).astype(np.float64)
    advance(1)
    mean = values.mean(axis=0)
    notes = [] if len(rows) <= chosen.max_rows else [f"Of {len(rows)} rows {chosen.max_rows} were drawn."]
    notes += _first_positions(part, values, mean)
    count = min(chosen.n_components, rows.width, len(values) - 1)
    if np.abs(values - mean).max() <= _ROUNDING * np.abs(values).max():
        nothing = np.zeros((0, rows.width))
        notes.append("All rows are the same: there are no components and no clusters.")
        advance(_STEPS)
        return part, Features(
            rows.name, len(rows), indices, mean, nothing, np.zeros(0), np.zeros((len(values), 0)), notes=tuple(notes)
        )
    components, shares = _principal(values - mean, count)
    coordinates = (values - mean) @ components.T
    advance(2)
    labels, silhouette, tried = _clusters(coordinates, chosen)
    if chosen.clustering != "none" and labels is None:
        notes.append("There are too few different rows for clusters.")
    advance(_STEPS)
    found = (components, shares, coordinates, labels, silhouette, tried, tuple(notes))
    return part, Features(rows.name, len(rows), indices, mean, *found)


def _principal(centred: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Components [component, width] of rows [row, width] and their shares of the variance, the largest first."""
    # Of the covariance, or of what has the same variances and is smaller.
    by_row = len(centred) < centred.shape[1]
    variances, vectors = np.linalg.eigh(centred @ centred.T if by_row else centred.T @ centred)
    largest = vectors[:, ::-1][:, :count]
    # What has no variance has no direction of its own either: QR gives it one across all others.
    components = np.linalg.qr(centred.T @ largest)[0].T if by_row else largest.T
    signs = np.sign(components[np.arange(count), np.abs(components).argmax(axis=1)])
    shares = np.maximum(variances[::-1], 0)
    return components * signs[:, None], shares[:count] / shares.sum()


def _first_positions(part: RowPart, values: np.ndarray, mean: np.ndarray) -> list[str]:
    """What is to be said where the first tokens make up most of the variance."""
    if part.position is None or not (part.position == 0).any():
        return []
    distance = np.square(values - mean).sum(axis=1)
    share = distance[part.position == 0].sum() / max(distance.sum(), np.finfo(np.float64).tiny)
    if share < _MUCH:
        return []
    return [
        f"Rows at position 0 make up {share:.0%} of the variance: the first components tell the first token from all "
        "others. skip_positions leaves it out."
    ]


def _clusters(
    coordinates: np.ndarray, chosen: FeatureOptions
) -> tuple[np.ndarray | None, float | None, dict[int, float]]:
    """The clusters [row], their silhouette, and those of the numbers of clusters that were tried."""
    n_different = len(np.unique(np.round(coordinates / np.abs(coordinates).max(), 6), axis=0))
    if chosen.clustering == "none" or n_different < 3:
        return None, None, {}
    if chosen.clustering == "hdbscan":
        from sklearn.cluster import HDBSCAN

        smallest = chosen.min_cluster_size or max(5, len(coordinates) // 50)
        labels = HDBSCAN(min_cluster_size=min(smallest, len(coordinates)), copy=True).fit_predict(coordinates)
        return _by_size(labels), _silhouette(coordinates, labels, chosen.seed), {}
    asked = [chosen.n_clusters] if chosen.n_clusters is not None else list(_CHOICES)
    found: dict[int, tuple[float, np.ndarray]] = {}
    for count in (min(number, n_different - 1) for number in asked):
        if count not in found:
            labels = _k_means(coordinates, count, chosen.seed)
            score = _silhouette(coordinates, labels, chosen.seed)
            found[count] = (-1.0 if score is None else score, labels)
    best = max(found, key=lambda count: found[count][0])
    return _by_size(found[best][1]), found[best][0], {count: score for count, (score, _) in found.items()}


def _k_means(coordinates: np.ndarray, count: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    with one_thread():
        return np.asarray(KMeans(count, n_init=4, random_state=seed).fit_predict(coordinates))


def _silhouette(coordinates: np.ndarray, labels: np.ndarray, seed: int) -> float | None:
    """Of the rows that are in a cluster; of many, so many drawn."""
    from sklearn.metrics import silhouette_score

    inside = np.flatnonzero(labels >= 0)
    if len(inside) > _SILHOUETTE_ROWS:
        inside = np.random.default_rng(seed).choice(inside, _SILHOUETTE_ROWS, replace=False)
    if not 1 < len(np.unique(labels[inside])) < len(inside):
        return None
    return float(silhouette_score(coordinates[inside], labels[inside]))


def _by_size(labels: np.ndarray) -> np.ndarray:
    """The labels with the largest cluster as 0; -1 stays."""
    names, counts = np.unique(labels[labels >= 0], return_counts=True)
    order = {int(name): i for i, name in enumerate(names[np.argsort(-counts, kind="stable")])}
    return np.array([order.get(int(label), -1) for label in labels])


def _told_clusters(part: RowPart, found: Features, chosen: FeatureOptions, spell: Spell) -> dict[str, Any]:
    labels = found.labels
    assert labels is not None
    told = []
    for cluster in range(labels.max() + 1):
        members = np.flatnonzero(labels == cluster)
        centre = found.coordinates[members].mean(axis=0)
        near = members[np.argsort(np.square(found.coordinates[members] - centre).sum(axis=1), kind="stable")]
        told.append(
            {
                "cluster": cluster,
                "size": len(members),
                "share": len(members) / len(labels),
                "top_tokens": _typical(part.tokens, members, chosen.top_tokens, spell),
                "closest": [told_row(part, int(at), int(found.indices[at]), spell) for at in near[:_CLOSEST]],
            }
        )
    return {
        "method": chosen.clustering,
        "n_clusters": len(told),
        "silhouette": found.silhouette,
        "silhouettes": {str(count): score for count, score in found.silhouettes.items()},
        "left_out": int((labels < 0).sum()),
        "clusters": told,
    }


def _typical(tokens: np.ndarray | None, members: np.ndarray, count: int, spell: Spell) -> list[dict[str, Any]]:
    """The tokens of a cluster that say most about it: the largest of count x log(lift)."""
    if tokens is None:
        return []
    ids, counts = np.unique(tokens[members], return_counts=True)
    known, everywhere = np.unique(tokens, return_counts=True)
    lift = (counts / len(members)) / (everywhere[np.searchsorted(known, ids)] / len(tokens))
    order = np.lexsort((ids, -counts * np.log(lift)))[:count]
    return [
        {
            "token_id": int(ids[at]),
            "token": spell(int(ids[at])) if spell is not None else None,
            "count": int(counts[at]),
            "lift": float(lift[at]),
        }
        for at in order
    ]


def _projection(found: Features, seed: int) -> dict[str, Any] | None:
    if not len(found.components):
        return None
    at = np.arange(len(found.coordinates))
    if len(at) > _POINTS:
        at = np.sort(np.random.default_rng(seed).choice(at, _POINTS, replace=False))
    points = found.coordinates[at, :2]
    if points.shape[1] == 1:
        points = np.pad(points, [(0, 0), (0, 1)])
    return {
        "rows": found.indices[at].tolist(),
        "points": [[float(f"{x:.6g}") for x in point] for point in points],
        "clusters": None if found.labels is None else found.labels[at].tolist(),
    }


def draw_features(result: dict[str, Any]) -> list[tuple[str, "Figure"]]:
    """The shares of variance, and rows along the first two components in the colours of their clusters."""
    from .charts import COLOURS, FAINT, figure

    made, (left, right) = figure("Principal components of " + (result["layer"] or "the layer"), 2)
    shares, cumulative = result["explained_variance"], result["cumulative"]
    numbers = range(1, len(shares) + 1)
    left.bar(numbers, shares, color=COLOURS[0], alpha=0.6, label="each")
    left.plot(numbers, cumulative, color=COLOURS[1], marker=".", markersize=4, linewidth=1, label="together")
    left.set_ylim(0, 1.02)
    left.set_xlabel("component", fontsize=9)
    left.set_ylabel("share of the variance", fontsize=9)
    left.legend(fontsize=8, frameon=False, loc="center right")
    shown = result["projection"]
    if shown is not None:
        points = np.array(shown["points"])
        clusters = np.array(shown["clusters"] if shown["clusters"] is not None else [0] * len(points))
        for cluster in np.unique(clusters):
            colour = COLOURS[cluster % len(COLOURS)] if cluster >= 0 else FAINT
            own = points[clusters == cluster]
            name = f"cluster {cluster}" if cluster >= 0 else "none"
            right.scatter(own[:, 0], own[:, 1], s=8, color=colour, alpha=0.6, linewidths=0, label=name)
        if shown["clusters"] is not None:
            right.legend(fontsize=7, frameon=False, markerscale=2, loc="upper right")
    right.set_xlabel("component 1", fontsize=9)
    right.set_ylabel("component 2", fontsize=9)
    return [("Components and clusters", made)]
