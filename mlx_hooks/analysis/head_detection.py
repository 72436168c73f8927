"""Which heads follow a known rule: on random tokens that are said twice, or on prompts, with intervals over sequences.

The field's way: on random tokens nothing but the rule can tell where to look. Each sequence is a token that does not
come again (the tokenizer's own beginning where it has one), then different random tokens, then the same ones again.
Scores are those of ``heads.py``, of all positions that have a say; the copying score is of the weights alone.

Source: Olsson et al., "In-context Learning and Induction Heads" (2022).
"""

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..activations import id_list
from ..errors import HookError
from ..model import HookedModel, Tokens
from ..options import options, options_of
from .composition import copying_scores
from .eval_data import MOST, together
from .head_weights import chosen_layers
from .heads import DETECTORS, HeadScore, mean_attention
from .intervals import Estimate, IntervalOptions, few, means
from .patterns import has_pattern, layer_patterns
from .progress import Passes, Progress

COPYING = "copying"
HOW = {name: f"mean attention to {detector.looks_at}" for name, detector in DETECTORS.items()} | {
    COPYING: "sum(l) / sum(|l|) of the eigenvalues l of embedding @ value @ output @ unembedding; from weights"
}


@options
class DetectionOptions(IntervalOptions):
    """Options of :func:`detect_heads`, besides those of :class:`IntervalOptions`.

    Args:
        layers: whose heads; None for all.
        sequences: random ones that are made.
        length: different random tokens, which are said twice; fewer where the model has fewer tokens or positions.
        copying: whether the copying score is told as well.
        batch_size: sequences of one length that run at once, fewer of long ones.
        seed: of the tokens and the resamples.
    """

    layers: Sequence[int] | None = None
    sequences: Annotated[int, Field(ge=1, le=1024)] = 16
    length: Annotated[int, Field(ge=2, le=1024)] = 25
    copying: bool = True
    batch_size: Annotated[int, Field(ge=1, le=256)] = 8


@dataclass(frozen=True, eq=False)
class HeadDetection:
    """How strongly each head follows each rule.

    Args:
        model: what the model is called.
        tokens_from: "random tokens said twice" or "prompts".
        sequences: how many were read.
        length: different random tokens of each; None where prompts were read.
        heads: (layer, head) of each entry of the scores.
        scores: by rule an estimate per head, the mean over the sequences that have a say; copying has no interval.
        chance: by rule the score of a head that attends to all keys that it sees alike.
        reasons: why a rule, or a layer ("L3"), has no scores.
        warnings: what is to be said of the intervals, and of sequences shorter than was asked.
    """

    model: str
    tokens_from: str
    sequences: int
    length: int | None
    heads: tuple[tuple[int, int], ...]
    scores: Mapping[str, Sequence[Estimate]]
    chance: Mapping[str, float]
    reasons: Mapping[str, str]
    warnings: Sequence[str] = ()

    def ranked(self, rule: str) -> list[HeadScore]:
        """All heads that have a score by a rule, the strongest first.

        Raises:
            HookError: for a rule that there is not, and one without scores, with the reason.
        """
        if rule not in self.scores:
            if rule in self.reasons:
                raise HookError(f"There are no {rule} scores: {self.reasons[rule]}.")
            raise HookError(f"There is no rule {rule!r}: there are {', '.join(HOW)}.", field="rule")
        by_layer = [
            HeadScore(layer, head, one.mean)
            for (layer, head), one in zip(self.heads, self.scores[rule], strict=True)
            if one.mean is not None
        ]
        return sorted(by_layer, key=lambda one: (-one.score, one.layer, one.head))

    def best(self, rule: str) -> HeadScore:
        """The head that follows a rule most strongly."""
        found = self.ranked(rule)
        if not found:
            raise HookError(f"No head has a {rule} score.")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "model": self.model,
            "tokens_from": self.tokens_from,
            "sequences": self.sequences,
            "length": self.length,
            "how_computed": {rule: HOW[rule] for rule in self.scores},
            "chance": dict(self.chance),
            "heads": [
                {
                    "name": f"L{layer}H{head}",
                    "layer": layer,
                    "head": head,
                    "scores": {rule: found[i].to_dict() for rule, found in self.scores.items()},
                }
                for i, (layer, head) in enumerate(self.heads)
            ],
            "not_told": dict(self.reasons),
            "warnings": list(self.warnings),
        }


