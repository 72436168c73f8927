"""Scores of traits while a model reads a prompt and goes on from it, token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ...activations import CapturedActivation, id_list
from ...errors import HookError
from ...generation import GenerationStep
from ...interventions import InterventionReceipt
from ...manager import HookSpec
from ...model import HookedModel, Interventions, Tokens
from ...reductions import Projection
from ...sampling import whole_number
from ...token_text import TokenText
from ..identity import ModelIdentity
from .prompts import Chat, render
from .vectors import TraitVector, check_vectors


@dataclass(frozen=True)
class TraitStep:
    """The scores of the tokens that one pass read: of the whole prompt, then of each generated token.

    Args:
        positions: absolute ones, of these tokens.
        token_ids, tokens: what stands there, as ids and as texts.
        phase: "prompt" or "response".
        scores: [pos, trait], float32: of the state at each token, which has read it.
        finish_reason: with the last step "stop" (an end token or a stop string) or "length"; else None.
        interventions: with the last step, a receipt per intervention.
        text: of the response, what became certain with this token; without an end token and a stop string.
    """

    positions: range
    token_ids: list[int]
    tokens: list[str]
    phase: str
    scores: np.ndarray
    finish_reason: str | None
    interventions: tuple[InterventionReceipt, ...] = ()
    text: str = ""


def watch_traits(
    model: HookedModel,
    prompt: Tokens,
    vectors: Sequence[TraitVector],
    *,
    chat: Chat | None = None,
    max_tokens: int = 50,
    normalize: bool = True,
    interventions: Interventions = (),
    other_model: bool = False,
    **options: Any,
) -> Iterator[TraitStep]:
    """Follow traits through a prompt and what the model says to it, each at its own layer, in one pass per token.

        for step in watch_traits(model, "The capital of France is", [vector], chat=vector.chat, max_tokens=5):
            print(step.tokens, step.scores[:, 0])

    Args:
        prompt: a text, or token ids.
        vectors: what is measured, in the order of the scores.
        chat: how a text is put to the model: ``Chat()`` is its own template; None is the text as it is. Token ids are
            put already.
        max_tokens: most tokens to generate; 0 only reads the prompt. No more than the model's context holds.
        normalize: measure h . v / |v|; False measures h . v.
        interventions: edits, as in ``HookedModel.generate``; scores show the edited stream.
        other_model: let vectors of other weights pass, if they fit. Comparing reads all weights.
        options: sampling, ``stop`` and others of ``HookedModel.generate_steps``.

    Raises:
        HookError: for several prompts, token ids with a chat, no vectors, one of another model, width or layer, and for
            what ``generate`` refuses.
    """
    if chat is not None:
        if not isinstance(prompt, str):
            raise HookError("chat is how a text is put to a model: token ids are put already.", field="chat")
        prompt = render(model, prompt, chat)
    rows = model.to_tokens(prompt)
    if len(rows) != 1:
        raise HookError(f"Traits are watched on one prompt, got {len(rows)} rows.", field="prompt")
    tokens = id_list(rows[0])
    whole_number("max_tokens", max_tokens)
    check_vectors(vectors)
    _check_model(model, vectors, other_model)
    capture = _captures(model, vectors, normalize)
    steps = model.generate_steps(
        tokens,
        max_tokens=min(max_tokens, room_for(model, tokens)),
        capture=capture,
        interventions=interventions,
        read_last=True,
        **options,
    )
    return _steps(model, steps, tokens, capture, vectors)


def _check_model(model: HookedModel, vectors: Sequence[TraitVector], other_model: bool) -> None:
    """Refuse vectors of another model, width or layer; see :meth:`TraitVector.check`."""
    is_compared = not other_model and any(vector.identity is not None for vector in vectors)
    identity = ModelIdentity.of(model) if is_compared else None
    for vector in vectors:
        vector.check(model, other_model=other_model, identity=identity)


def room_for(model: HookedModel, tokens: Sequence[int]) -> int:
    """How many tokens can be generated after some, and read, within the model's context.

    Raises:
        HookError: when these alone are more than it reads.
    """
    limit = model.cfg.max_positions
    if limit is None:
        return 2**31
    if len(tokens) > limit:
        raise HookError(f"The prompt has {len(tokens)} tokens; the model reads at most {limit}.", field="prompt")
    return limit - len(tokens)


def _captures(model: HookedModel, vectors: Sequence[TraitVector], normalize: bool) -> list[HookSpec]:
    """One hook per layer, which measures all vectors of that layer; its id is the hook point."""
    by_point: dict[str, list[np.ndarray]] = {}
    for vector in vectors:
        by_point.setdefault(vector.hook_point, []).append(vector.unit if normalize else vector.vector)
    return [HookSpec(hook_point=name, reduce=Projection(mx.array(np.stack(rows)))) for name, rows in by_point.items()]


def _steps(
    model: HookedModel,
    steps: Iterator[GenerationStep],
    prompt: list[int],
    capture: Sequence[HookSpec],
    vectors: Sequence[TraitVector],
) -> Iterator[TraitStep]:
    spelling = TokenText(model.tokenizer)
    ids = list(prompt)
    begins = 0
    text = ""
    for step in steps:
        scores = _scores(step.activations, capture, vectors)
        read = range(begins, len(ids))
        begins = len(ids)
        read_ids = ids[read.start : read.stop]
        yield TraitStep(
            positions=read,
            token_ids=read_ids,
            tokens=[spelling.text(token) for token in read_ids],
            phase="response" if read.start else "prompt",
            scores=scores,
            finish_reason=step.finish_reason,
            interventions=step.interventions,
            text=text,
        )
        text = step.text
        if step.token is not None:
            ids.append(step.token)


def _scores(
    activations: dict[str, list[CapturedActivation]], capture: Sequence[HookSpec], vectors: Sequence[TraitVector]
) -> np.ndarray:
    """[pos, trait] in the order of the vectors, from one record per layer."""
    columns: dict[str, Iterator[np.ndarray]] = {}
    for spec in capture:
        # Of a layer that runs several times, what leaves it in the end.
        record = max(activations[spec.hook_id], key=lambda found: found.pass_index)
        if record.value.ndim != 3:
            raise HookError(
                f"{spec.hook_point} is {', '.join(record.hook_point.axes)}: a trait is measured in one stream.",
                field="vectors",
            )
        columns[spec.hook_id] = iter(record.numpy()[0].T)
    return np.stack([next(columns[vector.hook_point]) for vector in vectors], axis=-1)
