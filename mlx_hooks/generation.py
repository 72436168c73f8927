"""The token loop: mlx-lm's arithmetic and pipelining, with hooks.

As mlx-lm does, the prompt runs through the model in chunks of all but its last token, then the last token; and the
pass for token n+1 is started before token n is handed out. Captured arrays join the evaluation of their own pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .activations import ActivationCache, CapturedActivation, join, scalar
from .errors import HookError
from .hooks import Hook
from .instrument import Instrument
from .interventions import Firing, InterventionPlan, InterventionReceipt, InterventionSession, Reach
from .manager import CapturePlan
from .observers import SeenPass, Watch, Watched
from .reductions import finish
from .sampling import Choice, Sampler, Sampling, TokenLogprobs, whole_number

Activations = dict[str, list[CapturedActivation]]


@dataclass(frozen=True)
class GenerationStep:
    """One forward pass during generation, and the token that it led to.

    Args:
        index: 0 for the prompt, k for the pass of the k-th generated token.
        token: the id chosen after this pass; None when only the prompt was to be read, and with the last step of a
            generation that reads its last token too (``read_last``).
        text: text that became certain with this token; may be empty (part of a character, or of a stop string).
        text_offset: characters of text that were certain before this token; those of a stop string count.
        logprob: natural log of the token's probability, after logit processors, before temperature.
        top_logprobs: what the model's own logits say, if it was asked for.
        finish_reason: None while generation goes on; "stop" (end token or stop string) or "length".
        activations: records of this pass by hook id.
        interventions: with the last step, a receipt per intervention.
    """

    index: int
    token: int | None
    text: str
    logprob: float | None
    finish_reason: str | None
    activations: Activations = field(default_factory=dict)
    interventions: tuple[InterventionReceipt, ...] = ()
    text_offset: int = 0
    top_logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class GenerationResult:
    """What ``HookedModel.generate`` answers.

    Args:
        text: the generated text, without end token and stop string.
        tokens: the generated ids, an end token included.
        prompt_tokens: the ids of the prompt.
        finish_reason: "stop" or "length".
        activations: records by hook id: one per forward pass and hook point, prefill first; none of passes at whose
            positions the hook keeps nothing. Without ``read_last`` the last generated token was never fed to the model,
            so it has none.
        cache: the same activations by hook-point name, prompt and generated tokens as one sequence.
        interventions: what each intervention did.
        top_logprobs: per generated token what the model's own logits say, if it was asked for.
    """

    text: str
    tokens: list[int]
    prompt_tokens: list[int]
    finish_reason: str
    activations: Activations
    cache: ActivationCache
    interventions: tuple[InterventionReceipt, ...] = ()
    top_logprobs: tuple[TokenLogprobs, ...] = ()


def generate_steps(
    instrument: Instrument,
    tokenizer: Any,
    prompt_tokens: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    plan: CapturePlan,
    interventions: InterventionPlan | None = None,
    hooks: Sequence[Hook] = (),
    prefill_step_size: int = 2048,
    top_logprobs: int | None = None,
    watched: Watched | None = None,
    read_last: bool = False,
) -> Iterator[GenerationStep]:
    """Generate token by token. Hooks are attached during forward passes only, never while the caller holds the step.

    Observers (``watched``) are told of a pass before the step that it led to is handed out. With ``read_last`` the last
    token is fed as well: one more step, which chooses none, has its activations, the finish reason and the receipts.

    Raises:
        HookError: for an empty prompt, a token outside the vocabulary, or a number out of range; before the first step
            for an intervention that cannot be done, and in place of the last for one that never fired.
        ObserverError: when an observer failed.
    """
    _check(instrument.architecture.cfg.d_vocab, prompt_tokens, max_tokens, top_logprobs, sampling)
    reach = Reach.of_generation(len(prompt_tokens), max_tokens + read_last if max_tokens else 0)
    interventions = interventions or InterventionPlan([], instrument.architecture.cfg)
    session = interventions.session(instrument.run, reach)
    sampler = Sampler(sampling, instrument.architecture.cfg.d_vocab, top_logprobs)
    watch = _watch(watched, instrument, tokenizer, prompt_tokens, max_tokens, sampling)
    forward = _Forward(instrument, plan, hooks, session, prompt_tokens, sampler, reach, watch)
    text = _Text(tokenizer, stop)
    end_tokens = set(getattr(tokenizer, "eos_token_ids", None) or ())
    with _told(watch):
        yield from _steps(forward, session, text, end_tokens, max_tokens, prefill_step_size, read_last)


def _steps(
    forward: "_Forward",
    session: InterventionSession,
    text: "_Text",
    end_tokens: set[int],
    max_tokens: int,
    prefill_step_size: int,
    read_last: bool,
) -> Iterator[GenerationStep]:
    choice, activations, firings, seen = forward.prefill(prefill_step_size, sample=max_tokens > 0)
    session.keep(firings)
    watch = forward.watch
    if max_tokens == 0:
        receipts = session.close()
        if watch is not None:
            watch.end("length")
        yield GenerationStep(0, None, "", None, "length", activations, receipts)
        return
    for index in range(max_tokens):
        last = index == max_tokens - 1
        # Start the next pass before waiting for this token, so that the device never idles.
        ahead = None if last and not read_last else forward.decode(choice.token, index + 1)
        if watch is not None and seen is not None:
            watch.tell(seen)
        token_id = int(scalar(choice.token))
        offset = text.length
        new_text = text.add(token_id, is_end=token_id in end_tokens)
        stopped = token_id in end_tokens or text.stopped
        if stopped or last:
            new_text += text.finish()
        # What was held back may complete a stop string.
        stopped = stopped or text.stopped
        reason = "stop" if stopped else "length" if last else None
        ended = None if read_last else reason
        receipts = session.close() if ended else ()
        if watch is not None:
            watch.chosen(token_id)
            if ended:
                watch.end(ended)
        yield GenerationStep(
            index,
            token_id,
            new_text,
            scalar(choice.logprob),
            ended,
            activations,
            receipts,
            text_offset=offset,
            top_logprobs=choice.likeliest(),
        )
        if ended or ahead is None:
            return
        choice, activations, firings, seen = ahead
        session.keep(firings)
        if reason:
            receipts = session.close()
            if watch is not None and seen is not None:
                watch.tell(seen)
                watch.end(reason)
            yield GenerationStep(index + 1, None, "", None, reason, activations, receipts)
            return


def _watch(
    watched: Watched | None,
    instrument: Instrument,
    tokenizer: Any,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
) -> Watch | None:
    if not watched:
        return None
    settings = {"temperature": sampling.temperature, "top_k": sampling.top_k or None, "max_new_tokens": max_tokens}
    return Watch(watched, instrument, tokenizer, prompt, settings)


@contextmanager
def _told(watch: Watch | None) -> Iterator[None]:
    """Tell observers when the generation begins, and when it is closed before its end."""
    if watch is None:
        yield
        return
    try:
        watch.begin()
        yield
    except GeneratorExit:
        watch.end("closed")
        raise
    finally:
        watch.release()


def _check(d_vocab: int, tokens: Sequence[int], max_tokens: int, top_logprobs: int | None, sampling: Sampling) -> None:
    if not tokens:
        raise HookError("The prompt has no tokens: give it at least one.")
    whole_number("max_tokens", max_tokens)
    whole_number("top_logprobs", 0 if top_logprobs is None else top_logprobs)
    sampling.check()
    outside = [t for t in (*tokens, *(sampling.logit_bias or ())) if not isinstance(t, int) or not 0 <= t < d_vocab]
    if outside:
        raise HookError(f"Token {outside[0]} is outside the vocabulary: ids are 0 to {d_vocab - 1}.")


class _Pass(NamedTuple):
    """A chosen token, what was captured, what interventions did, and what observers are to be told."""

    choice: Choice
    activations: Activations
    firings: list[Firing]
    seen: SeenPass | None = None


class _Forward:
    """The forward passes of one generation and their captures."""

    def __init__(
        self,
        instrument: Instrument,
        plan: CapturePlan,
        hooks: Sequence[Hook],
        session: InterventionSession,
        prompt: Sequence[int],
        sampler: Sampler,
        reach: Reach,
        watch: Watch | None = None,
    ) -> None:
        self.instrument = instrument
        self.model = instrument.architecture.model
        self.prompt = mx.array(list(prompt))
        self.kv_cache = make_prompt_cache(self.model)
        self.sampler = sampler
        self.records: list[CapturedActivation] = []
        self.recorders = plan.hooks(instrument.run, self.records.append, reach)
        self.session = session
        self.watch = watch
        self.hooks = [*session.hooks, *hooks, *(watch.hooks if watch is not None else ())]
        self.due: list[Hook] = []
        self.attached = instrument.plan(self.hooks)
        self.position = 0
        self.hook_ids = plan.hook_ids
        self.seen: SeenPass | None = None

    def prefill(self, chunk: int, *, sample: bool) -> _Pass:
        """Run the prompt; its chunks' records are joined, so each hook has one record per hook point."""
        records: list[CapturedActivation] = []
        firings: list[Firing] = []
        head = self.prompt[:-1]
        for begin in range(0, head.size, chunk):
            self._forward(head[begin : begin + chunk], "prefill", 0)
            mx.eval([entry.state for entry in self.kv_cache], *self._arrays())
            records += self._take()
            firings += self.session.take()
        choice = self.sampler.choose(self._forward(self.prompt[-1:], "prefill", 0))
        joined = self._by_id(records + self._take(), joining=True)
        arrays = [record.value for group in joined.values() for record in group] + self.session.arrays()
        mx.async_eval(*(choice.arrays() if sample else []), *arrays)
        if not sample:
            # Without a token to wait for, nothing else would say that the pass is done.
            mx.eval(*arrays)
        return _Pass(choice, joined, firings + self.session.take())

    def decode(self, token: mx.array, step: int) -> _Pass:
        """Run one generated token."""
        choice = self.sampler.choose(self._forward(token, "decode", step))
        seen = self.seen
        mx.async_eval(*choice.arrays(), *self._arrays(), *(seen.arrays if seen is not None else ()))
        return _Pass(choice, self._by_id(self._take()), self.session.take(), seen)

    def _forward(self, tokens: mx.array, phase: str, step: int) -> mx.array:
        """Logits [1, d_vocab] after the last of the tokens."""
        # Those that keep nothing of this call are left out: nothing is computed for them.
        due = [hook for hook in self.recorders if hook.is_due(self.position, tokens.size)]
        if due != self.due:
            self.due, self.attached = due, self.instrument.plan([*self.hooks, *due])
        begins, self.position = self.position, self.position + tokens.size
        self.sampler.read(tokens)
        watching = self.watch.following(tokens, begins, phase, step) if self.watch is not None else nullcontext()
        with watching, self.instrument.attached(self.attached, phase=phase, step=step, begins=begins):
            logits = self.model(tokens[None], cache=self.kv_cache)
        self.seen = self.watch.passed(logits) if self.watch is not None else None
        return logits[:, -1, :]

    def _arrays(self) -> list[mx.array]:
        """What is evaluated together with the pass: captures and norms."""
        return [record.value for record in self.records] + self.session.arrays()

    def _take(self) -> list[CapturedActivation]:
        taken, self.records[:] = list(self.records), []
        return taken

    def _by_id(self, records: Iterable[CapturedActivation], joining: bool = False) -> Activations:
        groups: dict[tuple[str, str, int], list[CapturedActivation]] = {}
        for record in records:
            groups.setdefault((record.hook_id, record.hook_point.name, record.pass_index), []).append(record)
        by_id: Activations = {hook_id: [] for hook_id in self.hook_ids}
        for (hook_id, _, _), group in groups.items():
            if joining and group[0].hook_point.component == "mixer_state":
                # The state after the prompt is the one that its last chunk leaves.
                group = group[-1:]
            elif joining and group[0].hook_point.position_axis is not None:
                # A part of the prompt that is kept has keys for the whole of it, however it ran.
                group = [join(group, n_keys=self.prompt.size)]
            by_id[hook_id] += [finish(record) for record in group]
        return by_id


