"""Linear probes: how well a label can be read off activations by a linear function, and along which direction.

    1. Rows are split by text, never by token: neighbouring tokens share their context, and a probe that has seen one of
       them has seen much of the other. A text that was captured at several steps is one text.
    2. The strength of the penalty is chosen by cross-validation inside the training rows, by text too.
    3. The probe is judged on the held-out texts, beside a guess of the commonest class and beside probes that were
       trained on shuffled labels: what these reach, any data of this shape would.

Where tokens are not known texts cannot be told apart: sequences take their place, and where these are not known rows.

Sources: Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (2016); Hewitt and Liang,
"Designing and Interpreting Probes with Control Tasks" (2019).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import mlx.core as mx
import numpy as np
from pydantic import Field

from ..activations import to_numpy
from ..errors import HookError
from ..options import options, options_of
from ..storage.rows import RowPart, Rows
from .intervals import Estimate, IntervalOptions, few, ratios
from .progress import Progress
from .threads import one_thread
from .top_rows import Spell, check_vectors, finite
from .traits.methods import usual_distance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Label = bool | int | float | str
Labels = Mapping[Any, Label] | Sequence[Label | None] | np.ndarray | mx.array | Callable[[RowPart], Any]
"""See :func:`analyse_probe`."""

_FIELD = "labels"
_MOST_CLASSES = 50
_STEPS = 1000


@options
class ProbeOptions(IntervalOptions):
    """Options of :func:`analyse_probe`, besides those of :class:`IntervalOptions`.

    Args:
        task: "classes" (logistic regression), "numbers" (ridge regression), or "auto": numbers where some label has a
            fraction.
        test_share: of the texts, held out.
        strengths: inverse penalties (C) of which one is chosen; activations are in units of their usual distance from
            their mean.
        folds: of the cross-validation that chooses it.
        controls: probes trained on shuffled labels.
        max_rows: of more labelled rows so many are drawn.
        seed: of all that is drawn.
    """

    task: Literal["auto", "classes", "numbers"] = "auto"
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    strengths: Sequence[Annotated[float, Field(gt=0)]] = (0.01, 0.1, 1.0, 10.0, 100.0)
    folds: Annotated[int, Field(ge=2)] = 3
    controls: Annotated[int, Field(ge=0)] = 3
    max_rows: Annotated[int, Field(ge=4)] = 10_000
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def __post_init__(self) -> None:
        if not self.strengths:
            raise HookError("strengths names at least one number above 0, got none.", field="strengths")


@dataclass(frozen=True, eq=False)
class _Fit:
    """A linear function of activations: ``h @ directions.T + biases``.

    Args:
        directions: [output, width] in units of activations: one output for two classes (the log odds of the second)
            and for numbers, else one per class.
        biases: [output].
    """

    directions: np.ndarray
    biases: np.ndarray
    converged: bool = True

    def outputs(self, values: np.ndarray) -> np.ndarray:
        return values @ self.directions.T + self.biases

    def classes(self, values: np.ndarray) -> np.ndarray:
        """The likeliest class of each row, as an index."""
        outputs = self.outputs(values)
        return (outputs[:, 0] > 0).astype(int) if outputs.shape[1] == 1 else outputs.argmax(axis=1)


@dataclass(frozen=True, eq=False)
class _Data:
    """Labelled rows.

    Args:
        values: [row, width], float64.
        labels: indices of classes, or numbers, [row].
        groups: which text (sequence, row) a row is of, [row].
        places: a number for each row that is the same for rows that read the same tokens, or, where these are not
            known, for one place of one sequence, [row].
        unit: what the groups are: "text", "beginning", "sequence" or "row".
        classes: the labels that the indices stand for; empty for numbers.
    """

    values: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    places: np.ndarray
    unit: str
    classes: list[Label]

    def at(self, chosen: np.ndarray) -> "_Data":
        return replace(
            self,
            values=self.values[chosen],
            labels=self.labels[chosen],
            groups=self.groups[chosen],
            places=self.places[chosen],
        )

    def shuffled(self, generator: np.random.Generator) -> "_Data":
        """With labels in random order: of whole texts where each has one label, else of places where these have."""
        for names in (self.groups, self.places):
            _, first, which = np.unique(names, return_index=True, return_inverse=True)
            own = self.labels[first]
            if len(own) < len(names) and (own[which] == self.labels).all():
                return replace(self, labels=generator.permutation(own)[which])
        return replace(self, labels=generator.permutation(self.labels))

    def fit(self, strength: float) -> _Fit:
        """The probe with a penalty."""
        centre = self.values.mean(axis=0)
        apart = self.values - centre
        unit = usual_distance(apart) if apart.any() else 1.0
        rows = apart / unit
        directions, biases, converged = (_ridge if not self.classes else _logistic)(rows, self.labels, strength)
        directions = directions / unit
        return _Fit(directions, biases - directions @ centre, converged)

    def score(self, fit: _Fit) -> float:
        """Accuracy, or for numbers R squared."""
        if self.classes:
            return float((fit.classes(self.values) == self.labels).mean())
        off = np.square(fit.outputs(self.values)[:, 0] - self.labels).sum()
        return float(1 - off / max(np.square(self.labels - self.labels.mean()).sum(), np.finfo(np.float64).tiny))


def _logistic(rows: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray, bool]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, solver="lbfgs", max_iter=_STEPS)
    with warnings.catch_warnings(), one_thread():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows, labels)
    return model.coef_, model.intercept_, bool(model.n_iter_[0] < _STEPS)


def _ridge(rows: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray, bool]:
    """Of rows whose mean is 0."""
    # NumPy's: SciPy's solvers hold all other threads of the process up. The smaller of the two systems is solved.
    mean, apart, penalty = labels.mean(), labels - labels.mean(), 1 / strength
    if len(rows) < rows.shape[1]:
        direction = rows.T @ np.linalg.solve(rows @ rows.T + penalty * np.eye(len(rows)), apart)
    else:
        direction = np.linalg.solve(rows.T @ rows + penalty * np.eye(rows.shape[1]), rows.T @ apart)
    return direction[None], np.atleast_1d(mean), True


def analyse_probe(
    rows: Rows,
    labels: Labels,
    options: ProbeOptions | dict | None = None,
    progress: Progress = None,
    spell: Spell = None,
) -> dict[str, Any]:
    """Train a linear probe on a layer's activations, and judge it on texts that it has not seen.

        found = analyse_probe(rows, {"France": "country", "Paris": "city"}, spell=TokenText(model.tokenizer).text)
        found["accuracy"], found["control"]["accuracy"], found["majority_baseline"]
        np.array(found["direction"])            # [width] of two classes: h @ direction + bias are the log odds

    Args:
        labels: one per row in stored order, None (or nan) for rows to be left out; or a mapping from tokens (ids, or
            texts with ``spell``) to labels, which leaves out other tokens; or a function that answers the labels of a
            :class:`RowPart`. Labels are texts, truth values, whole numbers (classes) or numbers with a fraction.
        progress: called with the probes that are trained and to be trained.
        spell: what a token id is as text.

    Returns:
        plain JSON values. For classes ``accuracy`` (held-out rows, with an interval over texts),
        ``balanced_accuracy`` (the mean over classes), ``majority_baseline``, ``control`` (probes on shuffled labels)
        and ``selectivity`` (accuracy less the control's); for numbers ``r2`` and its ``control``. ``direction``
        [width], or [class, width] for more than two classes, and ``bias`` are in units of the activations.
        ``split_by`` is "text", "beginning" (the tokens up to a row), "sequence" or "row".

    Raises:
        HookError: for labels that are too many or too few, of one class, or such that some class is not in two texts
            (sequences, rows); and for activations that are not finite or all the same.
    """
    chosen = options_of(ProbeOptions, options)
    check_vectors(rows)
    indices, given = _labels_of(rows, labels, spell)
    generator = np.random.default_rng(chosen.seed)
    n_labelled = len(indices)
    notes = []
    if n_labelled > chosen.max_rows:
        drawn = np.sort(generator.choice(n_labelled, chosen.max_rows, replace=False))
        indices, given = indices[drawn], [given[i] for i in drawn]
        notes.append(f"Of {n_labelled} labelled rows {chosen.max_rows} were drawn.")
    part = rows.take(indices)
    data = _data(part, finite(part, rows), given, chosen.task, *_groups(rows, part, indices))
    train, held, unit = _split(data, chosen.test_share, generator, notes)
    fits, total = 0, len(chosen.strengths) * chosen.folds + 1 + chosen.controls

    def fitted(part: _Data, strength: float) -> _Fit:
        nonlocal fits
        fits += 1
        found = part.fit(strength)
        if progress is not None:
            progress(min(fits, total), total)
        return found

    strength = _chosen_strength(train, chosen, generator, fitted)
    fit = fitted(train, strength)
    controls = [fitted(train.shuffled(generator), strength) for _ in range(chosen.controls)]
    if progress is not None:
        progress(total, total)
    if not fit.converged:
        notes.append(f"The probe was still moving after {_STEPS} steps.")
    notes += few(len(np.unique(held.groups)), f"held-out {unit}s")
    single = len(fit.directions) == 1
    judge = _judged_classes if data.classes else _judged_numbers
    return {
        "layer": rows.name,
        "task": "classes" if data.classes else "numbers",
        "rows": len(rows),
        "rows_labelled": n_labelled,
        "train_rows": len(train.labels),
        "test_rows": len(held.labels),
        "split_by": unit,
        "train_groups": len(np.unique(train.groups)),
        "test_groups": len(np.unique(held.groups)),
        "strength": strength,
        **judge(train, held, fit, controls, chosen),
        "direction": (fit.directions[0] if single else fit.directions).tolist(),
        "bias": float(fit.biases[0]) if single else fit.biases.tolist(),
        "confidence": chosen.confidence,
        "notes": notes,
    }


# Labels


def _labels_of(rows: Rows, labels: Any, spell: Spell) -> tuple[np.ndarray, list[Label]]:
    """The rows that have labels, and these."""
    if isinstance(labels, mx.array):
        labels = to_numpy(labels)
    if isinstance(labels, str | bytes) or not (callable(labels) or isinstance(labels, Mapping | Sequence | np.ndarray)):
        raise HookError(
            "labels are one per row, a mapping from tokens to labels, or a function of a part of the rows; got "
            f"{type(labels).__name__}.",
            field=_FIELD,
        )
    if isinstance(labels, Mapping):
        listed = _by_token(rows, labels, spell)
    elif callable(labels):
        listed = []
        for part in rows.parts():
            own = list(labels(part))
            if len(own) != len(part):
                raise HookError(f"A function of labels answered {len(own)} for {len(part)} rows.", field=_FIELD)
            listed += own
    else:
        if isinstance(labels, np.ndarray) and labels.ndim != 1:
            raise HookError(f"labels has one per row, [{len(rows)}], got shape {list(labels.shape)}.", field=_FIELD)
        listed = list(labels)
        if len(listed) != len(rows):
            raise HookError(f"labels has one per row: {len(rows)}, got {len(listed)}.", field=_FIELD)
    plain = [
        label.item() if isinstance(label, np.generic | mx.array | np.ndarray) and label.size == 1 else label
        for label in listed
    ]
    kept: dict[int, Any] = {i: label for i, label in enumerate(plain) if not _is_none(label)}
    for label in kept.values():
        if not isinstance(label, bool | int | float | str) or (isinstance(label, float) and np.isinf(label)):
            raise HookError(f"A label is a text, a truth value or a finite number, got {label!r:.60}.", field=_FIELD)
    return np.array(list(kept), dtype=np.int64), list(kept.values())


def _is_none(label: Any) -> bool:
    return label is None or (isinstance(label, float) and np.isnan(label))


def _by_token(rows: Rows, labels: Mapping[Any, Label], spell: Spell) -> list[Label | None]:
    listed: list[Label | None] = []
    known: dict[int, Label | None] = {}
    for part in rows.parts():
        if part.tokens is None:
            raise HookError(f"{rows.name} came without tokens: give one label per row.", field=_FIELD)
        for token in map(int, part.tokens):
            if token not in known:
                known[token] = _label_of_token(token, labels, spell)
            listed.append(known[token])
    return listed


def _label_of_token(token: int, labels: Mapping[Any, Label], spell: Spell) -> Label | None:
    """By its id, then by its text, then by its text without spaces around it."""
    if token in labels:
        return labels[token]
    text = spell(token) if spell is not None else str(token)
    if text is None:
        return None
    return labels[text] if text in labels else labels.get(text.strip())


_UNKNOWN = {
    "sequence": "The rows came without tokens, so they are split by sequence: a text that was captured more than once "
    "may be on both sides, which flatters the probe.",
    "row": "The rows came without sequences, so they are split one by one: tokens of one sequence may be on both "
    "sides, which flatters the probe.",
}


def _groups(rows: Rows, part: RowPart, indices: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """What rows are split by, which of these each of a part is of, and which rows are of equal places, [row] each.

    Args:
        indices: where in all rows the part's are.
    """
    each, sequences = np.arange(len(part)), part.sequences
    if sequences is None:
        return "row", each, each
    if part.tokens is None or part.position is None:
        if part.position is not None:
            each = np.unique(np.stack([sequences, part.position]), axis=1, return_inverse=True)[1].reshape(-1)
        return "sequence", sequences, each
    # What a text is all of its tokens say, also those without a label.
    whole = part if len(part) == len(rows) else _unvalued(rows)
    texts, prefixes = whole.texts, whole.prefixes
    assert texts is not None
    assert prefixes is not None
    return ("text", texts, prefixes) if whole is part else ("text", texts[indices], prefixes[indices])


def _unvalued(rows: Rows) -> RowPart:
    """What is known of all rows but their values."""
    parts = [replace(part, values=part.values[:, :0]) for part in rows.parts()]
    return RowPart(
        **{
            f.name: np.concatenate([getattr(part, f.name) for part in parts])
            for f in fields(RowPart)
            if getattr(parts[0], f.name) is not None
        }
    )


def _data(
    part: RowPart,
    values: np.ndarray,
    given: Sequence[Label],
    task: str,
    unit: str,
    groups: np.ndarray,
    places: np.ndarray,
) -> _Data:
    """Labelled rows."""
    rows = values.astype(np.float64)
    if len(given) < 4:
        raise HookError(f"A probe needs at least 4 labelled rows, got {len(given)}.", field=_FIELD)
    if np.abs(rows - rows[0]).max() == 0:
        raise HookError("All labelled rows have the same activations: there is nothing to read.", field=_FIELD)
    are_numbers = all(isinstance(label, int | float) and not isinstance(label, bool) for label in given)
    if task == "numbers" or (task == "auto" and are_numbers and any(label != int(label) for label in given)):
        if not are_numbers or not np.isfinite(np.array(given, dtype=np.float64)).all():
            raise HookError("Labels of the task 'numbers' are finite numbers.", field=_FIELD)
        labels = np.array(given, dtype=np.float64)
        if labels.min() == labels.max():
            raise HookError(f"All labels are {given[0]!r}: a probe needs different ones.", field=_FIELD)
        return _Data(rows, labels, groups, places, unit, [])
    classes = sorted(set(given), key=lambda label: (isinstance(label, str), label))
    if not 2 <= len(classes) <= _MOST_CLASSES:
        shown = f"one, {classes[0]!r}" if len(classes) == 1 else f"{len(classes)}"
        raise HookError(
            f"A probe tells 2 to {_MOST_CLASSES} classes apart, got {shown}; the task 'numbers' has no such limit.",
            field=_FIELD,
        )
    numbers = {label: i for i, label in enumerate(classes)}
    return _Data(rows, np.array([numbers[label] for label in given]), groups, places, unit, classes)


# Splits


def _split(data: _Data, share: float, generator: np.random.Generator, notes: list[str]) -> tuple[_Data, _Data, str]:
    """Rows to learn from, rows to be judged on, and what was drawn; what is to be said of it is added to ``notes``."""
    if data.unit in _UNKNOWN:
        notes.append(_UNKNOWN[data.unit])
    test = _held_out(data, share, generator)
    if data.unit != "text":
        return data.at(~test), data.at(test), data.unit
    # Where texts begin alike their rows are equal: what was learned from is not unseen in another text.
    fresh = test & ~np.isin(data.places, data.places[~test])
    if fresh.any() and set(data.labels[fresh]) >= (set(data.labels) if data.classes else set()):
        if n_seen := int((test & ~fresh).sum()):
            notes.append(f"{n_seen} held-out rows are left out: a text that was learned from begins as theirs do.")
        return data.at(~test), data.at(fresh), data.unit
    notes.append(
        "Texts begin so much alike that the labelled rows are split by the tokens up to them: rows of one text may be "
        "on both sides, which flatters the probe."
    )
    data = replace(data, groups=data.places, unit="beginning")
    test = _held_out(data, share, generator)
    return data.at(~test), data.at(test), data.unit


def _held_out(data: _Data, share: float, generator: np.random.Generator) -> np.ndarray:
    """Which rows are held out, [row]: of the texts of each class this share, at least one."""
    names, kinds = _kinds_of_groups(data)
    chosen: list[int] = []
    for kind in np.unique(kinds):
        own = generator.permutation(names[kinds == kind])
        chosen += own[: min(max(1, round(share * len(own))), len(own) - 1)].tolist()
    test = np.isin(data.groups, chosen)
    sides = [set(data.labels[side].tolist()) for side in (test, ~test)]
    if data.classes and any(len(side) < len(data.classes) for side in sides):
        alone = min(set(range(len(data.classes))) - (sides[0] & sides[1]))
        raise HookError(
            f"Each class has to be in at least two {data.unit}s, one to learn from and one to be judged on; "
            f"{data.classes[alone]!r} is not.",
            field=_FIELD,
        )
    if not data.classes and (len(names) < 2 or not test.any()):
        raise HookError(f"Labelled rows are of at least two {data.unit}s, got one.", field=_FIELD)
    return test


def _kinds_of_groups(data: _Data) -> tuple[np.ndarray, np.ndarray]:
    """The texts, and each one's commonest class (0 for numbers)."""
    names, which = np.unique(data.groups, return_inverse=True)
    if not data.classes:
        return names, np.zeros(len(names), dtype=int)
    counts = np.zeros((len(names), len(data.classes)))
    np.add.at(counts, (which, data.labels), 1)
    return names, counts.argmax(axis=1)


def _chosen_strength(
    train: _Data, chosen: ProbeOptions, generator: np.random.Generator, fitted: Callable[[_Data, float], _Fit]
) -> float:
    """The strength with the best mean score in cross-validation; the smallest of those as good."""
    strengths = sorted(chosen.strengths)
    if len(strengths) == 1:
        return strengths[0]
    names, kinds = _kinds_of_groups(train)
    folds = np.zeros(len(names), dtype=int)
    for kind in np.unique(kinds):
        own = generator.permutation(np.flatnonzero(kinds == kind))
        folds[own] = np.arange(len(own)) % chosen.folds
    fold_of = folds[np.searchsorted(names, train.groups)]
    scores: dict[float, list[float]] = {strength: [] for strength in strengths}
    for fold in range(chosen.folds):
        inner, outer = train.at(fold_of != fold), train.at(fold_of == fold)
        is_complete = len(np.unique(inner.labels)) == len(np.unique(train.labels)) if train.classes else True
        if not len(outer.labels) or not len(inner.labels) or not is_complete:
            continue
        for strength in strengths:
            scores[strength].append(outer.score(fitted(inner, strength)))
    if not scores[strengths[0]]:
        return min(strengths, key=lambda strength: abs(np.log(strength)))
    return max(strengths, key=lambda strength: round(float(np.mean(scores[strength])), 6))


# Judgements


def _over_groups(data: _Data, above: np.ndarray, below: np.ndarray, chosen: ProbeOptions) -> Estimate:
    """The ratio of two sums over rows, with its interval over texts."""
    names, which = np.unique(data.groups, return_inverse=True)
    sums = [np.bincount(which, weights=each, minlength=len(names)) for each in (above, below)]
    settings: dict[str, Any] = {
        "confidence": chosen.confidence, "resamples": chosen.resamples, "seed": chosen.seed
    }  # fmt: skip
    return ratios(sums[0][:, None], sums[1], **settings)[0]


def _judged_classes(
    train: _Data, held: _Data, fit: _Fit, controls: Sequence[_Fit], chosen: ProbeOptions
) -> dict[str, Any]:
    right = fit.classes(held.values) == held.labels
    accuracy = _over_groups(held, right.astype(np.float64), np.ones(len(right)), chosen)
    commonest = np.bincount(train.labels).argmax()
    control = None
    if controls:
        shuffled = [held.score(one) for one in controls]
        balanced = [_balanced(held, one) for one in controls]
        control = {
            "shuffles": len(controls),
            "accuracy": float(np.mean(shuffled)),
            "balanced_accuracy": float(np.mean(balanced)),
        }
    mean = float(right.mean())
    return {
        "classes": [
            {"label": label, "train": int((train.labels == i).sum()), "test": int((held.labels == i).sum())}
            for i, label in enumerate(train.classes)
        ],
        "accuracy": accuracy.to_dict(),
        "train_accuracy": train.score(fit),
        "balanced_accuracy": _balanced(held, fit),
        "majority_baseline": float((held.labels == commonest).mean()),
        "control": control,
        "selectivity": None if control is None else mean - float(np.mean(shuffled)),
    }


def _balanced(held: _Data, fit: _Fit) -> float:
    """The mean over classes of the share of their rows that is told right."""
    right = fit.classes(held.values) == held.labels
    return float(np.mean([right[held.labels == i].mean() for i in range(len(held.classes))]))


def _judged_numbers(
    train: _Data, held: _Data, fit: _Fit, controls: Sequence[_Fit], chosen: ProbeOptions
) -> dict[str, Any]:
    off = held.labels - fit.outputs(held.values)[:, 0]
    # Against the best guess without activations that training allows.
    missing = _over_groups(held, np.square(off), np.square(held.labels - train.labels.mean()), chosen)
    low, high = (None if end is None else 1 - end for end in (missing.high, missing.low))
    r2 = Estimate(None if missing.mean is None else 1 - missing.mean, low, high, missing.n)
    control = None
    if controls:
        control = {"shuffles": len(controls), "r2": float(np.mean([held.score(one) for one in controls]))}
    return {
        "r2": r2.to_dict(),
        "train_r2": train.score(fit),
        "mean_absolute_error": float(np.abs(off).mean()),
        "mean_absolute_error_of_the_mean": float(np.abs(held.labels - train.labels.mean()).mean()),
        "control": control,
    }


def draw_probe(result: Mapping[str, Any]) -> list[tuple[str, "Figure"]]:
    """How well the label is read, beside guesses and shuffled labels; of several layers, layer by layer.

    Args:
        result: what :func:`analyse_probe` answers, or such results by layer.
    """
    from .charts import COLOURS, FAINT, figure

    results = [result] if "task" in result else list(result.values())
    name = "accuracy" if results[0]["task"] == "classes" else "r2"
    made, (axes,) = figure("Linear probe", width=max(4.5, 2.5 + 0.6 * len(results)))
    at = np.arange(len(results))
    scores = [found[name]["mean"] for found in results]
    axes.plot(at, scores, color=COLOURS[0], marker="o", linewidth=1.2, label="held-out")
    for x, found in zip(at, results, strict=True):
        if found[name]["low"] is not None:
            axes.plot([x, x], [found[name]["low"], found[name]["high"]], color=COLOURS[0], linewidth=1)
    if all(found["control"] is not None for found in results):
        axes.plot(at, [f["control"][name] for f in results], color=COLOURS[1], marker="s", label="shuffled labels")
    if name == "accuracy":
        baseline = [found["majority_baseline"] for found in results]
        axes.plot(at, baseline, color=FAINT, linestyle="--", marker="_", label="commonest class")
        axes.set_ylim(-0.02, 1.05)
    axes.set_xticks(at, [found["layer"] or "layer" for found in results], rotation=20, ha="right", fontsize=8)
    axes.set_xlim(-0.5, len(results) - 0.5)
    axes.set_ylabel("accuracy" if name == "accuracy" else "R²", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    return [("How well the label is read", made)]