def detect_heads(
    model: HookedModel,
    prompts: Iterable[Tokens] | None = None,
    options: DetectionOptions | dict | None = None,
    progress: Progress = None,
) -> HeadDetection:
    """How strongly each head follows each rule of ``DETECTORS``, and how far it copies.

        found = detect_heads(model)
        found.best("induction")             # L2H1 0.93
        found.ranked("previous_token")[:3]

    Args:
        prompts: texts or rows of ids in place of random tokens; all of a list, of what has no length the first MOST.
        progress: called with what is done and to do: each layer of each sequence.

    Raises:
        HookError: for no prompts, one that is longer than the model reads, a model that reads too few tokens, and
            layers that there are not or that all have no pattern.
    """
    chosen = options_of(DetectionOptions, options)
    layers = chosen_layers(model, chosen.layers)
    reasons = {f"L{layer}": why for layer in layers if (why := has_pattern(model, layer))}
    shown = [layer for layer in layers if f"L{layer}" not in reasons]
    if not shown:
        why = next(iter(reasons.values()))
        raise HookError(f"{model.cfg.model_type} has no layer whose heads can be scored: {why}.")
    rows = _random(model, chosen) if prompts is None else _given(model, prompts)
    names = [(layer, head) for layer in shown for head in range(model.architecture.n_query_heads(layer))]
    values = {rule: np.full((len(rows), len(names)), np.nan) for rule in DETECTORS}
    chance = {rule: np.full((len(rows), len(names)), np.nan) for rule in DETECTORS}
    passes = Passes(progress, len(rows) * len(shown))
    for at in together([len(row) for row in rows], chosen.batch_size):
        tokens = np.array([rows[i] for i in at])
        for found in layer_patterns(model, tokens, shown):
            columns = [i for i, (layer, _) in enumerate(names) if layer == found.layer]
            for row, i in enumerate(at):
                for rule, (own, alike) in rule_scores(found.pattern[row], found.visible[row], tokens[row]).items():
                    values[rule][i, columns], chance[rule][i, columns] = own, alike
            # Of long sequences each layer is a pass of its own.
            passes.passed(len(at))
    for rule, detector in DETECTORS.items():
        if not np.isfinite(values[rule]).any():
            reasons[rule] = detector.needs
    told: dict[str, Sequence[Estimate]] = {}
    for rule in DETECTORS:
        if rule not in reasons:
            told[rule] = means(values[rule], **chosen.of_intervals)
            passes.tell()
    by_chance = {rule: float(np.nanmean(chance[rule])) for rule in told}
    if chosen.copying:
        told, reasons = _with_copying(model, shown, names, told, reasons)
    tokens_from = "random tokens said twice" if prompts is None else "prompts"
    length = None if prompts is not None else len(rows[0]) // 2
    warnings = few(len(rows), "sequences", are_ratios=False)
    if length is not None and length < chosen.length:
        warnings.append(f"The model has room for {length} tokens said twice, not for {chosen.length}.")
    about = (model.model_name, tokens_from, len(rows), length)
    return HeadDetection(*about, tuple(names), told, by_chance, reasons, warnings)


