"""Traits while a model answers prompts: the score at each token, and how it moves.

1. A prompt is put to the model as each trait's chat says. Traits that put it as the same tokens share a generation.
2. In each pass the stream is met where it leaves the layers that have a vector, and h.v/|v| computed there.
3. The scores of the response (or of prompt and response) give velocity, commitment, peak and persistence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
from tqdm import tqdm

from ...errors import HookError
from ...interventions import InterventionPlan
from ...model import HookedModel, Interventions
from ...sampling import Sampling, whole_number
from ...storage.metadata import plain_interventions
from ..identity import ModelIdentity
from .dynamics import THRESHOLD, trait_dynamics
from .prompts import render
from .vectors import TraitVector, check_vectors
from .watching import TraitStep, watch_traits

FORMAT = "neuroscope.trait_dynamics/1"
PARTS = ("response", "all")
"""Whose scores the dynamics are of: the response's, or those of prompt and response in one row."""


@dataclass(frozen=True)
class Monitoring:
    """How prompts are answered, and what is called a commitment.

    Args:
        max_tokens: most tokens to generate; no more than the model's context holds.
        temperature, top_p, seed: see ``sampling.Sampling``.
        tokens: "response" or "all".
        threshold, relative, stays_below: see :func:`trait_dynamics`.

    Raises:
        HookError: for what none of the above allows.
    """

    max_tokens: int = 50
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int | None = 0
    tokens: str = "response"
    threshold: float = THRESHOLD
    relative: bool = False
    stays_below: bool = False

    def __post_init__(self) -> None:
        whole_number("max_tokens", self.max_tokens)
        Sampling(**self.sampling).check()
        if self.tokens not in PARTS:
            raise HookError(f"tokens is one of {', '.join(PARTS)}, got {self.tokens!r}.", field="tokens")
        trait_dynamics([], **self.commitment)

    @property
    def sampling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}

    @property
    def commitment(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "relative": self.relative, "stays_below": self.stays_below}


def monitor_dynamics(
    model: HookedModel,
    prompts: Sequence[str],
    vectors: Sequence[TraitVector],
    *,
    max_tokens: int = 50,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int | None = 0,
    tokens: str = "response",
    threshold: float = THRESHOLD,
    relative: bool = False,
    stays_below: bool = False,
    interventions: Interventions = (),
    errors: str = "raise",
    progress: bool = False,
) -> dict[str, Any]:
    """Scores and dynamics of traits on prompts, each trait at its own layer.

        vector = Experiment("experiments", "demo").trait("polite").find()
        found = monitor_dynamics(model, ["What is the capital of France ?"], [vector], max_tokens=20)
        found["results"][0]["traits"]["polite"]["probe"]["dynamics"]["commitment_point"]

    Args:
        prompts: texts, each put to the model as a vector's ``chat`` says.
        vectors: of a trait and a method at most one.
        max_tokens, temperature, top_p, seed, tokens, threshold, relative, stays_below: see :class:`Monitoring`.
        interventions: edits that are made while the model answers; the scores show the edited stream.
        errors: "raise" what goes wrong, or "collect" it under "failed" and do the rest.
        progress: show a progress bar on the error stream.

    Returns:
        plain JSON values: ``metadata``; ``results``, one for each prompt and way of putting it, with ``prompt``,
        ``response`` and ``traits``: trait -> method -> layer, vector_path, norm, threshold (the class boundary), scores
        of prompt and response, and ``dynamics``; ``failed``, of which each says ``trait``, ``method``, ``prompt_index``
        (None for all) and ``error``.

    Raises:
        HookError: for prompts or vectors that are none, two vectors of one trait and method, a vector of another model,
            a prompt that is empty or too long, and settings that are not allowed.
    """
    asked = Monitoring(max_tokens, temperature, top_p, seed, tokens, threshold, relative, stays_below)
    if errors not in ("raise", "collect"):
        raise HookError(f"errors is 'raise' or 'collect', got {errors!r}.", field="errors")
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise HookError("prompts is a list of at least one text.", field="prompts")
    check_vectors(vectors)
    _check_names(vectors)
    failed: list[dict[str, Any]] = []
    plan = model.resolve_interventions(interventions)
    usable = []
    identity = ModelIdentity.of(model)
    for vector in vectors:
        try:
            usable.append(vector.check(model, identity=identity))
        except HookError as error:
            _fail(failed, [vector], None, error, errors)
    results = []
    for i, prompt in enumerate(tqdm(prompts, desc="prompts", unit="prompt", disable=not progress)):
        for ids, group in _renderings(model, i, prompt, usable, failed, errors):
            try:
                results.append({"prompt_index": i, **_answer(model, prompt, ids, group, asked, plan)})
            except HookError as error:
                _fail(failed, group, i, error, errors)
    metadata = {
        "model": model.model_name,
        "model_identity": identity.to_dict(),
        "capture_date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **asdict(asked),
        "score": "h.v/|v|",
        "interventions": plain_interventions(plan),
    }
    return {"format": FORMAT, "metadata": metadata, "results": results, "failed": failed}


