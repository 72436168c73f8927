"""Vectors of a trait, from prompts that have it and prompts that have not.

1. Every prompt runs once; of each layer's stream the mean over the span's tokens is kept, nothing else.
2. Some prompts of each class are held out.
3. Each method makes a vector per layer of the others, and is judged by those.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, cast

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ... import hook_points
from ...activations import CapturedActivation, id_list, to_numpy
from ...errors import HookError
from ...manager import HookSpec
from ...model import HookedModel
from ...sampling import whole_number
from ..identity import ModelIdentity
from .methods import PRECISION, Classes, NoDirection, judge
from .prompts import Chat, render
from .vectors import METHODS, TraitVector
from .watching import room_for

Prompt = str | Sequence[int]
"""A text, or token ids, which are taken as they are."""
HeldOut = float | tuple[Sequence[Prompt], Sequence[Prompt]]
"""The share of the prompts that is held out, or positive and negative prompts of their own."""
SPANS = "last, prompt, response or start:stop"
MAX_NEW_TOKENS = 32
_CLASSES = ("positive", "negative")
_SPLIT_FROM = 5
"""Different prompts that each class needs for some to be held out."""


def extract_vectors(
    model: HookedModel,
    positive: Sequence[Prompt],
    negative: Sequence[Prompt],
    *,
    trait: str,
    methods: Sequence[str] = METHODS,
    layers: Sequence[int] | None = None,
    span: str = "last",
    held_out: HeldOut = 0.2,
    chat: Chat | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
    progress: bool = False,
) -> list[TraitVector]:
    """Vectors that point from prompts without a trait to prompts with it, per layer and method.

        vectors = extract_vectors(model, positive, negative, trait="sum", layers=[2, 3], methods=["probe"])
        vectors[0].metadata["held_out_accuracy"]
        vectors[0].save("experiments/tests/sum/extraction/vectors")

    Args:
        positive, negative: texts, or rows of token ids, with and without the trait.
        trait: its name.
        methods: see :func:`methods.fit`.
        layers: whose output is taken, negative ones from the last; None for all.
        span: which tokens' states are averaged: "last", the prompt's last one; "prompt", all of them but the special
            tokens that it begins with (the state at the first is often huge, and the same for every prompt);
            "response", those that the model answers, an end token included; or "start:stop", a slice of the prompt's
            tokens, negative numbers from the end, which has to lie in every prompt.
        held_out: the share of each class (at least one prompt) that judges the vectors and is no part of them, where
            both classes have five different prompts; a prompt that is there twice is on one side. Or (positive,
            negative) prompts of their own.
        chat: how texts are put to the model; None for the model's own chat template, if it has one.
        max_new_tokens: of a response, which is greedy.
        seed: of the split, and of the methods that draw.
        progress: show a progress bar.

    Returns:
        vectors by layer, then in the order of the methods. Their ``metadata`` has span, n_positive, n_negative,
        accuracy, held_out_accuracy (None without held-out prompts), effect_size (of held-out prompts where each class
        has two) and what the method tells.

    Raises:
        HookError: for classes that are empty, smaller than two or share a prompt, a span outside a prompt, activations
            that are not finite, and (NoDirection) where nothing distinguishes the classes in any of the layers. Of
            layers below what distinguishes them there is no vector, which a warning says.
    """
    examples = Examples.of(
        model,
        positive,
        negative,
        span=span,
        held_out=held_out,
        chat=chat,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    wanted = [(layer, method) for layer in layers_of(model, layers) for method in methods_of(methods)]
    vectors = examples.vectors(model, trait, wanted, progress=progress)
    if missing := without_direction(wanted, vectors):
        warnings.warn(f"{trait}: {missing}.", stacklevel=2)
    return vectors


@dataclass(frozen=True)
class Span:
    """Which tokens' states stand for a prompt.

    >>> Span.of("-3:").positions([7, 8, 9, 10], special=())
    range(1, 4)

    Args:
        name: "last", "prompt", "response" or a slice.
        start, stop: of a slice.
    """

    name: str
    start: int | None = None
    stop: int | None = None

    @classmethod
    def of(cls, span: Any) -> "Span":
        """A span by its name.

        Raises:
            HookError: lists what there is.
        """
        ends = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*", span) if isinstance(span, str) else None
        if ends is None and span not in ("last", "prompt", "response"):
            raise HookError(f"A span is {SPANS}, got {span!r}.", field="span")
        if ends is None:
            return cls(span)
        start, stop = (None if end is None else int(end) for end in ends.groups())
        return cls(f"{'' if start is None else start}:{'' if stop is None else stop}", start, stop)

    def positions(self, tokens: Sequence[int], special: Iterable[int]) -> range:
        """The positions in a prompt; of "response", those that follow it.

        Raises:
            HookError: when there are none, or some lie outside the prompt.
        """
        n = len(tokens)
        if self.name == "response":
            return range(n, n)
        if self.name == "last":
            return range(n - 1, n)
        if self.name == "prompt":
            passed = set(special)
            start = next((i for i, token in enumerate(tokens) if token not in passed), n)
            if start == n:
                raise HookError("The prompt has special tokens only.", field="span")
            return range(start, n)
        start = 0 if self.start is None else self.start + n * (self.start < 0)
        stop = n if self.stop is None else self.stop + n * (self.stop < 0)
        if not 0 <= start < stop <= n:
            raise HookError(f"The span {self.name} is not in the prompt, which has {n} tokens.", field="span")
        return range(start, stop)


@dataclass(frozen=True)
class Example:
    """A prompt's tokens, and what an error calls it; two with the same tokens are equal."""

    tokens: tuple[int, ...]
    name: str = field(compare=False)