def _with_copying(
    model: HookedModel,
    layers: Sequence[int],
    names: Sequence[tuple[int, int]],
    told: Mapping[str, Sequence[Estimate]],
    reasons: Mapping[str, str],
) -> tuple[dict[str, Sequence[Estimate]], dict[str, str]]:
    try:
        found = copying_scores(model, layers)
    except HookError as error:
        return dict(told), {**reasons, COPYING: str(error).rstrip(".")}
    if not found.scores:
        return dict(told), {**reasons, COPYING: next(iter(found.reasons.values()))}
    nothing = Estimate(None, None, None, 0)
    estimates = []
    for layer, head in names:
        score = float(found.scores[layer][head]) if layer in found.scores else np.nan
        # It is of the weights, of which there is one set: no mean, and no interval.
        estimates.append(Estimate(score, None, None, 1) if np.isfinite(score) else nothing)
    return {**told, COPYING: estimates}, dict(reasons)


def rule_scores(pattern: np.ndarray, visible: np.ndarray, tokens: np.ndarray) -> dict[str, tuple[np.ndarray, float]]:
    """By rule the heads' scores [head], and that of a head which attends to all keys that it sees alike.

    Queries count that see some key which counts: a sliding window hides others. Rules without any are left out.

    Args:
        pattern: [head, query, key].
        visible: [query, key] of bool.
        tokens: ids [pos].
    """
    found = {}
    for rule, detector in DETECTORS.items():
        counted = detector.keys(tokens) & visible
        if counted.any():
            found[rule] = (mean_attention(pattern, counted), chance_of(counted, visible))
    return found


def chance_of(counted: np.ndarray, visible: np.ndarray) -> float:
    """The score of a head that attends to all keys that it sees alike."""
    queries = counted.any(axis=1)
    return float((counted.sum(axis=1)[queries] / visible.sum(axis=1)[queries]).mean())


def _random(model: HookedModel, chosen: DetectionOptions) -> list[list[int]]:
    """Rows of ids: a token that does not come again, then random ones twice."""
    cfg = model.cfg
    tokenizer = model.tokenizer
    start = getattr(tokenizer, "bos_token_id", None)
    special = set(getattr(tokenizer, "all_special_ids", None) or [])
    # Models may have rows for tokens that no text has: these were never trained.
    known = getattr(tokenizer, "vocab_size", None) or cfg.d_vocab
    plain = [token for token in range(min(known, cfg.d_vocab)) if token not in special and token != start]
    most = len(plain) - (start is None)
    if cfg.max_positions is not None:
        most = min(most, (cfg.max_positions - 1) // 2)
    length = min(chosen.length, most)
    if length < 2:
        raise HookError(
            f"Random tokens said twice need at least 2 different tokens and 5 positions: {cfg.model_type} has "
            f"{cfg.d_vocab} tokens and {cfg.max_positions} positions."
        )
    generator = np.random.default_rng(chosen.seed)
    rows = []
    for _ in range(chosen.sequences):
        first, *words = generator.permutation(plain)[: length + (start is None)].tolist()
        if start is not None:
            first, words = start, [first, *words]
        rows.append([first, *words, *words])
    return rows


def _given(model: HookedModel, prompts: Iterable[Tokens]) -> list[list[int]]:
    if isinstance(prompts, str):
        raise HookError("Prompts are a list of texts or of rows of ids, got one text.", field="prompts")
    if not isinstance(prompts, Iterable):
        raise HookError(f"Prompts are a list of texts or of rows of ids, got {prompts!r}.", field="prompts")
    rows: list[list[int]] = []
    for prompt in prompts if isinstance(prompts, Sized) else islice(prompts, MOST):
        tokens = model.to_tokens(prompt)
        if tokens.shape[0] != 1:
            raise HookError(f"Prompt {len(rows)} has {tokens.shape[0]} rows: give them one by one.", field="prompts")
        if model.cfg.max_positions is not None and tokens.shape[1] > model.cfg.max_positions:
            raise HookError(
                f"Prompt {len(rows)} has {tokens.shape[1]} tokens; at most {model.cfg.max_positions} are read.",
                field=f"prompts[{len(rows)}]",
            )
        rows.append(id_list(tokens[0]))
    if not rows:
        raise HookError("There are no prompts: give at least one.", field="prompts")
    return rows