class _Text:
    """Text from tokens, holding back what may turn out to be part of a stop string; ``length`` counts it all."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        if any(not isinstance(s, str) or not s for s in stop):
            raise HookError("A stop string is a string of at least one character.")
        if stop and tokenizer is None:
            raise HookError("Stop strings need a tokenizer: HookedModel(model, tokenizer).")
        self.detokenizer = tokenizer.detokenizer if tokenizer is not None else None
        self.stop = list(stop)
        self.length = 0
        self.held = ""
        self.stopped = False

    def add(self, token: int, *, is_end: bool) -> str:
        """The text that this token makes certain."""
        if self.detokenizer is None or is_end:
            return ""
        self.detokenizer.add_token(token)
        return self._release(self.detokenizer.last_segment)

    def finish(self) -> str:
        """What was still held back when generation ends."""
        if self.detokenizer is None or self.stopped:
            return ""
        self.detokenizer.finalize()
        return self._release(self.detokenizer.last_segment, final=True)

    def _release(self, segment: str, final: bool = False) -> str:
        self.length += len(segment)
        self.held += segment
        found = [at for at in (self.held.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped = True
            text, self.held = self.held[: min(found)], ""
            return text
        keep = 0 if final else max((_overlap(self.held, s) for s in self.stop), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``: ("a END", "ENDING") -> 3."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


def collect(prompt_tokens: Sequence[int], steps: Iterable[GenerationStep], order: Iterable[str]) -> GenerationResult:
    """Run the steps to their end and join what they say; ``order`` lists hook-point names in forward order."""
    text, tokens = "", []
    activations: Activations = {}
    by_source: dict[str, dict[tuple[str, bool], list[CapturedActivation]]] = {}
    reason = "length"
    receipts: tuple[InterventionReceipt, ...] = ()
    likely: list[TokenLogprobs] = []
    for step in steps:
        text += step.text
        if step.top_logprobs is not None:
            likely.append(step.top_logprobs)
        if step.token is not None:
            tokens.append(step.token)
        reason, receipts = step.finish_reason or reason, step.interventions
        for hook_id, group in step.activations.items():
            activations.setdefault(hook_id, []).extend(group)
            for record in group:
                sources = by_source.setdefault(record.hook_point.name, {})
                sources.setdefault((hook_id, record.is_input), []).append(record)
    # Two hooks may ask for one point: the cache keeps it once, as it is rather than reduced.
    records = {
        name: min(sources.values(), key=lambda group: group[0].reduce is not None)
        for name, sources in by_source.items()
    }
    in_order = [name for name in order if name in records]
    cache = ActivationCache({name: records[name] for name in [*in_order, *(n for n in records if n not in in_order)]})
    cache.interventions = receipts
    return GenerationResult(text, tokens, list(prompt_tokens), reason, activations, cache, receipts, tuple(likely))
