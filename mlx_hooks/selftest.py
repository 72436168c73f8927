"""Proves on the loaded model that what is captured is what was computed, and names what is not to be trusted."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from .activations import ActivationCache, CapturedActivation, join, scalar
from .architectures import Architecture
from .attention import attention_pattern, attention_scores, weighted_values
from .errors import HookError, UntrustedHookWarning
from .hook_points import HookPoint
from .hooks import Hook, Recorder

# Prompt length of the full self-test, and how it is cut into a prefill and single tokens, and into chunks.
LENGTH, DECODED, CHUNKS = 20, 5, (7, 8, 5)
QUICK_LENGTH = 8


@dataclass
class Check:
    """One identity: how far it is off at worst, how far it may be off, and why.

    Args:
        name: the identity.
        tolerance: largest deviation that passes; 0 where the arithmetic is the same.
        why: where the tolerance comes from, or why the identity says nothing here.
        deviation: largest deviation found.
        hook_points: names at which it does not hold.
        compared: number of arrays compared.
    """

    name: str
    tolerance: float
    why: str
    deviation: float = 0.0
    hook_points: list[str] = field(default_factory=list)
    compared: int = 0

    @property
    def passed(self) -> bool:
        return not self.hook_points and self.deviation <= self.tolerance

    def note(self, deviation: float, names: Iterable[str]) -> None:
        """Take a comparison into account."""
        self.compared += 1
        # Written so that NaN fails.
        if not deviation <= self.tolerance:
            self.hook_points += [name for name in names if name not in self.hook_points]
            self.deviation = deviation if math.isnan(deviation) else max(self.deviation, deviation)
        elif not math.isnan(self.deviation):
            self.deviation = max(self.deviation, deviation)

    def to_dict(self) -> dict[str, Any]:
        """The check as plain JSON values; a tolerance of None allows everything."""
        return {
            "name": self.name,
            "passed": self.passed,
            # JSON has no NaN and no infinity.
            "deviation": self.deviation if math.isfinite(self.deviation) else None,
            "tolerance": self.tolerance if math.isfinite(self.tolerance) else None,
            "why": self.why,
            "compared": self.compared,
            "hook_points": self.hook_points,
        }


@dataclass
class SelfTest:
    """The report: ``passed``, one :class:`Check` per identity, and the hook points not to be trusted."""

    model_type: str
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def untrusted(self) -> list[str]:
        """Hook points at which some identity does not hold."""
        return list(dict.fromkeys(name for check in self.checks for name in check.hook_points))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "model_type": self.model_type,
            "passed": self.passed,
            "untrusted": self.untrusted,
            "checks": [check.to_dict() for check in self.checks],
        }

    def __str__(self) -> str:
        rows = [f"{self.model_type}: {'passed' if self.passed else 'FAILED'}"]
        for check in self.checks:
            mark = "ok    " if check.passed else "FAILED"
            rows.append(
                f"  {mark} {check.name}: off by {check.deviation:.2g}, allowed {check.tolerance:.2g} ({check.why})"
            )
            if check.hook_points:
                rows.append(f"         not to be trusted: {_shortened(check.hook_points)}")
        return "\n".join(rows)


def selftest(model: Any) -> SelfTest:
    """Run every identity on a :class:`HookedModel`, with random tokens; takes about 15 short forward passes."""
    return SelfTest(model.cfg.model_type, list(selftest_steps(model)))


def selftest_steps(model: Any) -> Iterator[Check]:
    """The checks of ``selftest`` one by one; between them the model is plain."""
    return _checks(model, LENGTH, full=True)


def quick_selftest(model: Any) -> tuple[SelfTest, dict[str, tuple[int, ...]]]:
    """The identities of one forward pass, on a few tokens: what is checked whenever a model is wrapped.

    Returns:
        the report, and the shape of the value at each hook point that was met.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    checks = list(_checks(model, QUICK_LENGTH, full=False, shapes=shapes))
    return SelfTest(model.cfg.model_type, checks), shapes


