"""``HookedModel``: the one class a user starts with."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from . import generation, hook_points, manager
from .activations import ActivationCache, CapturedActivation, id_list
from .architectures import Architecture, ModelConfig
from .capture import CaptureEstimate, CaptureRun, before_stop, check_budget, check_logits, resolve_stop
from .contributions import HeadPath, HeadPaths, MlpBiases
from .errors import HookError
from .extraction import ExtractionConfig, extract, extract_all
from .generation import GenerationResult, GenerationStep
from .hook_points import HookPoint, NamesFilter
from .hooks import HeadIndices, Hook, HookFunction, Positions, Recorder
from .instrument import Instrument, kv_offset, remember_offset
from .interventions import (
    EditingFunction,
    Intervention,
    InterventionPlan,
    InterventionSession,
    Reach,
    blame,
    edits_of,
)
from .loading import load
from .manager import ActivationHookManager, Capture, CapturePlan, HookSpec
from .observers import InferenceHook, Watched
from .reductions import finish
from .sampling import Sampling
from .selftest import Check, SelfTest, quick_selftest, selftest, selftest_steps, warn_of
from .storage.spill import SpillFolder
from .token_text import TokenText

Tokens = str | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | mx.array
ForwardHooks = Iterable[tuple[NamesFilter, HookFunction]]
Interventions = Iterable[Intervention | Mapping[str, Any]] | InterventionPlan


class HookedModel:
    """An mlx-lm model whose activations can be read and replaced, without changing its code.

        model = HookedModel.from_pretrained("neuroscope-tiny")
        logits, cache = model.run_with_cache("The capital of France is")
        cache["blocks.3.hook_resid_post"]                       # (1, 6, d_model), exactly as computed

        def zero_head_1(z, hook_point):                         # (batch, pos, head, d_head)
            z[:, :, 1] = 0
            return z
        model.run_with_hooks("The capital of France is", [("blocks.2.attn.hook_z", zero_head_1)])

    A hook is called as ``fn(value, hook_point)``: what it returns replaces the value (same shape; cast to the value's
    type), None leaves it alone. Hooks are gone after the call or ``with`` block, whatever was raised.

    Args:
        model: any model loaded by mlx-lm. Its classes and functions stay its own, except while hooks are attached.
        tokenizer: mlx-lm's tokenizer; without it, give token ids instead of text.
        name: what the model is called in saved runs; None for its model type.

    Raises:
        UnsupportedModelError: when it is no language model with blocks.

    Warns:
        UntrustedHookWarning: when a short run shows that an identity such as ``resid_post = resid_mid + mlp_out`` does
            not hold. ``untrusted`` lists the hook points that are not to be trusted; the others can be used.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, name: str | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.instrument = Instrument.of(model)
        self.activation_hook_manager = ActivationHookManager(self.resolve_hooks)
        report, shapes = quick_selftest(self)
        self.architecture.learn_sizes(shapes)
        warn_of(report)
        self.untrusted = report.untrusted
        self.model_name = self.cfg.model_type if name is None else name
        """The name or path that it was loaded from, or as given."""
        self._head_paths: HeadPaths | None = None
        self._mlp_biases: MlpBiases | None = None

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> "HookedModel":
        """Load the bundled ``neuroscope-tiny``, a folder in mlx-lm's layout, or a Hugging Face id.

        Raises:
            ModelLoadError: one sentence on what is missing.
            UnsupportedModelError: the model loads but cannot be hooked exactly.
        """
        return cls(*load(str(name_or_path)), name=str(name_or_path))

    @property
    def architecture(self) -> Architecture:
        """Where this model's hook points live."""
        return self.instrument.architecture

    @property
    def cfg(self) -> ModelConfig:
        """n_layers, d_model, n_heads, n_key_value_heads, d_head, d_mlp, d_vocab, model_type, quantization."""
        return self.architecture.cfg

    @property
    def model_config(self) -> ModelConfig:
        """``cfg``, which has its sizes under Hugging Face's names too: ``model_config.num_hidden_layers``."""
        return self.cfg

    @property
    def hook_points(self) -> dict[str, HookPoint]:
        """Every hook point of this model by canonical name, in forward order."""
        return self.architecture.points

    def __repr__(self) -> str:
        cfg = self.cfg
        sizes = f"{cfg.n_layers} layers, {cfg.d_model} wide, {cfg.n_heads} heads of {cfg.d_head}, {cfg.d_vocab} tokens"
        seen = dict.fromkeys((re.sub(r"^blocks\.\d+", "blocks.{i}", p.name), p.axes) for p in self.hook_points.values())
        rows = "\n".join(f"  {name:34} {', '.join(axes)}" for name, axes in seen)
        return f"HookedModel({cfg.model_type}: {sizes})\n{rows}"

    # Tokens

    @property
    def hf_tokenizer(self) -> Any:
        """The Hugging Face tokenizer, which can be called: ``model.hf_tokenizer(text, return_tensors="np")``.

        Raises:
            HookError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise HookError("This model has no tokenizer: HookedModel(model, tokenizer).")
        # mlx-lm's wrapper passes attributes on, and calls not.
        return getattr(self.tokenizer, "_tokenizer", self.tokenizer)

    def get_tokenizer(self) -> Any:
        """The same as ``hf_tokenizer``."""
        return self.hf_tokenizer

    def to_tokens(self, inputs: Tokens) -> mx.array:
        """Token ids [batch, pos] of a text, of ids, or of equally long rows of ids.

        Raises:
            HookError: for text without a tokenizer, no tokens, rows of unequal length or ids outside the vocabulary.
        """
        if isinstance(inputs, str):
            if self.tokenizer is None:
                raise HookError("This model has no tokenizer: give token ids, or HookedModel(model, tokenizer).")
            inputs = self.tokenizer.encode(inputs)
        if isinstance(inputs, mx.array) and not mx.issubdtype(inputs.dtype, mx.integer):
            raise HookError(f"Tokens are a text or whole numbers [pos] or [batch, pos], got {inputs.dtype}.")
        try:
            array = np.array(inputs)
        except ValueError:
            raise HookError("Rows of tokens differ in length: run them one by one.") from None
        array = array[None] if array.ndim == 1 else array
        if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise HookError(
                f"Tokens are a text or whole numbers [pos] or [batch, pos], got {array.dtype} of shape {array.shape}."
            )
        if array.min() < 0 or array.max() >= self.cfg.d_vocab:
            raise HookError(f"Token ids are 0 to {self.cfg.d_vocab - 1}, got {array.min()} to {array.max()}.")
        return mx.array(array)

    def to_str_tokens(self, inputs: Tokens) -> list[str]:
        """Each token of one sequence as text with its own spaces, in order; see :class:`TokenText`."""
        if self.tokenizer is None:
            raise HookError("This model has no tokenizer: give token ids, or HookedModel(model, tokenizer).")
        spelling = TokenText(self.tokenizer)
        return [spelling.text(token) for token in id_list(self.to_tokens(inputs)[0])]

    def unembed(self, residual: mx.array, *, apply_norm: bool = True) -> mx.array:
        """Logits [..., d_vocab] of values [..., d_model] of the stream that leaves the last block.

        The model's own end makes them, whatever it has (last norm, multipliers, unembedding, soft cap): the model runs
        with the stream replaced, and what lies before is never computed.

        Args:
            residual: in place of the stream; an architecture of several streams has an axis for them.
            apply_norm: False puts the value behind the last norm.

        Raises:
            HookError: where the logits are made of more than this stream, and without the norm where it is no module.
        """
        if more := self.architecture.more_than_last_stream:
            raise HookError(f"Logits are not made of the last stream alone on {self.cfg.model_type}: {more}.")
        last = self.last_stream if apply_norm else self._last_normalized()
        if last.axes == hook_points.RESID:
            rows = residual if residual.ndim == 3 else residual.reshape(1, -1, residual.shape[-1])
            shape = rows.shape[:2]
        else:
            rows, shape = residual, tuple(residual.shape[last.axes.index(axis)] for axis in ("batch", "pos"))
        hook = Hook(last, lambda value, point: rows)
        with self.instrument.attached(self.instrument.plan([hook]), alone=True):
            logits = self.model(mx.zeros(shape, dtype=mx.int32))
        logits = logits[0] if isinstance(logits, tuple) else logits
        return logits if last.axes != hook_points.RESID else logits.reshape(*residual.shape[:-1], -1)

    @property
    def last_stream(self) -> HookPoint:
        """Where the stream leaves the last block."""
        return self.hook_points[hook_points.block_point("resid_post", self.cfg.n_layers - 1).name]

    def _last_normalized(self) -> HookPoint:
        if self.architecture.ln_final is None:
            raise HookError(
                f"The last norm of {self.cfg.model_type} is a function, not a module: it cannot be left out."
            )
        return self.hook_points[hook_points.outer_point("ln_final").name]

    def head_results(self, value: mx.array, layer: int) -> mx.array:
        """What each head of a layer adds to the stream, [..., head, d_model], in float32.

            _, cache = model.run_with_cache(tokens, [model.head_input(2), "blocks.2.hook_attn_out"])
            results = model.head_results(cache[model.head_input(2)], 2)         # (batch, pos, head, d_model)

        Their sum and the bias of the output projection are ``hook_attn_out``, within rounding. A norm between the
        projection and the stream has the statistics that it has for all heads together.

        Args:
            value: of the hook point that ``head_input`` names, with all heads: for nearly all models ``hook_z``
                [..., head, d_head].
            layer: the block's index; negative numbers count from the last.

        Raises:
            HookError: where the parts of the heads cannot be told, with the reason, or the value is of another shape.
        """
        return self.head_path(layer).split(value)[0]

    def head_input(self, layer: int) -> str:
        """The hook point whose value ``head_results`` takes: ``hook_z``, or what the output projection reads, where a
        gate lies between the two.

        Raises:
            HookError: where the parts of the heads cannot be told, with the reason.
        """
        return self.head_path(layer).point.name

    def mlp_bias(self, layer: int) -> mx.array | None:
        """The bias that a layer's MLP adds to the stream whatever it reads, [d_model]; None where it has none, or none
        that can be told apart from the rest of ``hook_mlp_out``."""
        if self._mlp_biases is None:
            self._mlp_biases = MlpBiases(self.instrument)
        return self._mlp_biases.of(layer)

    def head_path(self, layer: int) -> HeadPath:
        """The way from a layer's heads to the stream; found by a short run when it is first asked for."""
        if not -self.cfg.n_layers <= layer < self.cfg.n_layers:
            raise HookError(f"Layers are 0 to {self.cfg.n_layers - 1}, got {layer}.")
        if self._head_paths is None:
            self._head_paths = HeadPaths(self.instrument)
        return self._head_paths.of(layer % self.cfg.n_layers)

    # Runs

    def __call__(self, tokens: Tokens, kv_cache: list | None = None) -> mx.array:
        """Logits [batch, pos, d_vocab]. Registered hooks record."""
        return self.run_with_hooks(tokens, [], kv_cache)

    def run_with_cache(
        self,
        tokens: Tokens,
        names_filter: NamesFilter = None,
        positions: Positions = None,
        kv_cache: list | None = None,
        interventions: Interventions = (),
        *,
        heads: HeadIndices = None,
        stop_at_layer: int | None = None,
        chunk: int | None = None,
        logits: str | None = None,
        max_bytes: int | None = None,
        spill_to: str | Path | None = None,
    ) -> tuple[mx.array, ActivationCache]:
        """Run the tokens, and keep activations of it. Nothing outside the selection stays alive.

            model.run_with_cache(tokens, "blocks.*.hook_resid_post", positions="last", stop_at_layer=8)
            model.run_with_cache(long_text, "blocks.*.hook_resid_post", chunk=2048, spill_to="captured")

        Args:
            tokens: text, ids or rows of ids.
            names_filter: None (all hook points), a name, a glob, a list of these or a predicate. All of them on a long
                text take much memory: ``"blocks.*.hook_resid_post"`` is often enough.
            positions: absolute positions to keep: None (all), "last", an int, a list or a slice. What is kept is a
                slice of the whole capture, bit for bit; attention scores, pattern and sink, computed for these rows
                alone, equal it within rounding.
            kv_cache: mlx-lm's prompt cache; with it, the call continues the sequence of the calls before.
            interventions: edits, in the order in which they are made; captures show the edited values. See
                :class:`Intervention`.
            heads: query heads to keep where there is a head axis; of keys and values, the key-value heads that serve
                them, each once. ``cache.heads(name)`` says which heads a value holds.
            stop_at_layer: run the blocks before this one only, as in TransformerLens; negative numbers count from the
                end. The residual stream that enters the block [batch, pos, d_model] takes the place of the logits.
                Where layers run several times, the run stops in the first pass.
            chunk: tokens per forward pass, for long inputs: the passes share a KV cache, and each one's memory is
                released before the next begins.
            logits: which positions to answer: "all", "last" or "none"; by default all, in chunks the last.
            max_bytes: most bytes of activations to hold in memory. A capture of more is refused before it runs.
            spill_to: a new or empty folder: what exceeds ``max_bytes`` (without it, everything) is written to
                safetensors files there as it is captured, and the activation cache reads it when asked.

        Returns:
            logits [batch, pos, d_vocab] and the activation cache, both evaluated; ``cache.interventions`` holds a
            receipt per intervention.
        """
        which = check_logits(logits, chunk)
        check_budget(max_bytes)
        run = self._capture_run(tokens, names_filter, positions, heads, kv_cache, chunk, stop_at_layer)
        session = self._session_of(run, interventions)
        edits = self._edits([intervention for intervention, _ in session.asked])
        if spill_to is not None:
            with SpillFolder(spill_to, max_bytes or 0) as spill:
                output, cache = run.run(spill.keep, session, also=self._registered(run), logits=which)
            cache.edited_by = edits
            return output, cache
        if max_bytes is not None and (estimate := run.estimate()).nbytes > max_bytes:
            raise HookError(
                f"The capture takes {estimate.nbytes:,} bytes, max_bytes is {max_bytes:,}: select less with "
                f"names_filter, positions or heads, or give spill_to, a folder for the rest. It would hold {estimate}"
            )
        output, cache = run.run(session=session, also=self._registered(run), logits=which)
        cache.edited_by = edits
        return output, cache

    def forward(
        self,
        inputs: Tokens | Mapping[str, Any] | Sequence[str],
        target_token_positions: Any = "last",
        extraction_config: ExtractionConfig | Mapping[str, Any] | None = None,
        pivot_positions: Sequence[int] | None = None,
        interventions: Interventions | None = None,
    ) -> ActivationCache:
        """Run the inputs, and keep what a configuration says at the target positions.

            cache = model.forward("The capital of France is", ["last"], ExtractionConfig(extract_resid_out=True))
            cache["resid_out_3"]                        # (1, 1, d_model), the same as cache["resid_post", 3]
            cache.logits                                # (1, 1, d_vocab)

        Args:
            inputs: a text or several, token ids, rows of them, or what a tokenizer returns: a mapping with input_ids
                and attention_mask, and pivot_positions where it has its own. Padding is taken off: rows of one length
                run together, others alone, each as if it were the only one.
            target_token_positions: the positions to keep, in this order, each once, one or a list of: "last", "last-2"
                (the second from the end), "first", "all", whole numbers, (start, stop) pairs, slices, and
                "inputs-partition-0": the tokens before the first pivot. ``cache.mapping_index`` says where each lies.
                Of patterns these are the rows: all keys are kept.
            extraction_config: what to keep; by default the logits.
            pivot_positions: where the partitions after the first begin.
            interventions: as in ``run_with_cache``.

        Raises:
            HookError: for what the model does not have or the inputs do not allow; one sentence with what is allowed.
        """
        return extract(
            self,
            inputs,
            target_token_positions,
            *self._extraction(extraction_config, pivot_positions, interventions),
        )

    def extract_cache(
        self,
        dataloader: Iterable[Any],
        target_token_positions: Any = "last",
        extraction_config: ExtractionConfig | Mapping[str, Any] | None = None,
        pivot_positions: Sequence[int] | None = None,
        interventions: Interventions | None = None,
        *,
        progress: bool = True,
    ) -> ActivationCache:
        """``forward`` for every element of a dataset, in one activation cache: their rows one below the other.

            config = ExtractionConfig(extract_resid_out=True)
            cache = model.extract_cache(["First text", "Second text"], ["last"], config)
            cache["resid_out_3"]                        # (2, 1, d_model)
            ActivationSaver("saved_activations").save_cache(cache, tag="dataset_run")

        Args:
            dataloader: any iterable of inputs. Where mappings have their own ``pivot_positions``, ``metadata`` tells
                them: as one list where all agree, else one for each element.
            progress: show a progress bar on the error stream.
            the others: as in ``forward``.

        Raises:
            HookError: for an element that cannot be run, with its index, and when a position means differently many
                tokens in different rows.
        """
        return extract_all(
            self,
            dataloader,
            target_token_positions,
            *self._extraction(extraction_config, pivot_positions, interventions),
            progress,
        )

    def _extraction(
        self,
        config: ExtractionConfig | Mapping[str, Any] | None,
        pivot_positions: Sequence[int] | None,
        interventions: Interventions | None,
    ) -> tuple[ExtractionConfig | Mapping[str, Any], Sequence[int] | None, InterventionPlan]:
        """The arguments with their defaults; interventions as they are now, for as many runs as there will be."""
        config = ExtractionConfig() if config is None else config
        return config, pivot_positions, self.resolve_interventions(() if interventions is None else interventions)

    def estimate_capture(
        self,
        tokens: Tokens | tuple[int, int],
        names_filter: NamesFilter = None,
        positions: Positions = None,
        kv_cache: list | None = None,
        *,
        heads: HeadIndices = None,
        stop_at_layer: int | None = None,
        chunk: int | None = None,
    ) -> CaptureEstimate:
        """The bytes that ``run_with_cache`` with these arguments will hold, exactly, without computing anything.

            print(model.estimate_capture((1, 100_000), "blocks.*.hook_resid_post"))     # a tuple is (batch, length)

        Args:
            tokens: what is to be run, or its shape as a tuple of two numbers.
        """
        if isinstance(tokens, tuple) and len(tokens) == 2:
            batch, length = tokens
            if isinstance(batch, int) and isinstance(length, int):
                if batch < 1 or length < 1:
                    raise HookError(f"A shape is (batch, length), two numbers from 1 up, got {tokens!r}.")
                tokens = mx.zeros((batch, length), mx.int64)
        return self._capture_run(tokens, names_filter, positions, heads, kv_cache, chunk, stop_at_layer).estimate()

    def _capture_run(
        self,
        tokens: Tokens | tuple[int, int],
        names_filter: NamesFilter,
        positions: Positions,
        heads: HeadIndices,
        kv_cache: list | None,
        chunk: int | None,
        stop_at_layer: int | None,
    ) -> CaptureRun:
        stop = None if stop_at_layer is None else resolve_stop(stop_at_layer, self.cfg.n_layers)
        self._check_kv_cache(kv_cache)
        return CaptureRun(
            self.instrument,
            self.to_tokens(tokens),
            self._points_before(names_filter, stop),
            positions=positions,
            heads=heads,
            kv_cache=kv_cache,
            chunk=chunk,
            stop_at_layer=stop,
        )

    def _points_before(self, names_filter: NamesFilter, stop: int | None) -> list[HookPoint]:
        """The points of a filter; of what a glob or a predicate selects, those that a run up to ``stop`` reaches.

        Raises:
            HookError: for a point that is named and lies beyond the stop, and when nothing lies before it.
        """
        if isinstance(names_filter, Iterable) and not isinstance(names_filter, str):
            names_filter = list(names_filter)
        points = self._points(names_filter)
        if stop is None:
            return points
        reached = before_stop(self.hook_points, stop)
        # When a module outside the blocks is called is not known: one that stays silent is an error of the run.
        kept = [p for p in points if p.name in reached or (not p.axes and (p.layer is None or p.layer < stop))]
        asked = [names_filter] if isinstance(names_filter, str) else [] if callable(names_filter) else names_filter
        named = {p for name in asked or [] if not set("*?") & set(name) for p in self._points(name)}
        beyond = [p.name for p in points if p not in kept and (p in named or not kept)]
        if beyond:
            names = ", ".join(beyond[:3]) + (", ..." if len(beyond) > 3 else "")
            runs = f"blocks 0 to {stop - 1} run" if stop else "no block runs"
            raise HookError(f"stop_at_layer={stop} leaves out {names}: {runs}.")
        return kept

    def _session_of(self, run: CaptureRun, interventions: Interventions) -> InterventionSession:
        """The interventions of a run, checked against how far it comes."""
        plan = self._prepared(interventions)
        if run.stop_at_layer is not None:
            self._points_before([point.name for _, points in plan.asked for point in points], run.stop_at_layer)
        return plan.session(self.instrument.run, run.reach)

    def _registered(self, run: CaptureRun) -> tuple[CapturePlan, Callable[[CapturedActivation], None]] | None:
        """The registered hooks and where this run's records of them go."""
        if not len(self.activation_hook_manager):
            return None
        plan = self.activation_hook_manager.plan()
        if run.stop_at_layer is not None:
            self._points_before([capture.point.name for capture in plan.captures], run.stop_at_layer)
        return plan, self.activation_hook_manager.start()

    def _capture(
        self, tokens: Tokens, points: list[HookPoint], positions: Positions, kv_cache: list | None, alone: bool = False
    ) -> tuple[mx.array, ActivationCache]:
        run = CaptureRun(self.instrument, self.to_tokens(tokens), points, positions=positions, kv_cache=kv_cache)
        return run.run(alone=alone)

    def run_with_hooks(self, tokens: Tokens, fwd_hooks: ForwardHooks, kv_cache: list | None = None) -> mx.array:
        """Logits [batch, pos, d_vocab] of one forward pass with hooks: ``[(name_or_filter, fn), ...]``."""
        return self._run(tokens, self._forward_hooks(fwd_hooks), kv_cache)

    @contextmanager
    def hooks(self, fwd_hooks: ForwardHooks) -> Iterator["HookedModel"]:
        """Keep hooks attached for a block: every run of the model inside it meets them, mlx-lm's own calls too."""
        with self.instrument.attached(self.instrument.plan(self._forward_hooks(fwd_hooks))):
            yield self

    @contextmanager
    def intervening(self, interventions: Interventions) -> Iterator[InterventionSession]:
        """Keep interventions in force for a block: every run of the model inside it meets them.

            with model.intervening([{"hook_point": "blocks.2.attn.hook_z", "type": "zero", "heads": 1}]) as session:
                logits = model("The capital of France is")
            session.receipts[0].norm_before

        How far a run will come is not known here, so what needs that is checked when it is met, "last" is the last
        token of each call, and every call is prefill, save those that ``generate`` makes.

        Raises:
            HookError: when the block ends and one of them never fired although the model ran.
        """
        session = self._prepared(interventions).session(self.instrument.run, reach=None)
        with self.instrument.attached(self.instrument.plan(session.hooks)):
            yield session
        session.close()

    def resolve_interventions(self, interventions: Interventions) -> InterventionPlan:
        """Check interventions, or mappings with their keys, against this model without running it.

        Raises:
            HookError, UnknownHookError: say which one is wrong and what there is; ``error.intervention`` is its index.
        """
        if isinstance(interventions, InterventionPlan):
            return interventions
        if isinstance(interventions, str | Mapping | Intervention) or not isinstance(interventions, Iterable):
            raise HookError(f"interventions is a list of interventions or mappings, got {interventions!r}.")
        asked = []
        for i, spec in enumerate(interventions):
            with blame(i, spec):
                intervention = Intervention.of(spec)
            with blame(i, intervention):
                points = self._intervention_points(intervention)
                for point in points:
                    self.architecture.check_editable(point)
                asked.append((intervention, points))
        return InterventionPlan(asked, self.cfg)

    def _intervention_points(self, intervention: Intervention) -> list[HookPoint]:
        if intervention.hook_point:
            return self._points(intervention.hook_point)
        spec = HookSpec(intervention.layer_name, intervention.component)
        return [point for point, _ in spec.points(self.architecture)]

    def _edits(
        self, asked: Iterable[Intervention], hooks: Iterable[Hook] = ()
    ) -> tuple[Intervention | EditingFunction, ...]:
        """What edits a run that begins now: what blocks around it keep in force, its interventions, its hooks."""
        return (*edits_of(self.instrument.editing), *asked, *edits_of(hooks))

    def _prepared(self, interventions: Interventions) -> InterventionPlan:
        """The plan, with the means that it needs."""
        plan = self.resolve_interventions(interventions)
        plan.prepare(self._plain_capture)
        return plan

    def _plain_capture(self, prompt: Tokens, points: list[HookPoint]) -> ActivationCache:
        """What the model itself computes for one prompt, without anybody's hooks."""
        tokens, cache = self.to_tokens(prompt), ActivationCache()
        limit = self.cfg.max_positions
        if limit is not None and tokens.shape[1] > limit:
            raise HookError(f"a prompt of over has {tokens.shape[1]} tokens; the model reads at most {limit}.")
        recorder = Recorder(self.instrument.run, cache.add)
        plan = self.instrument.plan([recorder.hook(point) for point in points])
        with self.instrument.attached(plan, alone=True):
            self.model(tokens)
        return cache

    def _run(self, tokens: Tokens, hooks: list[Hook], kv_cache: list | None, alone: bool = False) -> mx.array:
        inputs = self.to_tokens(tokens)
        run = self.instrument.run
        self._check_kv_cache(kv_cache)
        start, (batch, length) = kv_offset(kv_cache), inputs.shape
        if len(self.activation_hook_manager):
            reach = Reach(start, start + length, start + length, batch=batch)
            keep = self.activation_hook_manager.start()
            found = self.activation_hook_manager.plan().hooks(
                run, lambda record: keep(finish(record)), reach, whole=kv_cache is None
            )
            hooks = hooks + [hook for hook in found if hook.is_due(start, length)]
        with self.instrument.attached(self.instrument.plan(hooks), alone=alone):
            logits = self.model(inputs) if kv_cache is None else self.model(inputs, cache=kv_cache)
        remember_offset(kv_cache, start + length)
        return logits

    def _check_kv_cache(self, kv_cache: list | None) -> None:
        if kv_cache is None:
            return
        n_caches = len(make_prompt_cache(self.model))
        if not isinstance(kv_cache, list) or len(kv_cache) != n_caches:
            raise HookError(f"kv_cache is mlx-lm's list of {n_caches} caches: make_prompt_cache(model.model).")

    def _forward_hooks(self, fwd_hooks: ForwardHooks) -> list[Hook]:
        hooks = []
        for pair in fwd_hooks:
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[1]):
                raise HookError(f"fwd_hooks is a list of (name_or_filter, function), got {pair!r} in it.")
            hooks += [Hook(point, pair[1]) for point in self._points(pair[0])]
        return hooks

    def _points(self, names_filter: NamesFilter) -> list[HookPoint]:
        """The points of a filter; what is no hook point may be a raw module path (``model.layers.0.mlp.up_proj``)."""
        if isinstance(names_filter, str):
            names_filter = [names_filter]
        if names_filter is None or callable(names_filter):
            return hook_points.select(self.hook_points, names_filter)
        if not isinstance(names_filter, Iterable):
            raise HookError(f"A filter is None, a name, a glob, a list of these or a predicate, got {names_filter!r}.")
        names_filter = list(names_filter)
        raw = {name: point for name in names_filter if (point := self._raw_point(name)) is not None}
        named = [name for name in names_filter if name not in raw]
        for name in named:
            self.architecture.check_supported(hook_points.canonical_name(name) if isinstance(name, str) else "")
        return (hook_points.select(self.hook_points, named) if named else []) + list(raw.values())

    def _raw_point(self, name: str) -> HookPoint | None:
        known = not isinstance(name, str) or hook_points.canonical_name(name) in self.hook_points
        return None if known else self.architecture.locate(name)

    # Generation

    def generate_steps(
        self,
        prompt: Tokens,
        *,
        max_tokens: int = 100,
        stop: Sequence[str] = (),
        capture: Iterable[Capture] | CapturePlan | None = None,
        fwd_hooks: ForwardHooks = (),
        interventions: Interventions = (),
        top_logprobs: int | None = None,
        hooks: Iterable[InferenceHook] = (),
        hook_errors: str = "raise",
        read_last: bool = False,
        **sampling: Any,
    ) -> Iterator[GenerationStep]:
        """Generate with the KV cache, one :class:`GenerationStep` per forward pass. Arguments as for ``generate``.

        The last step holds the receipts of the interventions.

        Between steps the model is as if no hook existed; closing the iterator ends the generation.
        """
        tokens = self.to_tokens(prompt)
        if tokens.shape[0] != 1:
            raise HookError(f"generate takes one prompt, got {tokens.shape[0]} rows.")
        if not isinstance(stop, Iterable):
            raise HookError(f"stop is a string or a list of strings, got {stop!r}.")
        registered = self.activation_hook_manager.plan()
        asked = registered if capture is None else self._capture_plan(capture)
        plan = asked if asked is registered else asked.joined(registered)
        steps = generation.generate_steps(
            self.instrument,
            self.tokenizer,
            id_list(tokens[0]),
            max_tokens=max_tokens,
            sampling=_sampling(sampling),
            stop=[stop] if isinstance(stop, str) else list(stop),
            plan=plan,
            interventions=self._prepared(interventions),
            hooks=self._forward_hooks(fwd_hooks),
            top_logprobs=top_logprobs,
            watched=Watched(hooks, self.architecture, hook_errors),
            read_last=read_last,
        )
        return self._registering(steps, registered.hook_ids, asked.hook_ids) if len(registered) else steps

    def generate(self, prompt: Tokens, **options: Any) -> GenerationResult:
        """Generate text and capture activations of prompt and generated tokens.

            result = model.generate("The capital of France is", max_tokens=5, capture=["blocks.*.hook_resid_post"])
            result.cache["resid_post", 0]               # (1, prompt + generated - 1, d_model)

        Args:
            prompt: text or ids of one sequence.
            max_tokens: most tokens to generate; 0 only reads the prompt.
            stop: strings that end the text; they are not part of it.
            capture: hook specs and hook-point names; None for the registered hooks, which record in any case.
            fwd_hooks: ``[(name_or_filter, fn), ...]`` that may edit every pass; they run after the interventions.
            interventions: edits, in the order in which they are made; the result holds their receipts. See
                :class:`Intervention`.
            top_logprobs: tell with each token how probable the model found it, and this many of the likeliest ones:
                see :class:`TokenLogprobs`. None computes nothing.
            hooks: observers, told of each event in turn: see :class:`InferenceHook`.
            hook_errors: "raise" what an observer raises, or "collect" it in the observer's ``errors``.
            read_last: feed the last generated token to the model as well, so that there are activations of each token,
                an end token included.
            temperature, top_p, top_k, min_p, repetition_penalty, frequency_penalty, presence_penalty, logit_bias, seed:
                see :class:`sampling.Sampling`; the default takes the most probable token.
        """
        tokens = self.to_tokens(prompt)
        plan, hooks = self.resolve_interventions(options.get("interventions", ())), list(options.get("fwd_hooks", ()))
        edits = self._edits([intervention for intervention, _ in plan.asked], self._forward_hooks(hooks))
        steps = self.generate_steps(tokens, **options | {"interventions": plan, "fwd_hooks": hooks})
        result = generation.collect(id_list(tokens[0]), steps, self.hook_points)
        result.cache.edited_by = edits
        return result

    def _capture_plan(self, capture: Iterable[Capture] | CapturePlan) -> CapturePlan:
        return capture if isinstance(capture, CapturePlan) else self.resolve_hooks(capture)

    def _registering(
        self, steps: Iterator[GenerationStep], registered: list[str], asked: list[str]
    ) -> Iterator[GenerationStep]:
        """Hand the records of registered hooks to the manager; the steps show those that were asked for."""
        keep = self.activation_hook_manager.start()
        for step in steps:
            for hook_id in registered:
                for record in step.activations[hook_id]:
                    keep(record)
            yield replace(step, activations={hook_id: step.activations[hook_id] for hook_id in asked})

    # Hooks by id

    def resolve_hooks(self, captures: Iterable[Capture]) -> CapturePlan:
        """Check hook specs and names against this model without running it.

        Raises:
            HookError, UnknownHookError: say which one is wrong and what there is.
        """
        return manager.resolve(captures, self.architecture, self._points)

    def register_activation_hook(
        self,
        layer_name: str = "",
        component: str = "",
        hook_id: str = "",
        capture_input: bool = False,
        capture_output: bool = True,
        **selection: Any,
    ) -> str:
        """Record a component in every run from now on; answers the hook id.

            model.register_activation_hook("transformer.h.*", "residual", positions="last")
            model.register_activation_hook(hook_point="blocks.*.attn.hook_z", heads=[0, 3], reduce="norm")

        The records of the latest run are ``model.captured_activations(hook_id)``.

        Args:
            selection: ``hook_point``, ``positions``, ``heads`` and ``reduce`` of :class:`HookSpec`, which tells of the
                others too.
        """
        sides = {"capture_input": capture_input, "capture_output": capture_output}
        place = {"layer_name": layer_name, "component": component, "hook_id": hook_id}
        return self.activation_hook_manager.register(HookSpec.of(place | sides | selection))

    def unregister_activation_hook(self, hook_id: str) -> None:
        """Stop recording; an unknown id is an error that lists the registered ones."""
        self.activation_hook_manager.unregister(hook_id)

    def clear_activation_hooks(self) -> None:
        """Stop recording everything."""
        self.activation_hook_manager.clear()

    def captured_activations(self, hook_id: str) -> list[CapturedActivation]:
        """What a registered hook recorded in the latest run.

        Raises:
            UnknownHookError: lists the registered ids.
        """
        return self.activation_hook_manager.records(hook_id)

    # Trust

    def selftest(self) -> SelfTest:
        """Prove on this model that what is captured is what was computed.

        print(model.selftest())                     # each identity, how far it is off, what is allowed and why
        model.selftest().untrusted                  # hook points at which some identity does not hold
        """
        return selftest(self)

    def selftest_steps(self) -> Iterator[Check]:
        """The checks of ``selftest`` one by one; between them the model is plain."""
        return selftest_steps(self)


def load_model(name_or_path: str | Path) -> HookedModel:
    """The same as ``HookedModel.from_pretrained``."""
    return HookedModel.from_pretrained(name_or_path)


def check_hooked(given: Any) -> None:
    """Raise HookError for what is no HookedModel, as a model of mlx-lm's or its name."""
    if not isinstance(given, HookedModel):
        raise HookError(
            "model is a HookedModel, as HookedModel(model) or HookedModel.from_pretrained(name) gives it, got "
            f"{type(given).__name__}.",
            field="model",
        )


def _sampling(options: dict[str, Any]) -> Sampling:
    unknown = sorted(set(options) - set(Sampling.__dataclass_fields__))
    if unknown:
        own = ["max_tokens", "stop", "capture", "fwd_hooks", "interventions", "top_logprobs", "hooks", "hook_errors"]
        allowed = [*own, "read_last", *Sampling.__dataclass_fields__]
        raise HookError(f"generate has no argument {unknown[0]!r}. Allowed: {', '.join(allowed)}.")
    return Sampling(**options)