@dataclass(frozen=True)
class Examples:
    """Prompts as tokens, checked and split: what vectors are made of.

    Args:
        fitted, held_out: positive and negative ones.
        recipe: what was asked for, as plain JSON values: span, seed, held_out, max_new_tokens of a response.
        chat: how texts were put to the model; None where only tokens were given.
    """

    fitted: tuple[list[Example], list[Example]]
    held_out: tuple[list[Example], list[Example]]
    span: Span
    recipe: dict[str, Any] = field(default_factory=dict)
    chat: Chat | None = None

    @classmethod
    def of(
        cls,
        model: HookedModel,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        *,
        span: str = "last",
        held_out: HeldOut = 0.2,
        chat: Chat | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
    ) -> "Examples":
        """Arguments and errors are those of :func:`extract_vectors`."""
        meant = Span.of(span)
        whole_number("seed", seed)
        whole_number("max_new_tokens", max_new_tokens)
        share = _share(held_out)
        given = [_read(model, each, chat, name) for each, name in zip((positive, negative), _CLASSES, strict=True)]
        for examples, name in zip(given, _CLASSES, strict=True):
            if (n := len(_distinct(examples))) < 2:
                same = ": texts that come to the same tokens count once" if len(examples) > n else ""
                raise HookError(f"A vector needs two different {name} prompts at least, got {n}{same}.", field=name)
        _check_apart(given[0], given[1], "is among the negative prompts too")
        if share is None:
            own = cast(tuple[Sequence[Prompt], Sequence[Prompt]], held_out)
            held = [_read(model, each, chat, f"held-out {name}") for each, name in zip(own, _CLASSES, strict=True)]
            _check_apart(held[0], held[1], "is among the held-out negative prompts too")
            for examples in held:
                _check_apart(examples, [*given[0], *given[1]], "is among the prompts that vectors are made of too")
        else:
            given, held = _split(given, share, seed)
        recipe = {"span": meant.name, "seed": seed, "held_out": "given" if share is None else share}
        if meant.name == "response":
            if not max_new_tokens:
                raise HookError("The span response needs max_new_tokens from 1 up, got 0.", field="max_new_tokens")
            recipe["max_new_tokens"] = max_new_tokens
        has_texts = any(isinstance(prompt, str) for prompt in (*positive, *negative))
        return cls(
            (given[0], given[1]),
            (held[0], held[1]),
            meant,
            recipe,
            chat or Chat() if has_texts else None,
        )

    @property
    def digest(self) -> str:
        """A hash of the prompts' tokens and the recipe: the same for vectors that are made of the same."""
        rows = [[example.tokens for example in group] for group in (*self.fitted, *self.held_out)]
        text = json.dumps([rows, self.recipe], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def vectors(
        self,
        model: HookedModel,
        trait: str,
        wanted: Sequence[tuple[int, str]],
        *,
        identity: ModelIdentity | None = None,
        progress: bool = False,
    ) -> list[TraitVector]:
        """A vector for each layer and method, in this order; none where nothing distinguishes the classes.

        Args:
            identity: the model's, where the caller knows it: making it reads all weights.

        Raises:
            NoDirection: where there is no vector at all.
        """
        layers = sorted({layer for layer, _ in wanted})
        groups = [*self.fitted, *self.held_out]
        with tqdm(total=sum(map(len, groups)), desc=trait, unit="prompt", disable=not progress) as bar:
            found = [self._activations(model, each, layers, bar) for each in groups]
        positive, negative, *held = (values for values, _ in found)
        precision = max(each for _, each in found)
        identity = identity or ModelIdentity.of(model)
        about = {
            **self.recipe,
            "n_positive": len(positive),
            "n_negative": len(negative),
            "n_held_out_positive": len(held[0]),
            "n_held_out_negative": len(held[1]),
            "prompts": self.digest,
            "model": model.model_name,
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        seed = self.recipe["seed"]
        made = []
        nothing: NoDirection | None = None
        classes: Classes | None = None
        last_layer = None
        for layer, method in tqdm(wanted, desc=f"{trait}, fitting", unit="vector", disable=not progress):
            at = layers.index(layer)
            if classes is None or layer != last_layer:
                classes, last_layer = Classes(positive[:, at], negative[:, at], precision), layer
            try:
                fitted = classes.fit(method, seed)
            except NoDirection as error:
                # A layer may be blind to what distinguishes the prompts: one whose window does not reach as far.
                nothing = nothing or NoDirection(f"Layer {layer}: {error}")
                continue
            accuracy, effect_size = None, fitted.effect_size
            if len(held[0]):
                accuracy, unseen = judge(fitted.vector, fitted.threshold, held[0][:, at], held[1][:, at])
                effect_size = unseen if min(map(len, held)) > 1 else effect_size
            told = {"accuracy": fitted.accuracy, "held_out_accuracy": accuracy, "effect_size": effect_size}
            metadata = {**about, **told, **fitted.notes}
            vector = fitted.vector
            made.append(TraitVector(trait, layer, method, vector, fitted.threshold, self.chat, metadata, identity))
        if nothing is not None and not made:
            raise nothing
        return made

    def _activations(
        self, model: HookedModel, examples: list[Example], layers: list[int], bar: Any
    ) -> tuple[np.ndarray, float]:
        """[prompt, layer, d_model], float32: means over the span; and the share of them that is rounding."""
        kept = np.empty((len(examples), len(layers), model.cfg.d_model), np.float32)
        precision = 0.0
        for i, example in enumerate(examples):
            try:
                kept[i], each = self._of_prompt(model, list(example.tokens), layers)
            except HookError as error:
                raise HookError(f"{example.name}: {error}", field=error.field) from error
            precision = max(precision, each)
            bar.update()
        return kept, precision

    def _of_prompt(self, model: HookedModel, row: list[int], layers: list[int]) -> tuple[np.ndarray, float]:
        names = [hook_points.block_point("resid_post", layer).name for layer in layers]
        special = () if model.tokenizer is None else model.hf_tokenizer.all_special_ids
        positions = self.span.positions(row, special)
        if positions:
            _, cache = model.run_with_cache(row, names, positions=list(positions), logits="none")
            means = [_sum_of(cache.records[name]) / len(positions) for name in names]
            precision = max(_precision(cache.records[name]) for name in names)
        else:
            means, precision = self._of_response(model, row, names)
        for layer, mean in zip(layers, means, strict=True):
            if not np.isfinite(mean).all():
                raise HookError(f"The activations of layer {layer} are not finite.")
        return np.stack(means), precision

    def _of_response(self, model: HookedModel, row: list[int], names: list[str]) -> tuple[list[np.ndarray], float]:
        room = min(self.recipe["max_new_tokens"], room_for(model, row))
        if not room:
            raise HookError(f"The prompt fills the model's context of {len(row)} tokens: there is no room to answer.")
        capture = [HookSpec(hook_point=name, positions=slice(len(row), None)) for name in names]
        sums = [np.zeros(model.cfg.d_model) for _ in names]
        n_tokens, precision = 0, 0.0
        for step in model.generate_steps(row, max_tokens=room, capture=capture, read_last=True):
            n_tokens += step.token is not None
            for i, name in enumerate(names):
                if step.activations[name]:
                    sums[i] += _sum_of(step.activations[name])
                    precision = max(precision, _precision(step.activations[name]))
        return [total / n_tokens for total in sums], precision


def without_direction(wanted: Iterable[tuple[int, str]], vectors: Iterable[TraitVector]) -> str | None:
    """Says of which layers and methods there is no vector though it was wanted; None where there are all."""
    made = {(vector.layer, vector.method) for vector in vectors}
    missing: dict[int, list[str]] = {}
    for layer, method in wanted:
        if (layer, method) not in made:
            missing.setdefault(layer, []).append(method)
    if not missing:
        return None
    named = "; ".join(f"layer {layer}: {', '.join(methods)}" for layer, methods in missing.items())
    return f"nothing distinguishes the classes, so there is no vector of {named}"


def layers_of(model: HookedModel, layers: Sequence[int] | None) -> list[int]:
    """Layers in order, counted from 0; None for all.

    Raises:
        HookError: for a layer that the model does not have, and for none.
    """
    n = model.cfg.n_layers
    if layers is None:
        return list(range(n))
    if isinstance(layers, str) or not isinstance(layers, Sequence | np.ndarray):
        raise HookError(f"layers is a list of layers, got {layers!r}.", field="layers")
    wrong = [x for x in layers if isinstance(x, bool) or not isinstance(x, int | np.integer) or not -n <= x < n]
    if wrong or not len(layers):
        got = f"got {wrong[0]!r}" if wrong else "got none"
        raise HookError(f"Layers of {model.model_name} are 0 to {n - 1}, {got}.", field="layers")
    return sorted({int(layer) % n for layer in layers})


def methods_of(methods: Sequence[str]) -> list[str]:
    """Methods in the order that was given, each once.

    Raises:
        HookError: for an unknown one, and for none.
    """
    is_list = isinstance(methods, Sequence) and not isinstance(methods, str)
    unknown = [method for method in methods if method not in METHODS] if is_list else []
    if not is_list or unknown or not methods:
        got = repr(unknown[0]) if unknown else repr(methods)
        raise HookError(f"methods are some of {', '.join(METHODS)}; got {got}.", field="methods")
    return list(dict.fromkeys(methods))


def _share(held_out: Any) -> float | None:
    """The share to be held out; None for prompts of their own."""
    if isinstance(held_out, tuple | list) and len(held_out) == 2:
        return None
    is_number = isinstance(held_out, int | float) and not isinstance(held_out, bool) and math.isfinite(held_out)
    if not is_number or not 0 <= held_out < 1:
        raise HookError(
            f"held_out is a share from 0 to below 1, or positive and negative prompts; got {held_out!r}.",
            field="held_out",
        )
    return float(held_out)


def _read(model: HookedModel, prompts: Any, chat: Chat | None, kind: str) -> list[Example]:
    """The prompts of a class as tokens."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray) or not len(prompts):
        raise HookError(f"The {kind} prompts are a list of at least one text or row of token ids.", field=kind)
    examples = []
    for i, prompt in enumerate(prompts):
        name = f"{kind} prompt {i}".capitalize() + (f" ({prompt[:60]!r})" if isinstance(prompt, str) else "")
        try:
            tokens = render(model, prompt, chat) if isinstance(prompt, str) else _ids(model, prompt)
        except HookError as error:
            raise HookError(f"{name}: {error}", field=kind) from error
        examples.append(Example(tuple(tokens), name))
    return examples


def _ids(model: HookedModel, prompt: Sequence[int]) -> list[int]:
    rows = model.to_tokens(prompt)
    if len(rows) != 1:
        raise HookError(f"A prompt is one row of tokens, got {len(rows)}.")
    tokens = id_list(rows[0])
    room_for(model, tokens)
    return tokens


def _distinct(examples: list[Example]) -> list[Example]:
    return list(dict.fromkeys(examples))


def _check_apart(examples: list[Example], others: list[Example], where: str) -> None:
    among = set(others)
    shared = next((example for example in examples if example in among), None)
    if shared is not None:
        raise HookError(f"{shared.name} {where}.")


def _split(given: list[list[Example]], share: float, seed: int) -> tuple[list[list[Example]], list[list[Example]]]:
    """What is fitted of each class, and what is held out."""
    if not share or any(len(_distinct(examples)) < _SPLIT_FROM for examples in given):
        return given, [[], []]
    fitted, held = [], []
    for i, examples in enumerate(given):
        distinct = _distinct(examples)
        n_held = min(max(1, round(share * len(distinct))), len(distinct) - 2)
        # Each class has a draw of its own, so that a prompt more in one does not change the other.
        chosen = np.random.default_rng([seed, i]).choice(len(distinct), n_held, replace=False)
        out = {distinct[j] for j in chosen}
        fitted.append([example for example in examples if example not in out])
        held.append([example for example in examples if example in out])
    return fitted, held


def _precision(records: list[CapturedActivation]) -> float:
    """The share of what these records hold that is rounding: of half precision the step between two numbers."""
    dtype = records[0].value.dtype
    return float(mx.finfo(dtype).eps) if dtype in (mx.float16, mx.bfloat16) else PRECISION


def _sum_of(records: list[CapturedActivation]) -> np.ndarray:
    """The sum over the positions of records of one layer, [d_model] in float64."""
    # Of a layer that runs several times, what leaves it in the end.
    last = max(record.pass_index for record in records)
    values = [record for record in records if record.pass_index == last]
    if values[0].value.ndim != 3:
        axes = ", ".join(values[0].hook_point.axes)
        raise HookError(f"{values[0].hook_point.name} is {axes}: a trait is measured in one stream.")
    return np.sum([to_numpy(record.value)[0].astype(np.float64).sum(axis=0) for record in values], axis=0)
