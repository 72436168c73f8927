"""The logit lens: what the model would predict if it stopped after each layer.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from .. import hook_points
from ..activations import ActivationCache
from ..contributions import FrozenNorm, LinearNorm
from ..errors import HookError
from ..hooks import Positions, select_positions
from ..model import HookedModel, Tokens
from ..sampling import largest
from ..token_text import TokenText
from .attribution import Attribution, direct_logit_attribution
from .directions import accuracy, along, directions_of_rows, resolve_directions
from .held import Activations, Held, StreamValue
from .tuned_lens import TunedLens

NORMS = ("own", "final")
METRICS = ("logit_diff", "accuracy")
CHUNK = 128
"""Positions of a prompt that are read at a time: their logits are held together."""
HEADS = "heads"
"""The name of a component: what each head adds."""


@dataclass(frozen=True)
class Prediction:
    """A token and its probability, from 0 to 1."""

    token_id: int
    token: str
    probability: float


@dataclass(frozen=True)
class LayerPrediction:
    """The most probable next tokens after one layer, at one position, most probable first.

    Args:
        layer: the block's index.
        hook_point: what was read.
        predictions: the most probable tokens.
        position: where in the prompt, from 0.
        head: the head whose part was read; None for a whole value.
        pass_index: which pass, for a layer that runs several times.
        values: what was asked of ``token_directions``, in their order.
    """

    layer: int
    hook_point: str
    predictions: list[Prediction]
    position: int = 0
    head: int | None = None
    pass_index: int = 0
    values: tuple[float, ...] = ()


class LogitLens:
    """Reads values of the residual stream's width through the model's own last norm and unembedding.

        lens = LogitLens.from_model(model)
        for row in lens.predictions("The capital of France is"):
            print(row.layer, row.predictions[0].token)

        _, cache = model.run_with_cache(prompts, "blocks.*.hook_resid_post")
        lens.compute(cache, "resid_out_{i}")["logit_lens_resid_out_0"]              # (batch, pos, d_vocab)
        lens.compute(cache, "resid_out_{i}", token_directions=[(" yes", " no")])    # (batch, pos) each

    By default the norm takes each value's own statistics, so the last layer's reading is the model's own output: bit
    for bit where all positions of the run are read, within rounding where some were selected. The model's own end
    makes the logits, so norms, biases, multipliers, quantised and tied unembeddings and soft caps are what they are in
    the model.
    """

    def __init__(self, model: HookedModel) -> None:
        self.model = model

    @classmethod
    def from_model(cls, model: HookedModel | nn.Module, tokenizer: Any = None) -> "LogitLens":
        """A lens on a loaded model: a :class:`HookedModel`, or one that mlx-lm loaded, with its tokenizer."""
        return cls(model if isinstance(model, HookedModel) else HookedModel(model, tokenizer))

    @classmethod
    def from_model_name(cls, model_name: str | Path) -> "LogitLens":
        """A lens on a model that is loaded first: the bundled ``neuroscope-tiny``, a folder or a Hugging Face id.

        Raises:
            ModelLoadError: one sentence on what is missing.
        """
        return cls(HookedModel.from_pretrained(model_name))

    def logits(self, residual: mx.array, *, apply_norm: bool = True) -> mx.array:
        """Logits [..., d_vocab] of residual-stream values [..., d_model]."""
        return self.model.unembed(residual, apply_norm=apply_norm)

    def compute(
        self,
        activations: Activations,
        target_key: str,
        token_directions: Any = None,
        apply_norm: bool = True,
        apply_softmax: bool = False,
        metric: str | None = "logit_diff",
        norm: str = "own",
        *,
        tuned: TunedLens | None = None,
    ) -> dict[str, mx.array]:
        """Read every value that a key means: ``{"logit_lens_<key>": logits}``, by layer and head.

        Args:
            activations: an activation cache, or a mapping from hook-point names to arrays.
            target_key: a key or a pattern of keys, ``"resid_out_{i}"``, ``"blocks.{i}.hook_resid_mid"``, a glob, or
                ``"head_out_L{i}H{j}"``, for which ``hook_z`` is captured. What is read has the width of the stream.
            token_directions: what to read in place of all logits: for each batch row, or once for all, a token (its
                logit) or a pair (the first's less the second's). Tokens are ids or texts.
            apply_norm: False reads without the last norm.
            apply_softmax: probabilities, in float32, in place of logits; differences too are then of these.
            metric: of the directions: "logit_diff", or "accuracy", the share of batch rows in which the first of a pair
                is above the second, or a single token above all others.
            norm: "own": the last norm takes the statistics of what it reads. "final": it keeps those that it has in the
                run, so that readings of parts add up, but for the biases of norm and unembedding and where no soft cap
                follows (else see ``direct_logit_attribution``); capture ``ln_final.hook_in`` too, or the last layer's
                ``resid_post``.
            tuned: a tuned lens, whose translators are applied first, to ``resid_post``.

        Returns:
            logits or probabilities [batch, pos, d_vocab]; with directions [batch, pos], for accuracy [pos], in float32.

        Raises:
            HookError, UnknownHookError: say what is wrong and what is allowed.
        """
        _check_norm(norm)
        if token_directions is not None and metric not in METRICS:
            raise HookError(f"metric is {' or '.join(map(repr, METRICS))}, got {metric!r}.", field="metric")
        held = Held(self.model, activations)
        found = {}
        for value in held.stream_values(target_key):
            logits = self._read(held, value, norm if apply_norm else None, tuned)
            if apply_softmax:
                logits = _softmax(logits)
            if token_directions is not None:
                logits = self._along(value, logits, token_directions, metric)
            found[f"logit_lens_{value.key}"] = logits
        return found

    def _along(self, value: StreamValue, logits: mx.array, asked: Any, metric: str | None) -> mx.array:
        if logits.ndim != 3:
            raise HookError(f"{value.key} holds all heads: read one with directions, head_out_L{value.layer}H0.")
        directions = directions_of_rows(self.model, asked, logits.shape[0])
        return along(logits, directions) if metric == "logit_diff" else accuracy(logits, directions)

    def _read(self, held: Held, value: StreamValue, norm: str | None, tuned: TunedLens | None) -> mx.array:
        """Logits of a value; without a norm where it is None."""
        array, streams = value.array, self.model.last_stream.axes
        if tuned is not None:
            array = tuned.translate(array, value.point)
        if norm != "final" and streams != hook_points.RESID and array.ndim != (len(streams) if norm == "own" else 3):
            what = "no stream of" if norm == "own" else "not what the last norm gives on"
            raise HookError(
                f"{value.key} is {what} {self.model.cfg.model_type}, which has several streams ({', '.join(streams)}): "
                "read resid_pre or resid_post with norm='own'."
            )
        if norm == "own":
            return self.logits(array)
        if norm == "final":
            frozen = self.frozen_norm(held, value.positions)
            array = _like_rows(frozen, value.key, array)(array).astype(array.dtype)
        return self.logits(array, apply_norm=False)

    def frozen_norm(self, held: Held, positions: Sequence[int] | None) -> FrozenNorm:
        """The last norm with the statistics that it had in a run, at absolute positions of it.

        Raises:
            HookError: where its input was not captured there, and where it is no module, or reads something else than
                the stream that leaves the last block.
        """
        names = (self._final_norm_input(), self.model.last_stream.name)
        name = next((name for name in names if name in held), None)
        if name is None:
            raise HookError(f"norm='final' needs the last norm's input: capture {names[0]} too.", field="norm")
        ln_final = self.model.architecture.ln_final
        assert ln_final is not None
        norm = LinearNorm(ln_final, self.model.cfg.d_model)
        return norm.freeze(held.rows(name, positions))

    def _final_norm_input(self) -> str:
        """The hook point from which the last norm's statistics are taken."""
        model = self.model
        is_function = model.architecture.ln_final is None
        if is_function or model.last_stream.axes != hook_points.RESID or model.architecture.more_than_last_stream:
            why = "is a function, not a module" if is_function else "reads another value than the last stream"
            raise HookError(
                f"The last norm of {model.cfg.model_type} {why}: its statistics cannot be kept. Use norm='own'.",
                field="norm",
            )
        return hook_points.outer_point("ln_final_in").name

    def direct_logit_attribution(
        self, cache: Activations, tokens: Any, *, positions: int | Sequence[int] | None = -1
    ) -> Attribution:
        """What embedding, heads, MLPs and biases add to the logit of ``tokens``, a token or a pair of them.

            _, cache = model.run_with_cache("The capital of France is", attribution_points(model))
            print(lens.direct_logit_attribution(cache, ("Paris", "Rome")))

        See :func:`attribution.direct_logit_attribution`.
        """
        return direct_logit_attribution(cache, tokens, model=self.model, positions=positions)

    # Prompts

    def predictions(self, prompt: Tokens, *, position: int = -1, top_k: int = 5) -> list[LayerPrediction]:
        """The ``top_k`` most probable next tokens after each layer, at one position of the prompt.

        Args:
            prompt: text or ids of one sequence.
            position: which token's prediction; negative counts from the end.
            top_k: how many, from 1; at most the vocabulary is answered.

        Raises:
            HookError: for a position outside the prompt, several rows of tokens, or a top_k below 1.
        """
        return list(self.readings(prompt, positions=position, top_k=top_k))

    def readings(
        self,
        prompt: Tokens,
        *,
        components: str | Sequence[str] = "resid_post",
        positions: Positions = -1,
        top_k: int = 5,
        norm: str = "own",
        apply_norm: bool = True,
        apply_softmax: bool = False,
        token_directions: Any = None,
        tuned: TunedLens | None = None,
    ) -> Iterator[LayerPrediction]:
        """Run a prompt once, and read components of each layer at some of its positions, row by row.

            for row in lens.readings("The capital of France is", components=["resid_mid", "attn_out"], positions=None):
                print(row.layer, row.hook_point, row.position, row.predictions[0].token)

        Rows are ordered by layer, then by component in forward order, then by head, then by position.

        Args:
            prompt: text or ids of one sequence.
            components: short names of what has the width of the stream ("resid_post" or "resid_out", "attn_out"), and
                "heads" or "head_out".
            positions: absolute positions: None (all), "last", an int, a list or a slice.
            top_k: how many predictions, from 1; at most the vocabulary is answered.
            token_directions: a list of tokens or of pairs; each row's ``values`` are their logits, or differences.
            apply_softmax: take probabilities in the place of these logits.
            norm, apply_norm, tuned: as for ``compute``.

        Raises:
            HookError: says what is wrong and what is allowed.
        """
        tokens = self.model.to_tokens(prompt)
        if tokens.shape[0] != 1 or not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise HookError(
                f"The lens takes one row of tokens and a top_k from 1, got {tokens.shape[0]} and {top_k}.",
                field="top_k" if tokens.shape[0] == 1 else None,
            )
        _check_norm(norm)
        directions = None if token_directions is None else resolve_directions(self.model, token_directions)
        keys = self._keys([components] if isinstance(components, str) else list(components))
        wanted = list(dict.fromkeys(name for key in keys for name in self._sources(key)))
        if norm == "final" and apply_norm:
            wanted.append(self._final_norm_input())
        # What a raw module gives has no named axes to select positions of.
        selects = all(name in self.model.hook_points for name in wanted)
        asked = None if positions is None else select_positions(positions, 0, tokens.shape[1])
        _, cache = self.model.run_with_cache(tokens, wanted, positions=asked if selects else None, logits="none")
        rows = self._rows(cache, keys, top_k, norm, apply_norm, apply_softmax, directions, tuned)
        return (row for row in rows if asked is None or row.position in asked)

    def _rows(
        self,
        cache: ActivationCache,
        keys: list[str],
        top_k: int,
        norm: str,
        apply_norm: bool,
        apply_softmax: bool,
        directions: list[tuple[int, ...]] | None,
        tuned: TunedLens | None,
    ) -> Iterator[LayerPrediction]:
        spelling = TokenText(self.model.tokenizer)
        passes = sorted({record.pass_index for records in cache.records.values() for record in records})
        for index in passes:
            part = cache.of_pass(index)
            final = {n: r for n, r in cache.records.items() if n not in part.records and n.startswith("ln_final")}
            held = Held(self.model, ActivationCache(part.records | final))
            for key in keys:
                for value in (part for whole in held.stream_values(key) for part in whole.chunks(CHUNK)):
                    logits = self._read(held, value, norm if apply_norm else None, tuned)
                    for row in self._of_positions(value, logits, top_k, apply_softmax, directions, spelling):
                        yield replace(row, pass_index=index)

    def _of_positions(
        self,
        value: StreamValue,
        logits: mx.array,
        top_k: int,
        apply_softmax: bool,
        directions: list[tuple[int, ...]] | None,
        spelling: TokenText,
    ) -> Iterator[LayerPrediction]:
        probabilities = _softmax(logits)
        best, shares = largest(probabilities, top_k)
        rows = probabilities if apply_softmax else logits
        asked = mx.stack([along(rows, [direction])[0] for direction in directions], axis=-1) if directions else None
        mx.eval(best, shares, asked)
        chosen = zip(_lists(best[0]), _lists(shares[0]), strict=True)
        values = [[]] * best.shape[1] if asked is None else _lists(asked)
        for position, (ids, likely), own in zip(value.positions or [], chosen, values, strict=True):
            predictions = [Prediction(t, spelling.text(t), p) for t, p in zip(ids, likely, strict=True)]
            layer = value.layer if value.layer is not None else -1
            yield LayerPrediction(layer, value.point, predictions, position, value.head, values=tuple(own))

    def _keys(self, components: list[str]) -> list[str]:
        """The keys of some components, by layer, in the order of a forward pass; heads where they add to the stream.

        Raises:
            HookError: for a component that no layer has; lists what can be read.
        """
        model, streams = self.model, self.model.last_stream.axes
        wide = {
            point.component
            for point in model.hook_points.values()
            if point.layer is not None and point.axes in (hook_points.RESID, streams)
        }
        allowed = [c for c in hook_points.components() if c in wide]
        allowed += [HEADS] if any(point.component == "z" for point in model.hook_points.values()) else []
        unknown = [c for c in components if component_of(c) not in allowed]
        if unknown or not components:
            what = repr(unknown[0]) if unknown else "none"
            raise HookError(
                f"A lens on {model.cfg.model_type} reads {', '.join(allowed)}; got {what}.", field="components"
            )
        asked = ["result" if component_of(c) == HEADS else component_of(c) for c in components]
        keys = []
        for layer in range(model.cfg.n_layers):
            for component in (c for c in hook_points.components() if c in asked):
                point = hook_points.block_point("z" if component == "result" else component, layer)
                if point.name in model.hook_points:
                    name = f"head_out_L{layer}H{{j}}" if component == "result" else point.name
                    keys.append(name)
        if not keys:
            raise HookError(f"No layer of {model.cfg.model_type} has {', '.join(components)}.", field="components")
        return keys

    def _sources(self, key: str) -> list[str]:
        """What is captured for a key."""
        if key in self.model.hook_points:
            return [key]
        layer = int(key.removeprefix("head_out_L").partition("H")[0])
        return [hook_points.block_point("z", layer).name, self.model.head_input(layer)]


def component_of(name: str) -> str:
    """What a lens calls a component: ``resid_out`` is "resid_post", ``head_out`` is "heads"."""
    found = hook_points.component_name(name)
    return HEADS if found == "result" else found


def _check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise HookError(f"norm is {' or '.join(map(repr, NORMS))}, got {norm!r}.", field="norm")


def _lists(array: mx.array) -> list[list[Any]]:
    return cast(list[list[Any]], array.tolist())


def _softmax(logits: mx.array) -> mx.array:
    return mx.softmax(logits.astype(mx.float32), axis=-1)


def _like_rows(frozen: FrozenNorm, key: str, array: mx.array) -> FrozenNorm:
    """The frozen norm for a value of the same batch and positions, which may have an axis of heads before the last."""
    if (own := frozen.scale.shape[:2]) != array.shape[:2]:
        raise HookError(
            f"{key} holds batch {array.shape[0]}, pos {array.shape[1]} and the last norm's input batch {own[0]}, pos "
            f"{own[1]}: norm='final' needs the same.",
            field="norm",
        )
    return replace(frozen, scale=frozen.scale[..., None, :]) if array.ndim == 4 else frozen
