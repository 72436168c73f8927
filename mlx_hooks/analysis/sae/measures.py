"""How good a sparse autoencoder is, measured on rows: what it leaves unexplained, how few latents it uses, on which
rows they fire most. Sums are float64."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...storage.rows import Rows
from ..top_rows import TopRows
from .autoencoder import SparseAutoencoder

_PART = 1024
"""Rows that are read at a time; their activations are [row, d_sae]."""


@dataclass(frozen=True, eq=False)
class Measures:
    """What was measured on some rows.

    Args:
        n_rows: how many rows.
        squared_error: the mean of |x - read back|^2.
        fvu: the fraction of variance unexplained: the sum of |x - read back|^2 over that of |x - mean|^2; None where
            the rows do not vary.
        l0: the mean number of latents that fire on a row.
        l1: the mean of the sum of activations on a row.
        firing_rate: [d_sae], the fraction of rows on which a latent fires.
        mean_activation: [d_sae], over all rows.
        max_activation: [d_sae].
        top: the rows on which each latent fires most; there is 0 among the values of one that fires on fewer.
    """

    n_rows: int
    squared_error: float
    fvu: float | None
    l0: float
    l1: float
    firing_rate: np.ndarray
    mean_activation: np.ndarray
    max_activation: np.ndarray
    top: TopRows

    @property
    def dead(self) -> np.ndarray:
        """[d_sae], latents that fired on no row."""
        return self.firing_rate == 0


def measure_sae(sae: SparseAutoencoder, rows: Rows, *, top: int = 1) -> Measures:
    """Measure an autoencoder on rows, reading them part by part.

    Args:
        rows: at least one.
        top: rows to find for each latent.
    """
    n, d_sae = len(rows), sae.d_sae
    error, centre = 0.0, None
    total, squares = np.zeros(rows.width), 0.0
    fires, sums, most = np.zeros(d_sae), np.zeros(d_sae), np.zeros(d_sae)
    best = TopRows(max(1, top))
    for start, part in zip(range(0, n, _PART), rows.parts(_PART), strict=True):
        x = mx.array(part.values)
        features = sae.encode(x)
        read = np.array(sae.decode(features, x), np.float64)
        found = np.array(features)
        values = part.values.astype(np.float64)
        error += float(((values - read) ** 2).sum())
        # From near their mean, so that nothing is lost where it is long.
        centre = values.mean(axis=0) if centre is None else centre
        total += (values - centre).sum(axis=0)
        squares += float(((values - centre) ** 2).sum())
        fires += (found > 0).sum(axis=0)
        sums += found.sum(axis=0, dtype=np.float64)
        most = np.maximum(most, found.max(axis=0))
        best.add(found, np.arange(start, start + len(part)))
    variation = squares - float((total**2).sum()) / n
    return Measures(
        n_rows=n,
        squared_error=error / n,
        # What is left of equal rows is rounding.
        fvu=error / variation if variation > 1e-12 * max(squares, error) else None,
        l0=float(fires.sum() / n),
        l1=float(sums.sum() / n),
        firing_rate=fires / n,
        mean_activation=sums / n,
        max_activation=most,
        top=best,
    )
