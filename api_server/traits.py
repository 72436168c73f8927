"""Watching traits: the job on the worker, and what its steps are answered as. No transport here.

steps = watch(loaded, request, vectors, edits)      # on the worker thread
body = WatchReply("neuroscope-tiny", vectors, request).whole(steps)
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.traits.dynamics import trait_dynamics
from mlx_hooks.analysis.traits.prompts import put
from mlx_hooks.analysis.traits.vectors import TraitVector
from mlx_hooks.analysis.traits.watching import TraitStep, watch_traits
from mlx_hooks.interventions import InterventionPlan

from . import inference
from .errors import ApiError
from .jobs import Progress
from .models import LoadedModel
from .schemas.analysis import TraitsRequest
from .schemas.fields import MAX_SCORES


def watch(
    loaded: LoadedModel, asked: TraitsRequest, vectors: Sequence[TraitVector], edits: InterventionPlan
) -> Generator[TraitStep | Progress, None, None]:
    """The scores of the prompt, then those of one generated token at a time; closing it stops the model.

    Raises:
        ApiError: the prompt cannot be read, a vector belongs to another model, or the reply would be too long.
    """
    model = loaded.model
    for vector in vectors:
        _check(vector, loaded)
    tokens = _tokens(model, asked, vectors)
    limit = min(asked.token_limit, inference.room_for(model, tokens))
    most = len(tokens) + limit
    if most * len(vectors) > MAX_SCORES:
        raise ApiError(
            400,
            f"The reply could list {most * len(vectors)} scores, {most} tokens of {len(vectors)} traits; at most "
            f"{MAX_SCORES} are allowed.",
            code="limit_exceeded",
            param="max_tokens",
        )
    yield Progress(0.0, f"reading {len(tokens)} tokens")
    steps = watch_traits(
        model,
        tokens,
        vectors,
        max_tokens=limit,
        normalize=asked.normalize,
        interventions=edits,
        # They are checked above, against an identity that is made once.
        other_model=True,
        **inference.sampling_of(model, asked),
    )
    for done, step in enumerate(steps):
        yield step
        yield Progress(done / limit if limit else 1.0, f"{done} of at most {limit} tokens")


def _check(vector: TraitVector, loaded: LoadedModel) -> None:
    # Making the identity reads all weights.
    identity = loaded.identity if vector.identity is not None else None
    try:
        vector.check(loaded.model, identity=identity)
    except HookError as error:
        raise ApiError(400, str(error), code="other_model", param="experiment") from error


def _tokens(model: HookedModel, asked: TraitsRequest, vectors: Sequence[TraitVector]) -> list[int]:
    """Of the prompt as it is, or as the prompts were put that the stored vectors were made of."""
    if not (asked.stored_chat and isinstance(asked.prompt, str)):
        return inference.prompt_tokens(model, asked.source)
    found: dict[tuple[int, ...], str] = {}
    for vector in vectors:
        if vector.path is not None:
            # Too long a prompt is refused as any other is.
            found.setdefault(tuple(put(model, asked.prompt, vector.chat)), vector.trait)
    if len(found) > 1:
        first, second, *_ = found.values()
        raise ApiError(
            400,
            f"{first} and {second} were made of prompts that were put differently: name traits of one way in 'traits'.",
            code="invalid_value",
            param="stored_chat",
        )
    return list(next(iter(found)))


@dataclass
class _Watched:
    """All steps so far."""

    ids: list[int]
    strings: list[str]
    scores: list[np.ndarray]
    prompt_length: int = 0
    finish_reason: str | None = None
    interventions: tuple[Any, ...] = ()

    def add(self, step: TraitStep) -> None:
        self.ids += step.token_ids
        self.strings += step.tokens
        self.scores.append(step.scores)
        if step.phase == "prompt":
            self.prompt_length = len(self.ids)
        self.finish_reason, self.interventions = step.finish_reason, step.interventions


class WatchReply:
    """The reply to one request: fed with a job's results, it answers as a whole or as events."""

    def __init__(self, model_id: str, vectors: Sequence[TraitVector], asked: TraitsRequest) -> None:
        self._model_id = model_id
        self._vectors = vectors
        self._names = [vector.trait for vector in vectors]
        self._settings = asked.dynamics_settings
        self._seen = _Watched([], [], [])

    def whole(self, results: Iterator[TraitStep]) -> dict[str, Any]:
        """One object with the scores of all tokens."""
        scores: list[dict[str, Any]] = []
        text: list[str] = []
        for step in results:
            self._seen.add(step)
            scores += self._rows(step)
            text.append(step.text)
        return {**self._opening(), "scores": scores, "text": "".join(text), **self._closing()}

    def events(self, results: Iterator[TraitStep]) -> Iterator[dict[str, Any]]:
        """The prompt's scores, then one object per generated token, then the accounts."""
        opening = self._opening()
        for step in results:
            self._seen.add(step)
            yield {**opening, "scores": self._rows(step), "text": step.text}
            opening = {}
        yield {"scores": [], "text": "", **self._closing()}

    def _opening(self) -> dict[str, Any]:
        traits = [
            {
                "name": vector.trait,
                "layer": vector.layer,
                "hook_point": vector.hook_point,
                "method": vector.method,
                "norm": vector.norm,
                "threshold": vector.threshold,
                "chat": None if vector.chat is None else vector.chat.to_dict(),
            }
            for vector in self._vectors
        ]
        return {"model": self._model_id, "traits": traits}

    def _rows(self, step: TraitStep) -> list[dict[str, Any]]:
        rows = zip(step.positions, step.token_ids, step.tokens, step.scores, strict=True)
        return [
            {
                "position": position,
                "token_id": token_id,
                "token": token,
                "phase": step.phase,
                # As float32, whose shortest digits are written.
                "scores": dict(zip(self._names, scores, strict=True)),
            }
            for position, token_id, token, scores in rows
        ]

    def _closing(self) -> dict[str, Any]:
        seen = self._seen
        n_new = len(seen.ids) - seen.prompt_length
        return {
            "dynamics": self._dynamics(),
            "finish_reason": seen.finish_reason,
            "usage": {
                "prompt_tokens": seen.prompt_length,
                "completion_tokens": n_new,
                "total_tokens": len(seen.ids),
            },
            "tokens": {"ids": seen.ids, "strings": seen.strings, "prompt_length": seen.prompt_length},
            "interventions": [receipt.to_dict() for receipt in seen.interventions],
        }

    def _dynamics(self) -> dict[str, dict[str, Any] | None]:
        """By trait, of the response's tokens, or of the prompt's where there are no others."""
        scores = np.concatenate(self._seen.scores[1:] or self._seen.scores)
        return {
            # Numbers that left float32 have no differences.
            name: trait_dynamics(row, **self._settings).to_dict() if np.isfinite(row).all() else None
            for name, row in zip(self._names, scores.T, strict=True)
        }
