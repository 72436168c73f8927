"""What a run is judged by: one number per example from its logits, which a gradient can be taken of.

Of several asked positions (texts) an example has the mean. Logits and their difference, probability and log probability
are higher where the model does better; loss and divergence are lower there, and nothing is negated: a recovery, which
is a ratio, has the same meaning for both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ...activations import to_numpy
from ...errors import HookError
from ..eval_data import NOTHING, EvalBatch, EvalData
from ..measures import at_targets, divergences, log_probabilities, logit_differences

METRICS = {
    "logit_difference": "the answer's logit less the wrong answer's; higher is better",
    "logit": "the logit of the answer, of texts the mean of their next tokens', which also moves with all others'; "
    "higher is better",
    "probability": "the probability of the answer, of texts the mean of their next tokens'; higher is better",
    "log_probability": "the log probability of the answer, of texts the mean of their next tokens', in nats; higher is "
    "better",
    "loss": "minus the log probability, in nats; lower is better",
    "kl": "KL(plain || this) of the next token where one is asked for, in nats; lower is better",
}
FIELD = "metric"
_SMALL = 1e-6
"""A metric that changes by less, relative to its size, does not change."""

MetricFunction = Callable[[mx.array, EvalBatch], mx.array]
"""Of logits [batch, pos, d_vocab] and the batch that they are of, a number per row [batch]."""


@dataclass(frozen=True, eq=False)
class PlainRun:
    """What is compared with: of the clean run of a batch no more than a metric needs.

    Args:
        log_probabilities: of every token at the positions that are asked of the batch, [batch, asked, d_vocab].
    """

    log_probabilities: mx.array


@dataclass(frozen=True)
class Metric:
    """One number per example; :func:`metric_of` makes it.

        metric = metric_of("logit_difference", data)
        metric(logits, batch)                           # [batch]
        metric(three_runs, batch)                       # of logits [3 * batch, pos, d_vocab]: [3 * batch]

    Args:
        name: a key of METRICS, or that of the function.
        fn: the function in place of one of METRICS.
    """

    name: str
    fn: MetricFunction | None = None

    @property
    def description(self) -> str:
        """What it is, in words."""
        return METRICS[self.name] if self.fn is None else f"the function {self.name}"

    @property
    def needs_plain(self) -> bool:
        """Whether it compares with the logits of the clean run."""
        return self.fn is None and self.name == "kl"

    def plain_run(self, logits: mx.array, batch: EvalBatch) -> PlainRun | None:
        """What to keep of the clean run's logits [batch, pos, d_vocab], evaluated; None where nothing is needed."""
        if not self.needs_plain:
            return None
        found = log_probabilities(logits, batch)
        mx.eval(found)
        return PlainRun(found)

    def __call__(self, logits: mx.array, batch: EvalBatch, plain: "mx.array | PlainRun | None" = None) -> mx.array:
        """The metric of each row, [rows] in float32; nothing is evaluated.

        Args:
            logits: [rows, pos, d_vocab]; rows are those of the batch, or several copies of them, one after the other.
            plain: the clean run, for the metric that needs it: its logits [batch, pos, d_vocab], or what
                ``plain_run`` kept of them.

        Raises:
            HookError: for rows that are no copies of the batch, no ``plain`` where it is needed, and a function that
                does not give a number per row.
        """
        n_rows, n_examples = logits.shape[0], len(batch.tokens)
        if n_rows % n_examples:
            raise HookError(f"A batch of {n_examples} examples has logits of as many rows or copies, got {n_rows}.")
        rows = batch.repeated(n_rows // n_examples)
        if self.fn is not None:
            return _checked(self.fn(logits, rows), self.name, n_rows)
        if self.name == "logit_difference":
            return logit_differences(logits, rows)
        if self.name == "logit":
            return _mean(at_targets(logits[:, mx.array(rows.asked)].astype(mx.float32), rows), rows)
        if self.name == "kl":
            if plain is None:
                raise HookError("The metric kl compares with the clean run: give its logits as plain.", field=FIELD)
            before = plain.log_probabilities if isinstance(plain, PlainRun) else log_probabilities(plain, batch)
            before = mx.tile(before, (n_rows // len(before), 1, 1))
            return _mean(divergences(before, log_probabilities(logits, rows)), rows)
        found = _mean(_of_targets(logits, rows, exponential=self.name == "probability"), rows)
        return -found if self.name == "loss" else found

    def numbers(self, logits: mx.array, batch: EvalBatch, plain: "mx.array | PlainRun | None" = None) -> np.ndarray:
        """The metric of each row, [rows] in float64.

        Raises:
            HookError: for numbers that are not finite.
        """
        found = to_numpy(self(logits, batch, plain)).astype(np.float64)
        if not np.isfinite(found).all():
            raise HookError(f"The metric {self.name} is not finite on the eval data: nothing can be told.", field=FIELD)
        return found


def metric_of(given: "str | MetricFunction | Metric | None", data: EvalData) -> Metric:
    """The metric that a caller means, for this data.

    Args:
        given: a key of METRICS; a function of logits [batch, pos, d_vocab] and their :class:`EvalBatch`, which gives a
            number per row [batch]; or None for the logit difference where there are wrong answers, else the log
            probability.

    Raises:
        HookError: for another name, and for a logit difference without wrong answers.
    """
    if given is None:
        given = "logit_difference" if data.has_wrong else "log_probability"
    if isinstance(given, Metric):
        made = given
    elif isinstance(given, str):
        if given not in METRICS:
            raise HookError(f"metric is a function or one of {', '.join(METRICS)}, got {given!r}.", field=FIELD)
        made = Metric(given)
    elif callable(given):
        made = Metric(_name_of(given), given)
    else:
        raise HookError(
            f"metric is a function or one of {', '.join(METRICS)}, got {type(given).__name__}.", field=FIELD
        )
    if made.fn is None and made.name == "logit_difference" and not data.has_wrong:
        raise HookError(
            "A logit difference needs wrong answers to compare with: give every prompt a wrong, or another metric.",
            field=FIELD,
        )
    return made


def _name_of(given: Any) -> str:
    """What a function is called, which is no name of METRICS."""
    name = getattr(given, "__name__", type(given).__name__)
    return f"function {name}" if name in METRICS else name


def check_differ(clean: np.ndarray, corrupted: np.ndarray) -> None:
    """Raise HookError where the mean metric [example] of clean and corrupted prompts is the same: nothing is a share
    of no difference."""
    size = max(np.abs(clean).mean(), np.abs(corrupted).mean(), _SMALL)
    if abs(clean.mean() - corrupted.mean()) <= _SMALL * size:
        raise HookError(
            f"The metric is {clean.mean():.4g} of clean and of corrupted prompts: there is no difference to recover.",
            field=FIELD,
        )


def _of_targets(logits: mx.array, batch: EvalBatch, *, exponential: bool) -> mx.array:
    """The log probability, or probability, of each target, [rows, asked]."""
    found = at_targets(log_probabilities(logits, batch), batch)
    return mx.exp(found) if exponential else found


def _mean(values: mx.array, batch: EvalBatch) -> mx.array:
    """The mean of values [rows, asked] over the positions that are asked of each row."""
    is_asked = batch.targets[:, batch.asked] != NOTHING
    return mx.where(mx.array(is_asked), values, 0.0).sum(axis=1) / mx.array(is_asked.sum(axis=1).astype(np.float32))


def _checked(found: Any, name: str, n_rows: int) -> mx.array:
    if not isinstance(found, mx.array) or found.shape != (n_rows,):
        what = f"shape {tuple(found.shape)}" if isinstance(found, mx.array) else type(found).__name__
        raise HookError(
            f"The metric {name} gives an mx.array with a number per row, [{n_rows}]; got {what}.", field=FIELD
        )
    return found.astype(mx.float32)