def _checks(model: Any, length: int, full: bool, shapes: dict[str, tuple[int, ...]] | None = None) -> Iterator[Check]:
    runs = Check("the plain model runs", 0.0, "hooks can be checked on what runs")
    error = _error_of_plain_run(model, length)
    if error:
        runs.why = f"on several tokens mlx-lm's own model raises {error}; checked on single tokens"
        runs.tolerance, length = math.inf, 1
        if one := _error_of_plain_run(model, 1):
            runs.why, runs.tolerance = f"mlx-lm's own model does not run here: {one}", 0.0
            runs.note(math.inf, model.hook_points)
    if runs.passed:
        runs.note(0.0, [])
    yield runs
    if not runs.passed:
        return
    tester = _Tester(model, length)
    parts = [tester.one_pass]
    if full:
        parts += [tester.edits, *([tester.continued, tester.turned] if length > 1 else []), tester.batch]
    for part in parts:
        try:
            yield from part()
        except Exception as error:  # whatever goes wrong inside is a finding, not an end
            failed = Check(f"the self-test can run ({part.__name__})", 0.0, f"{type(error).__name__}: {error}")
            failed.note(math.inf, model.hook_points)
            yield failed
            return
    if shapes is not None:
        shapes.update({name: records[0].value.shape for name, records in tester.cache.records.items()})


def _plain(model: Any, tokens: list[list[int]], **options: Any) -> mx.array:
    """Logits of the model itself, without the hooks of any outer block."""
    with model.instrument.attached(model.instrument.plan([]), alone=True):
        return _logits(model.model(mx.array(tokens), **options))


def _error_of_plain_run(model: Any, length: int) -> str:
    try:
        mx.eval(_plain(model, [_tokens(model.cfg.d_vocab, length)]))
    except Exception as error:  # whatever the model's own code raises is reported
        return f"{type(error).__name__}: {error}"
    return ""


def warn_of(report: SelfTest) -> None:
    """Warn of the hook points at which an identity does not hold; the model can be used all the same."""
    for check in report.checks:
        if not check.passed:
            names = _shortened(check.hook_points) if check.hook_points else "all hook points"
            warnings.warn(
                f"{report.model_type}: {check.name} does not hold (off by {check.deviation:.3g}, allowed "
                f"{check.tolerance:.3g}). Not to be trusted: {names}.",
                UntrustedHookWarning,
                stacklevel=4,
            )


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