def text_parts(prompt: str, steps: Sequence[TraitStep]) -> dict[str, Any]:
    """What was read and what was said, as the results tell it: ``prompt`` and ``response`` of the steps of a run."""
    found: dict[str, dict[str, Any]] = {}
    for part in ("prompt", "response"):
        own = [step for step in steps if step.phase == part]
        ids = [token for step in own for token in step.token_ids]
        text = prompt if part == "prompt" else "".join(step.text for step in own)
        tokens = [token for step in own for token in step.tokens]
        found[part] = {"text": text, "tokens": tokens, "token_ids": ids, "n_tokens": len(ids)}
    found["response"]["finish_reason"] = steps[-1].finish_reason
    return found


def scores_of(steps: Sequence[TraitStep], phase: str, n_vectors: int) -> np.ndarray:
    """Scores [pos, trait] of one phase of a run."""
    rows = [step.scores for step in steps if step.phase == phase]
    return np.concatenate(rows) if rows else np.zeros((0, n_vectors), np.float32)


def _check_names(vectors: Sequence[TraitVector]) -> None:
    seen = set()
    for vector in vectors:
        if (vector.trait, vector.method) in seen:
            raise HookError(
                f"There are two vectors of {vector.trait} by {vector.method}: monitor one layer at a time.",
                field="vectors",
            )
        seen.add((vector.trait, vector.method))


def _renderings(
    model: HookedModel,
    index: int,
    prompt: str,
    vectors: Sequence[TraitVector],
    failed: list[dict[str, Any]],
    errors: str,
) -> Iterator[tuple[list[int], list[TraitVector]]]:
    """The ways in which traits put a prompt to the model, as tokens, and the traits that put it so."""
    groups: dict[tuple[int, ...], list[TraitVector]] = {}
    for vector in vectors:
        try:
            groups.setdefault(tuple(render(model, prompt, vector.chat)), []).append(vector)
        except HookError as error:
            _fail(failed, [vector], index, error, errors)
    for tokens, group in groups.items():
        yield list(tokens), group


def _answer(
    model: HookedModel,
    prompt: str,
    tokens: list[int],
    vectors: Sequence[TraitVector],
    asked: Monitoring,
    plan: InterventionPlan,
) -> dict[str, Any]:
    """One generation, and what all traits do in it."""
    # The vectors were checked, once for all prompts.
    options = {"max_tokens": asked.max_tokens, "other_model": True, **asked.sampling}
    steps = list(watch_traits(model, tokens, vectors, interventions=plan, **options))
    scores = {part: scores_of(steps, part, len(vectors)) for part in ("prompt", "response")}
    traits: dict[str, dict[str, Any]] = {}
    for column, vector in enumerate(vectors):
        own = {part: found[:, column].astype(np.float64).tolist() for part, found in scores.items()}
        followed = own["response"] if asked.tokens == "response" else own["prompt"] + own["response"]
        traits.setdefault(vector.trait, {})[vector.method] = {
            "layer": vector.layer,
            "vector_path": None if vector.path is None else vector.path.as_posix(),
            "norm": vector.norm,
            "threshold": vector.threshold,
            "scores": own,
            "dynamics": {"tokens": asked.tokens, **trait_dynamics(followed, **asked.commitment).to_dict()},
        }
    receipts = [receipt.to_dict() for receipt in steps[-1].interventions]
    return {**text_parts(prompt, steps), "traits": traits, "interventions": receipts}


def _fail(
    failed: list[dict[str, Any]],
    vectors: Sequence[TraitVector],
    prompt_index: int | None,
    error: HookError,
    errors: str,
) -> None:
    """Keep an error, or raise it."""
    if errors == "raise":
        raise error
    about: Mapping[str, Any] = {"prompt_index": prompt_index, "error": str(error)}
    failed += [{"trait": vector.trait, "method": vector.method, **about} for vector in vectors]
