"""Training a sparse autoencoder on captured rows, read from disk batch by batch.

1. One pass over all rows finds their mean and their mean squared distance from it. Rows are centred and scaled by
   these while training, so that the same options work at every layer of every model; both are folded into the
   weights at the end, and activations are then in units of the rows themselves.
2. Some texts (some sequences, where tokens are not known; some rows, where these are few or not known either) are held
   out: what is measured is measured on them. A text that was captured at several steps is held out at all of them.
3. Adam moves down the gradient of the objective (``objective.py``), clipped to length 1. Each decoder row has length 1:
   the part of its gradient along itself is taken off before a step, and it is brought back to 1 after it.
4. Latents that have not fired for a while start anew, in the direction of a row that is badly read back
   (Bricken et al. 2023), or learn what the others leave over (Gao et al. 2024).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from pydantic import Field

from ...errors import HookError
from ...options import options, options_of
from ...storage.rows import LABELS, ArrayRows, RowPart, Rows
from ..top_rows import finite
from .autoencoder import SparseAutoencoder
from .objective import Objective, Parameters, decoded, pre_activations

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""
Whole = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]

FEW_TEXTS = 10
"""With fewer, rows are held out rather than texts."""
_ARRAYS_OF_WEIGHTS, _ARRAYS_OF_ROWS = 9, 20
"""What a step holds at once at its peak, measured: so many times the encoder and the decoder (themselves, gradients,
Adam's moments), and so many times the activations of a batch."""
_LOSSES = ("loss", "recon_loss", "sparsity_loss", "l0_sparsity")
_POOL = 4096
"""Rows among which a latent that starts anew finds its direction."""


@options
class SAETraining:
    """How a sparse autoencoder is trained.

    Rows are centred and scaled to a mean squared length of 1 first: ``l1_coefficient``, ``l0_coefficient``,
    ``bandwidth`` and ``initial_threshold`` are in units of those.

    Args:
        architecture: "relu", "topk", "batchtopk" or "jumprelu"; see ``objective.py``.
        d_sae: latents; by default ``expansion`` times the width of a row.
        expansion: see ``d_sae``.
        k: of topk and batchtopk, latents per row; by default a quarter of the width, from 1 to 32.
        l1_coefficient: of relu: the weight of the sum of activations beside the fraction of variance unexplained.
        target_l0: of jumprelu: how many latents are to fire on a row, on average; by default as k.
        l0_coefficient: of jumprelu: the weight of (L0 / target - 1)^2.
        bandwidth, initial_threshold: of jumprelu; by default 0.5 and 0.25 over the square root of the width of a row,
            which is what pre-activations are like at first.
        learning_rate: of Adam; by default 0.02 over the square root of the width of a row. It rises over the first
            steps and falls to 0 over the last fifth.
        warm_up: the fraction of the steps in which the learning rate and the penalty rise.
        batch_size: rows per step.
        epochs: how often each row is seen.
        max_steps: no more steps than this, however many rows there are.
        dead_features: "resample" (relu, jumprelu), "auxiliary" (topk, batchtopk) or "leave"; None is what stands
            beside.
        auxiliary_coefficient: the weight of the auxiliary loss.
        held_out: the fraction of rows that is not trained on, in whole texts.
        max_held_out: no more rows than this are held out.
        max_bytes: what would take more memory than about this is refused; by default 8 GiB.
        seed: of the weights and of the order of rows; the same seed gives the same autoencoder.
    """

    architecture: Literal["relu", "topk", "batchtopk", "jumprelu"] = "relu"
    d_sae: Whole | None = None
    expansion: Whole = 4
    k: Whole | None = None
    l1_coefficient: Annotated[float, Field(ge=0)] = 0.1
    target_l0: Positive | None = None
    l0_coefficient: Annotated[float, Field(ge=0)] = 0.1
    bandwidth: Positive | None = None
    initial_threshold: Positive | None = None
    learning_rate: Positive | None = None
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.05
    batch_size: Whole = 256
    epochs: Whole = 50
    max_steps: Whole = 5000
    dead_features: Literal["resample", "auxiliary", "leave"] | None = None
    auxiliary_coefficient: Annotated[float, Field(ge=0)] = 1.0
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    max_held_out: Whole = 8192
    max_bytes: Whole = 8 * 2**30
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


@dataclass(frozen=True, eq=False)
class TrainedSAE:
    """An autoencoder and how it came about.

    Args:
        sae: the autoencoder, for rows as they were captured.
        stats: one number per pass over the rows (per part of one, if ``max_steps`` ended it): "loss" = "recon_loss" +
            "sparsity_loss"; "recon_loss", the fraction of variance unexplained; "sparsity_loss", what the objective
            adds; "l0_sparsity", the fraction of latents that fire on a row.
        held_out: indices of the rows that it is judged by, ascending: not trained on, and not equal to one that was
            because their texts begin alike.
        held_out_by: "text" (all sequences that read the same tokens, at whatever step), "sequence" where tokens are not
            known, or "row" where there are few of these.
        steps: the training steps that the rows are of, ascending; empty where they are not known.
        n_train: rows that were trained on.
        n_steps: steps that were made.
        n_resampled: how often a dead latent started anew.
        scale: what centred rows were multiplied with in training.
        objective: what was made small.
        options: how it was trained.
    """

    sae: SparseAutoencoder
    stats: dict[str, list[float]]
    held_out: np.ndarray
    held_out_by: str
    steps: tuple[int, ...]
    n_train: int
    n_steps: int
    n_resampled: int
    scale: float
    objective: Objective
    options: SAETraining


def train_sae(
    rows: Rows | np.ndarray,
    options: "SAETraining | Mapping[str, Any] | None" = None,
    *,
    progress: Progress | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> TrainedSAE:
    """Train a sparse autoencoder on rows.

        rows = ShardReader("mechint_cache").rows("blocks.2.hook_resid_post")
        trained = train_sae(rows, {"architecture": "topk", "k": 8})
        trained.sae.save("sae")

    Args:
        rows: of a layer, or an array [row, feature].
        options: see :class:`SAETraining`.
        progress: called with steps done and steps to do.
        metadata: what the autoencoder is to say of itself besides, such as ``model_name``.

    Raises:
        HookError: for options that are not allowed, fewer than two rows, rows that are not finite or all equal, more
            latents per row than there are latents, and what takes more memory than ``max_bytes``.
    """
    return _Training(as_rows(rows), options_of(SAETraining, options), dict(metadata or {})).run(progress)


def compiles() -> bool:
    """Whether a step is compiled: on a GPU. For the CPU, MLX would call a C++ compiler for each new kernel, which takes
    longer than most trainings and is not on every machine."""
    return bool(mx.default_device().type == mx.gpu)


def as_rows(rows: Any) -> Rows:
    """Rows, of an array too."""
    return rows if isinstance(rows, Rows) else ArrayRows(rows)


class ChosenRows(Rows):
    """Some rows of others."""

    def __init__(self, rows: Rows, chosen: np.ndarray) -> None:
        self.rows, self.chosen = rows, chosen
        self.name, self.shape, self.axes = rows.name, rows.shape, rows.axes

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, indices: Any) -> RowPart:
        return self.rows.take(self.chosen[np.asarray(indices)])

    def values(self, indices: Any) -> np.ndarray:
        return self.rows.values(self.chosen[np.asarray(indices)])


class _Training:
    """One training: rows as they are fed, weights, optimizer, and what is counted meanwhile."""

    def __init__(self, rows: Rows, asked: SAETraining, metadata: dict[str, Any]) -> None:
        if len(rows) < 2:
            raise HookError(f"A sparse autoencoder needs at least 2 rows, got {len(rows)}.", field="rows")
        self.asked, self.metadata, self.rows = asked, metadata, rows
        self.d_in, self.d_sae = rows.width, asked.d_sae or asked.expansion * rows.width
        self._check_memory()
        self.mean, self.scale, labels = _scan(rows)
        kept, self.held_out, self.by = _held_out(labels, asked)
        self.trained_at = () if labels.step is None else tuple(np.unique(labels.step).tolist())
        self.train = ChosenRows(rows, kept)
        # Of a number in a direction of length 1, and of the product of a direction with a row.
        self.typical = self.d_in**-0.5
        self.learning_rate = asked.learning_rate or 0.02 * self.typical
        self.initial_threshold = asked.initial_threshold or 0.25 * self.typical
        self.k = _few(rows.width, self.d_sae) if asked.k is None else asked.k
        if self.k > self.d_sae:
            raise HookError(f"k is at most the number of latents, {self.d_sae}; got {self.k}.", field="k")
        self.target_l0 = float(self.k if asked.target_l0 is None else asked.target_l0)
        if self.target_l0 > self.d_sae:
            raise HookError(
                f"target_l0 is at most the number of latents, {self.d_sae}; got {self.target_l0:g}.", field="target_l0"
            )
        self.dead_features = asked.dead_features or ("auxiliary" if "topk" in asked.architecture else "resample")
        self.batch = min(asked.batch_size, len(self.train))
        self.per_epoch = -(-len(self.train) // self.batch)
        self.steps = min(asked.epochs * self.per_epoch, asked.max_steps)
        self.objective = Objective(
            architecture=asked.architecture,
            k=self.k,
            penalty=asked.l1_coefficient if asked.architecture == "relu" else asked.l0_coefficient,
            target_l0=self.target_l0,
            bandwidth=asked.bandwidth or 0.5 * self.typical,
            auxiliary=asked.auxiliary_coefficient if self.dead_features == "auxiliary" else 0.0,
        )
        self.random = np.random.default_rng(asked.seed)
        self.weights = self._begin()
        self.optimizer = optim.Adam(learning_rate=self.learning_rate, bias_correction=True)
        self.optimizer.init(self.weights)
        self.idle = mx.zeros(self.d_sae, mx.int32)
        """For how many steps each latent has not fired."""
        self.patience = -(-self.steps // 8)
        """A latent is dead when it has not fired for as many steps."""
        self.n_resampled = 0

    def _check_memory(self) -> None:
        """Refuse what would not fit, before any of it is made."""
        rows = min(len(self.rows), max(self.asked.batch_size, _POOL // 3))
        numbers = self.d_sae * (2 * _ARRAYS_OF_WEIGHTS * self.d_in + _ARRAYS_OF_ROWS * rows)
        needed, allowed = 4 * numbers, self.asked.max_bytes
        if needed > allowed:
            raise HookError(
                f"{self.d_sae:,} latents for rows of {self.d_in:,} numbers take about {needed / 2**30:,.1f} GiB to "
                f"train, and max_bytes allows {allowed / 2**30:,.1f}: ask for fewer latents or smaller batches.",
                field="expansion" if self.asked.d_sae is None else "d_sae",
            )

    def _begin(self) -> Parameters:
        directions = self.random.standard_normal((self.d_sae, self.d_in), dtype=np.float32)
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        weights = {
            "W_enc": mx.array(directions.T.copy()),
            "b_enc": mx.zeros(self.d_sae),
            "W_dec": mx.array(directions),
            "b_dec": mx.zeros(self.d_in),
        }
        if self.asked.architecture == "jumprelu":
            weights["threshold"] = mx.full((self.d_sae,), self.initial_threshold)
        return weights

    def _ramps(self, done: int) -> tuple[float, float]:
        """Factors of the penalty, which rises at first, and of the learning rate, which falls at the end too."""
        rise = min(1.0, (done + 1) / max(1, round(self.asked.warm_up * self.steps)))
        return rise, min(rise, (self.steps - done) / max(1, self.steps // 5))

    def run(self, progress: Progress | None) -> TrainedSAE:
        stats: dict[str, list[float]] = {name: [] for name in _LOSSES}
        state = [self.optimizer.state]
        step = mx.compile(self._step, inputs=state, outputs=state) if compiles() else self._step
        sums, counted, done = np.zeros(len(_LOSSES)), 0, 0
        for values in self.train.shuffled(self.batch, seed=self.asked.seed, epochs=self.asked.epochs):
            penalty, rate = self._ramps(done)
            self.optimizer.learning_rate = mx.array(self.learning_rate * rate)
            self.weights, self.idle, told = step(self.weights, self._scaled(values), self.idle, mx.array(penalty))
            mx.eval(self.weights, self.idle, told, self.optimizer.state)
            done += 1
            sums += np.array(told, np.float64) * len(values)
            counted += len(values)
            if done % self.per_epoch == 0 or done == self.steps:
                for name, total in zip(_LOSSES, sums / counted, strict=True):
                    stats[name].append(float(total))
                sums, counted = np.zeros(len(_LOSSES)), 0
            if self.dead_features == "resample" and done % self.patience == 0:
                self._resample(done)
            if progress is not None:
                progress(done, self.steps)
            if done == self.steps:
                break
        return TrainedSAE(
            sae=self._finished(),
            stats=stats,
            held_out=self.held_out,
            held_out_by=self.by,
            steps=self.trained_at,
            n_train=len(self.train),
            n_steps=done,
            n_resampled=self.n_resampled,
            scale=self.scale,
            objective=self.objective,
            options=self.asked,
        )

    def _scaled(self, values: np.ndarray) -> mx.array:
        return mx.array(((values - self.mean) * self.scale).astype(np.float32))

    def _step(
        self, weights: Parameters, x: mx.array, idle: mx.array, ramp: mx.array
    ) -> tuple[Parameters, mx.array, mx.array]:
        """One step down the gradient: new weights, for how long latents have been idle, and the losses."""
        (loss, error, sparsity, fired), gradients = mx.value_and_grad(self.objective)(
            weights, x, idle >= self.patience, ramp
        )
        directions = weights["W_dec"]
        along = (gradients["W_dec"] * directions).sum(axis=-1, keepdims=True)
        gradients["W_dec"] = gradients["W_dec"] - along * directions
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        moved = self.optimizer.apply_gradients(gradients, weights)
        moved["W_dec"] = _unit(moved["W_dec"])
        if "threshold" in moved:
            moved["threshold"] = mx.maximum(moved["threshold"], 0.0)
        idle = mx.where(fired.any(axis=0), 0, idle + 1)
        return moved, idle, mx.stack([loss, error, sparsity, fired.mean()])

    # Dead latents

    def _resample(self, done: int) -> None:
        """Let dead latents start anew, while there is time left to learn."""
        dead = np.flatnonzero(np.array(self.idle) >= self.patience)
        if not len(dead) or done > 0.7 * self.steps:
            return
        drawn = self.random.choice(len(self.train), min(_POOL, len(self.train)), replace=False)
        x = self._scaled(self.train.take(np.sort(drawn)).values)
        features = self.objective.activations(self.weights, pre_activations(self.weights, x))
        losses = np.array(((x - decoded(self.weights, features)) ** 2).sum(axis=-1), np.float64)
        chances = losses**2
        if not chances.sum() > 0:
            return
        chosen = self.random.choice(len(losses), len(dead), p=chances / chances.sum())
        directions = np.array(_unit(x[mx.array(chosen)] - self.weights["b_dec"]))
        alive = np.setdiff1d(np.arange(self.d_sae), dead)
        lengths = np.linalg.norm(np.array(self.weights["W_enc"]), axis=0)
        length = lengths[alive].mean() if len(alive) else 1.0
        if "topk" not in self.asked.architecture:
            # As in the paper; among the k largest it would never be.
            length *= 0.2
        at = mx.array(dead)
        weights = dict(self.weights)
        weights["W_dec"][at] = mx.array(directions)
        weights["W_enc"][:, at] = mx.array((length * directions).T)
        weights["b_enc"][at] = 0.0
        if "threshold" in weights:
            weights["threshold"][at] = self.initial_threshold
        # What Adam remembers is of the latents that were there before.
        for name, index in (("W_dec", at), ("W_enc", (slice(None), at)), ("b_enc", at), ("threshold", at)):
            for moment in ("m", "v"):
                if name in weights:
                    self.optimizer.state[name][moment][index] = 0.0
        self.weights = weights
        self.idle[at] = 0
        self.n_resampled += len(dead)

    # What comes out

    def _finished(self) -> SparseAutoencoder:
        """The autoencoder for rows as they are: the pre-activations of a row shrink by what it was scaled with."""
        architecture, weights = self.asked.architecture, self.weights
        per_unit = 1 / self.scale
        threshold = weights.get("threshold")
        if architecture == "batchtopk":
            threshold = mx.full((self.d_sae,), self._batch_threshold())
        # Options of the analysis, which come with these, are not about training.
        own = {name: value for name, value in asdict(self.asked).items() if name in SAETraining.__annotations__}
        details = {**own, "d_sae": self.d_sae, "k": self.k, "target_l0": self.target_l0}
        about = {
            "hook_name": self.rows.name or None,
            "row_shape": list(self.rows.shape),
            "trained_by": "neuroscope-mlx",
            "training_architecture": "standard" if architecture == "relu" else architecture,
            "training_architecture_details": details,
        }
        by_head = len(self.rows.shape) == 2 and (self.rows.name or "").endswith("hook_z")
        return SparseAutoencoder(
            architecture="jumprelu" if architecture == "batchtopk" else architecture,
            W_enc=weights["W_enc"],
            b_enc=weights["b_enc"] * per_unit,
            W_dec=weights["W_dec"],
            b_dec=mx.array((np.array(weights["b_dec"], np.float64) * per_unit + self.mean).astype(np.float32)),
            threshold=None if threshold is None else threshold * per_unit,
            k=self.k if architecture == "topk" else None,
            reshape_activations="hook_z" if by_head else "none",
            metadata={**about, **self.metadata},
        )

    def _batch_threshold(self) -> float:
        """The mean, over batches, of the smallest activation that is kept."""
        found = []
        for values in self.train.shuffled(self.batch, seed=self.asked.seed + 1):
            kept = self.objective.activations(self.weights, pre_activations(self.weights, self._scaled(values)))
            smallest = mx.where(kept > 0, kept, mx.inf).min().item()
            if np.isfinite(smallest):
                found.append(smallest)
            if len(found) == 100:
                break
        return float(np.mean(found)) if found else 0.0


def _scan(rows: Rows) -> tuple[np.ndarray, float, RowPart]:
    """The mean of all rows, what they are multiplied with to have a mean squared length of 1 around it, and what is
    known of each row besides its values."""
    total, squares = np.zeros(rows.width), 0.0
    known: dict[str, list[np.ndarray]] = {name: [] for name in LABELS}
    for part in rows.parts():
        total += finite(part, rows).sum(axis=0, dtype=np.float64)
        for name, found in known.items():
            label = getattr(part, name)
            if label is not None:
                found.append(label)
    mean = total / len(rows)
    for part in rows.parts():
        squares += float(((part.values - mean) ** 2).sum())
    # What is left of equal rows is rounding.
    if not squares > 1e-12 * len(rows) * max(float((mean**2).sum()), 1e-300):
        raise HookError("The rows are all equal: there is nothing to learn from them.", field="rows")
    whole = {name: np.concatenate(found) for name, found in known.items() if sum(map(len, found)) == len(rows)}
    return mean, float(np.sqrt(len(rows) / squares)), RowPart(np.empty((len(rows), 0), np.float32), **whole)


def _held_out(labels: RowPart, asked: SAETraining) -> tuple[np.ndarray, np.ndarray, str]:
    """Indices of the rows to train on and of those to judge by, ascending, and what was drawn: "text", ...

    A row of a held-out text whose tokens up to it begin a text that is trained on is neither: it would not be unseen.
    """
    kin, by = _kin(labels)
    held, prefixes = _drawn(kin, asked), labels.prefixes
    judged = held if prefixes is None else held & ~np.isin(prefixes, prefixes[~held])
    if prefixes is not None and not judged.any():
        by = "row"
        judged = held = _drawn(prefixes if prefixes.max() > 0 else np.arange(len(labels)), asked)
    return np.flatnonzero(~held), np.flatnonzero(judged), by


def _drawn(kin: np.ndarray, asked: SAETraining) -> np.ndarray:
    """The rows that are not trained on, as a mask [row]: all or none of those with the same number."""
    random = np.random.default_rng(asked.seed)
    n_rows, n_kin = len(kin), int(kin.max()) + 1
    most = max(1, min(round(asked.held_out * n_rows), asked.max_held_out, n_rows - 1))
    order = random.permutation(n_kin)
    sizes = np.bincount(kin, minlength=n_kin)[order].cumsum()
    chosen = np.zeros(n_kin, bool)
    chosen[order[: max(1, int(np.searchsorted(sizes, most, side="right")))]] = True
    return chosen[kin]


def _kin(labels: RowPart) -> tuple[np.ndarray, str]:
    """Which rows are held out together or not at all, [row], the same number for each of them, and what they are."""
    texts, prefixes = labels.texts, labels.prefixes
    wholes = labels.sequences if texts is None else texts
    if wholes is not None and int(wholes.max()) + 1 >= FEW_TEXTS:
        return wholes, "sequence" if texts is None else "text"
    # Single tokens; but one that was captured at several steps is one.
    return (np.arange(len(labels)) if prefixes is None or not prefixes.max() else prefixes), "row"


def _few(width: int, d_sae: int) -> int:
    return max(1, min(width // 4, 32, d_sae))


def _unit(vectors: mx.array) -> mx.array:
    """Each row at length 1; a row of length 0 stays."""
    lengths = mx.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / mx.where(lengths > 0, lengths, 1.0)