class _Tester:
    def __init__(self, model: Any, length: int) -> None:
        self.model = model
        self.architecture: Architecture = model.architecture
        self.tokens = [_tokens(model.cfg.d_vocab, length)]
        self.names = list(model.hook_points)
        self.silent: dict[str, str] = {}

    # One forward pass

    def one_pass(self) -> Iterator[Check]:
        """Identities of one forward pass without a KV cache."""
        plain = _plain(self.model, self.tokens)
        before = {path: type(module) for path, module in self.architecture.modules.items()}
        bits = "the same computation: bit for bit"
        logits_check = Check("logits with every hook attached = logits of the plain model", 0.0, bits)
        fires = Check("every hook point is met", 0.0, "a hook that stays silent would pass for a result")
        self.logits, self.cache = self._capture_what_fires(self.tokens, fires)
        logits_check.note(_deviation(self.logits, plain), ["hook_logits"])
        yield fires
        yield logits_check
        unchanged = Check("the model is unchanged afterwards", 0.0, bits)
        after = {path: type(module) for path, module in self.architecture.modules.items()}
        unchanged.note(0.0 if before == after else math.inf, ["all"])
        unchanged.note(_deviation(_plain(self.model, self.tokens), plain), ["hook_logits"])
        yield unchanged
        yield from self._stream_checks()
        yield from self._unembed_check()
        yield from self._attention_checks()

    def _capture_what_fires(self, tokens: list[list[int]], fires: Check) -> tuple[mx.array, ActivationCache]:
        """Everything at once; where that fails, point by point, to find the points that do not work."""
        try:
            captured = self._capture(tokens)
        except Exception as error:  # of any kind: found point by point
            first = f"{type(error).__name__}: {error}"
        else:
            fires.note(0.0, [])
            return captured
        working = []
        for name in self.names:
            try:
                self.model._capture(tokens, [self.model.hook_points[name]], None, None, alone=True)
                working.append(name)
            except Exception as error:  # of any kind
                fires.note(math.inf, [name])
                fires.why = f"{type(error).__name__}: {error}"
        if len(working) == len(self.names):
            raise HookError(first)
        self.names = working
        return self._capture(tokens)

    def _capture(self, tokens: list[list[int]], kv_cache: list | None = None) -> tuple[mx.array, ActivationCache]:
        points = [self.model.hook_points[name] for name in self.names]
        logits, cache = self.model._capture(tokens, points, None, kv_cache, alone=True)
        return _logits(logits), cache

    def _values(self, layer: int, component: str, cache: ActivationCache | None = None) -> list[mx.array]:
        """What was recorded at a component of a layer, pass by pass."""
        records = (cache or self.cache).records
        name = next((p.name for p in self._points(layer, component)), None)
        return [record.value for record in records.get(name, [])] if name else []

    def _points(self, layer: int, *components: str) -> list[Any]:
        points = self.model.hook_points.values()
        return [p for c in components for p in points if p.layer == layer and p.component == c]

    def _names_of(self, layer: int, *components: str) -> list[str]:
        return [point.name for point in self._points(layer, *components)]

    def _stream_checks(self) -> Iterator[Check]:
        same = "the same additions: bit for bit"
        chain = Check("resid_pre = the stream that left the block before", 0.0, same)
        mids = Check("resid_mid = resid_pre + what attention or mixer adds", 0.0, same)
        sums = Check("resid_post = resid_pre + all that the block adds", 0.0, same)
        for layer in range(self.model.cfg.n_layers):
            pre, post = self._values(layer, "resid_pre"), self._values(layer, "resid_post")
            if layer and self.architecture.stream_norm(layer) is None:
                for a, b in zip(self._values(layer - 1, "resid_post"), pre, strict=False):
                    chain.note(_deviation(b, a), self._names_of(layer, "resid_pre"))
            if self.architecture.other_sum(layer):
                sums.why = f"{same}; not in every layer: {self.architecture.other_sum(layer)}"
                continue
            added = ["mixer_out", "attn_out", "mlp_out", "side_out"]
            if any(name not in self.names for name in self._names_of(layer, *added)):
                continue  # said already
            for i in range(len(pre)):
                mid, total = self._sum(layer, i, len(pre), pre[i])
                recorded = self._values(layer, "resid_mid")
                if mid is not None and i < len(recorded):
                    mids.note(_deviation(recorded[i], mid), self._names_of(layer, "resid_mid"))
                deviation = min(_deviation(post[i], candidate) for candidate in total)
                sums.note(deviation, self._names_of(layer, "resid_post", *added))
        yield from (check for check in (chain, mids, sums) if check.compared)

    def _unembed_check(self) -> Iterator[Check]:
        last = self._values(self.model.cfg.n_layers - 1, "resid_post")
        check = Check("logits = unembedding of the stream that leaves the last block", 0.0, "the model's own end")
        if self.architecture.more_than_last_stream:
            return
        check.note(_deviation(self.model.unembed(last[-1]), self.logits), ["hook_logits"])
        yield check

    def _sum(self, layer: int, i: int, n_passes: int, stream: mx.array) -> tuple[mx.array | None, list[mx.array]]:
        """The stream after mixing, and at the block's end, from what the block added in pass ``i``.

        Parallel branches may be summed first: then there are two candidates for the end.
        """
        mixed = [self._part(layer, kind, i, n_passes) for kind in ("mixer_out", "attn_out")]
        mlps, side = self._part(layer, "mlp_out", i, n_passes), self._part(layer, "side_out", i, n_passes)
        if self.architecture.is_parallel(layer):
            attn, mlp = mixed[1][0], mlps[0]
            return None, [stream + (attn + mlp), (stream + attn) + mlp]
        mid = None
        for turn in range(max(len(mixed[0]), len(mixed[1]), len(mlps))):
            for part in mixed:
                stream = stream + part[turn] if turn < len(part) else stream
            mid = stream if mid is None else mid
            stream = stream + mlps[turn] if turn < len(mlps) else stream
        for value in side:
            stream = stream + value
        scale = self.architecture.stream_scale(layer)
        return mid, [stream if scale is None else stream * scale]

    def _part(self, layer: int, component: str, i: int, n_passes: int) -> list[mx.array]:
        values = self._values(layer, component)
        per_pass = len(values) // n_passes
        return values[i * per_pass : (i + 1) * per_pass]

    def _attention_checks(self) -> Iterator[Check]:
        eps = mx.finfo(self._dtype()).eps
        kernel = Check(
            "z = pattern @ v", max(1e-5, 16 * eps), "the kernel rounds on its way; relative to the largest value"
        )
        why = "float32 sums; where attention is written out, the model's own type"
        rows = Check("rows of the pattern and the sink's mass sum to 1", self._row_tolerance(), why)
        zeros = Check("masked entries of the pattern are exactly 0", 0.0, "nothing is added to them")
        for layer in range(self.model.cfg.n_layers):
            patterns = self._values(layer, "pattern")
            sinks, scores = self._values(layer, "sink"), self._values(layer, "attn_scores")
            for i, pattern in enumerate(patterns):
                total = pattern.sum(axis=-1) + (sinks[i] if i < len(sinks) else 0.0)
                rows.note(_deviation(total, mx.ones_like(total)), self._names_of(layer, "pattern", "sink"))
                if i < len(scores):
                    masked = mx.where(scores[i] == -mx.inf, mx.abs(pattern), 0.0)
                    zeros.note(scalar(masked.max()), self._names_of(layer, "attn_scores", "pattern"))
            for z, expected in self._weighted(layer, self.cache):
                kernel.note(_relative(z, expected), self._names_of(layer, "pattern", "z", "v"))
        yield from (
            check for check in (kernel, rows, zeros, *self._score_checks(), *self._expert_checks()) if check.compared
        )

    def _score_checks(self) -> tuple[Check, Check]:
        """Scores against queries and keys, and the pattern against scores."""
        why = "float32 softmax; where attention is written out, the model's own type"
        soft = Check("pattern = softmax(scores)", self._row_tolerance(), why)
        why = "products in the model's type, with a fitted scale; relative to the largest score"
        tolerance = max(1e-4, mx.finfo(self._dtype()).eps)
        dots = Check("scores = rot_q . rot_k x scale, where not masked", tolerance, why)
        for layer in range(self.model.cfg.n_layers):
            scores, patterns = self._values(layer, "attn_scores"), self._values(layer, "pattern")
            qs, ks = self._values(layer, "rot_q"), self._values(layer, "rot_k")
            for i, (score, pattern) in enumerate(zip(scores, patterns, strict=True)):
                if not self._values(layer, "sink"):
                    expected, _ = attention_pattern(score)
                    # A row with every key masked has no softmax.
                    seen = mx.any(score > -mx.inf, axis=-1, keepdims=True)
                    soft.note(
                        _deviation(mx.where(seen, pattern, 0), mx.where(seen, expected, 0)),
                        self._names_of(layer, "pattern"),
                    )
                if len(qs) == len(ks) == len(scores) and not self.architecture.reshapes_scores(layer):
                    keys = self.architecture.values_per_query(layer, ks[i].swapaxes(1, 2), score.shape[1])
                    raw = attention_scores(qs[i].swapaxes(1, 2), keys, scale=1.0, mask=None)
                    raw = mx.where(score > -mx.inf, raw, 0.0)
                    shown = mx.where(score > -mx.inf, score, 0.0)
                    scale = (raw * shown).sum() / mx.maximum((raw * raw).sum(), 1e-30)
                    dots.note(_relative(shown, raw * scale), self._names_of(layer, "attn_scores", "rot_q", "rot_k"))
        return soft, dots

    def _expert_checks(self) -> tuple[Check]:
        check = Check("experts are chosen by whole numbers, one weight and output for each", 0.0, "shapes and types")
        for layer in range(self.model.cfg.n_layers):
            names = ("expert_indices", "expert_weights", "expert_out")
            values = [self._values(layer, name) for name in names]
            if not all(values):
                continue
            for indices, weights, outputs in zip(*values, strict=True):
                scores = self._values(layer, "router_scores")
                whole = not mx.issubdtype(indices.dtype, mx.floating) and mx.issubdtype(weights.dtype, mx.floating)
                fits = indices.shape == weights.shape == outputs.shape[:3]
                known = not scores or scalar(indices.max()) < scores[0].shape[-1] or self._values(layer, "side_out")
                check.note(0.0 if whole and fits and known else math.inf, self._names_of(layer, *names))
        return (check,)

    def _weighted(self, layer: int, cache: ActivationCache) -> Iterator[tuple[mx.array, mx.array]]:
        """``z`` of a layer beside ``pattern @ v``, pass by pass."""
        patterns, zs, vs = (self._values(layer, c, cache) for c in ("pattern", "z", "v"))
        # A layer that attends twice and mixes the results has no z of each.
        if len(patterns) == len(zs) == len(vs):
            for pattern, z, v in zip(patterns, zs, vs, strict=True):
                heads = self.architecture.values_per_query(layer, v.swapaxes(1, 2), pattern.shape[1])
                yield z, weighted_values(pattern, heads).swapaxes(1, 2)

    def _row_tolerance(self) -> float:
        attending = (s.module for layer in self.architecture.sublayers for s in layer if s.kind == "attn")
        hand_written = any(self.architecture.is_hand_written(module) for module in attending)
        return max(1e-5, mx.finfo(self._dtype()).eps) if hand_written else 1e-5

    def _dtype(self) -> mx.Dtype:
        """The type that the model computes in: that of the stream."""
        return self._values(0, "resid_post")[0].dtype

    # Editing

    def edits(self) -> Iterator[Check]:
        """Putting a value back as it is changes nothing."""
        identity = Check("an edit that puts back what was there changes nothing", 0.0, "the same numbers: bit for bit")
        remade = [n for n in self.names if n.endswith((".hook_attn_scores", ".hook_pattern"))]
        written = [n for n in self.names if self._can_edit(n) and n not in remade]
        logits, _ = self._put_back(written, [])
        identity.note(_deviation(logits, self.logits), written)
        yield identity
        if len(self.tokens[0]) > 1:  # a single token attends to itself alone, whatever its query is
            yield self._reaching(written + [name for name in remade if self._can_edit(name)])
        if remade:
            eps = mx.finfo(self._dtype()).eps
            why = "z is made again from pattern and values, in float32; relative to the largest value"
            check = Check("an edit that puts back the pattern or scores changes nothing", max(1e-5, 16 * eps), why)
            # Deeper layers differ by what the first ones were rounded to, so each is held against its own pattern.
            parts = [n for n in self.names if self.model.hook_points[n].component in ("pattern", "v", "z")]
            _, cache = self._put_back(remade, parts)
            first = next(name for name in parts if name.endswith(".hook_z"))
            check.note(_relative(cache.records[first][0].value, self.cache.records[first][0].value), remade)
            for layer in range(self.model.cfg.n_layers):
                for z, expected in self._weighted(layer, cache):
                    check.note(_relative(z, expected), self._names_of(layer, "attn_scores", "pattern"))
            yield check

    def _reaching(self, names: list[str]) -> Check:
        """An edit of each component, in the last layer that has it, must change the logits."""
        check = Check("an edit that changes a value changes the logits", 0.0, "an edit that is lost would pass for one")
        last = {self.model.hook_points[name].component: name for name in names}
        for name in last.values():
            logits = _logits(self._run_hooked([Hook(self.model.hook_points[name], self._changed)]))
            check.note(math.inf if _deviation(logits, self.logits) == 0 else 0.0, [name])
        return check

    def _changed(self, value: mx.array, point: HookPoint) -> mx.array:
        """Other numbers of the same kind, in other proportions: norms would undo a common factor."""
        if not mx.issubdtype(value.dtype, mx.floating):
            return (value + 1) % (point.size("expert") or self._n_choices(point))
        return value * mx.linspace(0.5, 1.5, value.shape[-1])

    def _n_choices(self, point: HookPoint) -> int:
        """How many whole numbers there are to choose from: experts, or tokens."""
        if point.component != "expert_indices":
            return int(self.model.cfg.d_vocab)
        return int(self._values(point.layer or 0, "router_scores")[0].shape[-1])

    def _run_hooked(self, hooks: list[Hook]) -> Any:
        with self.model.instrument.attached(self.model.instrument.plan(hooks), alone=True):
            return self.model.model(mx.array(self.tokens))

    def _put_back(self, names: list[str], captured: list[str]) -> tuple[mx.array, ActivationCache]:
        """Logits of a pass in which every value of some points is replaced by itself, and captures of others."""
        cache = ActivationCache()
        recorder = Recorder(self.model.instrument.run, cache.add)
        hooks = [Hook(self.model.hook_points[name], lambda value, point: value) for name in names]
        hooks += [recorder.hook(self.model.hook_points[name]) for name in captured]
        return _logits(self._run_hooked(hooks)), cache

    def _can_edit(self, name: str) -> bool:
        point = self.model.hook_points[name]
        if point.component == "mixer_state":
            return False
        return not any(location.why_not for location in self.architecture.locations_of(point))

    # Several calls

    def continued(self) -> Iterator[Check]:
        """Prefill and single tokens, and chunks, against one full forward pass, all with a KV cache."""
        _, whole = self._cached([LENGTH])
        without = self._check_against("with a KV cache = without", _relative(self._plain_cached([LENGTH]), self.logits))
        self._compare(without, [self.cache], whole)
        yield without
        for name, lengths in (
            ("prefill + cached decode = one full forward", [LENGTH - DECODED, *[1] * DECODED]),
            ("chunked prefill = one chunk", list(CHUNKS)),
        ):
            plain = self._plain_deviation(lengths)
            check = self._check_against(name, plain)
            try:
                logits, parts = self._cached(lengths)
            except HookError as error:
                check.why = str(error)
                check.note(math.inf, ["hook_logits"])
                yield check
                continue
            exact = Check(f"{name.partition(' = ')[0]}: logits as of the plain model", 0.0, "bit for bit")
            exact.note(_deviation(logits, self._plain_cached(lengths)), ["hook_logits"])
            yield exact
            self._compare(check, whole, parts)
            yield check

    def _check_against(self, name: str, plain: float) -> Check:
        eps = mx.finfo(self._dtype()).eps
        tolerance = max(1e-4, min(64 * eps, 0.125))
        why = "sums of other shapes round differently, layer upon layer; relative to the largest value"
        if plain > tolerance:
            # What the model itself computes differs: captures can agree no better.
            return Check(name, math.inf, f"the plain model's own logits differ by {plain:.2g} between the two")
        return Check(name, tolerance, why)

    def _cached(self, lengths: list[int]) -> tuple[mx.array, list[ActivationCache]]:
        kv_cache = make_prompt_cache(self.model.model)
        parts, logits, start = [], [], 0
        for length in lengths:
            chunk = [self.tokens[0][start : start + length]]
            answer, cache = self._capture(chunk, kv_cache)
            parts.append(cache)
            logits.append(answer)
            start += length
        return mx.concatenate(logits, axis=1), parts

    def _plain_cached(self, lengths: list[int]) -> mx.array:
        kv_cache = make_prompt_cache(self.model.model)
        logits, start = [], 0
        for length in lengths:
            logits.append(_plain(self.model, [self.tokens[0][start : start + length]], cache=kv_cache))
            mx.eval(logits[-1])
            start += length
        return mx.concatenate(logits, axis=1)

    def _plain_deviation(self, lengths: list[int]) -> float:
        return _relative(self._plain_cached(lengths), self._plain_cached([LENGTH]))

    def _compare(self, check: Check, whole: list[ActivationCache], parts: list[ActivationCache]) -> None:
        pairs: dict[str, list[tuple[mx.array, mx.array]]] = {}
        for name in self.names:
            full = whole[0].records[name]
            pieces = [record for part in parts for record in part.records[name]]
            for index in sorted({record.pass_index for record in pieces}):
                expected = [record for record in full if record.pass_index == index]
                got = [record for record in pieces if record.pass_index == index]
                pairs.setdefault(name, []).append((_joined(got), _joined(expected)))
        self._note_pairs(check, pairs)

    def turned(self) -> Iterator[Check]:
        """Single tokens after a prompt, with rotating KV caches made so small that they forget and turn round."""
        why = "the kernel rounds on its way; relative to the largest value"
        tolerance = max(1e-5, 16 * mx.finfo(self._dtype()).eps)
        check = Check("decoding past a rotating KV cache: z = pattern @ v of all positions", tolerance, why)
        kv_cache = make_prompt_cache(self.model.model)
        for holder in [kv_cache, *(list_.caches for list_ in kv_cache if hasattr(list_, "caches"))]:
            if isinstance(holder, list):
                holder[:] = [_small(entry) for entry in holder]
        names = [n for n in self.names if self.model.hook_points[n].component in ("pattern", "v", "z")]
        if not names:
            return
        parts, start = [], 0
        for length in (LENGTH - DECODED, *[1] * DECODED):
            chunk = [self.tokens[0][start : start + length]]
            points = [self.model.hook_points[name] for name in names]
            parts.append(self.model._capture(chunk, points, None, kv_cache, alone=True)[1])
            start += length
        joined = ActivationCache({name: [r for part in parts for r in part.records[name]] for name in names})
        passes = {record.pass_index for records in joined.records.values() for record in records}
        for index in sorted(passes):
            whole = joined.of_pass(index)
            cache = ActivationCache({name: [join(records)] for name, records in whole.records.items()})
            for layer in range(self.model.cfg.n_layers):
                if len(self._values(layer, "pattern")) != len(self._values(layer, "z")):
                    continue  # it attends twice and mixes the results
                for z, expected in self._weighted(layer, cache):
                    check.note(_relative(z, expected), self._names_of(layer, "pattern", "z", "v"))
        if check.compared:
            yield check

    def batch(self) -> Iterator[Check]:
        """Rows of a batch against each row alone."""
        other = [self.tokens[0][::-1]]
        alone = [self.cache, self._capture(other)[1]]
        _, both = self._capture([self.tokens[0], other[0]])
        pairs: dict[str, list[tuple[mx.array, mx.array]]] = {}
        for name in self.names:
            for i, record in enumerate(both.records[name]):
                axes = record.hook_point.axes
                for row in range(2) if "batch" in axes else ():
                    picked = mx.take(record.value, mx.array([row]), axis=axes.index("batch"))
                    pairs.setdefault(name, []).append((picked, alone[row].records[name][i].value))
        check = self._check_against("a batch row = that row alone", 0.0)
        self._note_pairs(check, pairs)
        yield check

    def _note_pairs(self, check: Check, pairs: dict[str, list[tuple[mx.array, mx.array]]]) -> None:
        """Compare point by point, in forward order.

        In half precision the choice among experts may flip where their scores nearly tie: what follows such a flip is
        another computation and says nothing.
        """
        half = self._dtype() != mx.float32
        for name, values in pairs.items():
            chosen = self.model.hook_points[name].component == "expert_indices"
            if half and chosen and any(_deviation(*pair) for pair in values):
                check.why += f"; not compared from {name} on, where nearly tied experts were chosen differently"
                return
            for pair in values:
                check.note(_relative(*pair), [name])


def _small(cache: Any) -> Any:
    return RotatingKVCache(max_size=8, keep=cache.keep) if isinstance(cache, RotatingKVCache) else cache


def _joined(records: list[CapturedActivation]) -> mx.array:
    """Records of consecutive calls as one array; of a state, the last one."""
    if records[0].hook_point.position_axis is None:
        return records[-1].value
    return join(records).value


def _tokens(d_vocab: int, length: int) -> list[int]:
    """Tokens from all over the vocabulary: special ones at its beginning may have empty embeddings."""
    return [(d_vocab // 7 + i * max(1, d_vocab // (length + 1)) + i % 3) % d_vocab for i in range(length)]


def _logits(output: Any) -> mx.array:
    return output[0] if isinstance(output, tuple | list) else output


def _deviation(got: mx.array, expected: mx.array) -> float:
    """Largest absolute difference; equal infinities differ by nothing, other shapes by infinity."""
    if got.shape != expected.shape:
        return math.inf
    a, b = got.astype(mx.float32), expected.astype(mx.float32)
    return scalar(mx.where(a == b, 0.0, mx.abs(a - b)).max())


def _relative(got: mx.array, expected: mx.array) -> float:
    """The largest absolute difference over the largest finite absolute value."""
    size = mx.abs(expected.astype(mx.float32))
    largest = scalar(mx.where(mx.isfinite(size), size, 0.0).max())
    return _deviation(got, expected) / max(largest, 1e-9)
