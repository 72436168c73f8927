"""What a job does: the code that runs on the worker thread, from a checked request to plain data."""

import secrets
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mlx_hooks import CapturedActivation, GenerationStep, HookedModel, SelfTest
from mlx_hooks.analysis import attribution
from mlx_hooks.analysis.attribution import attribution_points
from mlx_hooks.analysis.logit_lens import HEADS, LogitLens, component_of
from mlx_hooks.encoding import encode_chat, encode_text
from mlx_hooks.interventions import InterventionPlan, Reach
from mlx_hooks.manager import CapturePlan
from mlx_hooks.token_text import TokenText
from neuroscope_bridge import payload
from neuroscope_bridge.payload import NumberTooLargeError

from .errors import ApiError
from .jobs import Progress
from .logprobs import TokenScore, score
from .schemas.analysis import AttributionRequest, LogitLensRequest
from .schemas.fields import MAX_PREDICTIONS, MAX_TOKENS
from .schemas.requests import ChatMessage, GenerationRequest, SamplingRequest

PromptSource = str | Sequence[int] | Sequence[ChatMessage]


@dataclass(frozen=True)
class Start:
    """What a generation begins with: the prompt's tokens, their spelling, and the ids of the hooks that must fire.

    ``due_from`` has for each the first position that it keeps: a text that ends before it leaves it silent.
    """

    tokens: list[int]
    strings: list[str]
    hook_ids: list[str]
    due_from: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One forward pass: the token it chose (None if none was asked for) and what was captured, as NumPy arrays.

    ``choice`` says which of the answers asked for it belongs to. The last one has a receipt per intervention.
    """

    token: int | None
    string: str | None
    text: str
    finish_reason: str | None
    captured: dict[str, list[tuple[dict[str, Any], np.ndarray]]]
    interventions: list[dict[str, Any]] = field(default_factory=list)
    choice: int = 0
    score: TokenScore | None = None

    def records(self, encoding: str, dtype: str) -> dict[str, list[dict[str, Any]]]:
        """The activations in wire format. Encoding takes time, so it is done in the reader's thread.

        Raises:
            ApiError: a number is too large for ``dtype``.
        """
        try:
            return {
                hook_id: [payload.encode_activation(a, **about, encoding=encoding, dtype=dtype) for about, a in found]
                for hook_id, found in self.captured.items()
            }
        except NumberTooLargeError as error:
            raise ApiError(400, str(error), code="invalid_value", param="activation_dtype") from error


def generate(
    model: HookedModel,
    request: GenerationRequest,
    prompt: PromptSource,
    plan: CapturePlan,
    interventions: InterventionPlan,
) -> Generator[Start | Step | Progress, None, None]:
    """The start first, then one step per forward pass, with its progress; closing it stops the model.

    Choices come one after the other. Choice i draws with the request's seed plus i, so the first is what a request for
    one choice gets.
    """
    tokens = prompt_tokens(model, prompt)
    limit = min(request.token_limit, room_for(model, tokens))
    sampling = sampling_of(model, request)
    spelling = TokenText(model.tokenizer)
    due_from = plan.due_from(Reach.of_generation(len(tokens), limit))
    yield Start(tokens, token_strings(model, tokens), plan.hook_ids, due_from)
    yield Progress(0.0, f"reading {len(tokens)} tokens")
    done, most = 0, max(1, limit * request.n)
    for choice in range(request.n):
        steps = model.generate_steps(
            tokens,
            max_tokens=limit,
            **sampling | {"seed": sampling["seed"] + choice},
            top_logprobs=request.n_logprobs,
            capture=plan,
            interventions=interventions,
        )
        for step in steps:
            yield _step(model, choice, step, spelling)
            done += 1
            yield Progress(min(1.0, done / most), f"{done} of at most {limit * request.n} tokens")


_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)


def sampling_of(model: HookedModel, request: SamplingRequest) -> dict[str, Any]:
    """How the engine's token loop is to choose tokens and where the text ends; without a seed, one is drawn."""
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    check_tokens(model, list(bias), "logit_bias")
    # The thread's random state begins with the clock; a request's numbers are nobody's to guess.
    seed = secrets.randbits(63) if request.seed is None else request.seed
    same = {name: getattr(request, name) for name in _SAMPLING}
    return same | {"logit_bias": bias, "seed": seed, "stop": request.stop_texts}


def _step(model: HookedModel, choice: int, step: GenerationStep, spelling: TokenText) -> Step:
    token, found = step.token, step.top_logprobs
    return Step(
        token=token,
        string=None if token is None else token_strings(model, [token])[0],
        text=step.text,
        finish_reason=step.finish_reason,
        captured={name: [_plain(one) for one in records] for name, records in step.activations.items()},
        interventions=[receipt.to_dict() for receipt in step.interventions],
        choice=choice,
        score=None if token is None or found is None else score(token, found, step.text_offset, spelling),
    )


def selftest(model: HookedModel) -> Generator[SelfTest | Progress, None, None]:
    """The self-test's checks, each with its name as progress, then the report."""
    checks = []
    for check in model.selftest_steps():
        checks.append(check)
        yield Progress(None, f"checked: {check.name}")
    yield SelfTest(model.cfg.model_type, checks)


def _plain(captured: CapturedActivation) -> tuple[dict[str, Any], np.ndarray]:
    array = captured.numpy()
    # A raw module's output has no named axes.
    axes = captured.hook_point.axes or tuple(f"axis_{i}" for i in range(array.ndim))
    about = {
        "hook_id": captured.hook_id,
        "layer_name": captured.layer_name,
        "component": captured.component,
        "hook_point": captured.hook_point.name,
        "layer_index": captured.hook_point.layer,
        "axes": axes,
        "phase": captured.phase,
        "step": captured.step,
        "pass_index": captured.pass_index,
        "positions": captured.positions,
        "position_ids": captured.listed_positions,
        "heads": captured.heads,
        "reduce": captured.reduce,
        "is_input": captured.is_input,
    }
    return about, array


def prompt_tokens(model: HookedModel, prompt: PromptSource) -> list[int]:
    """Token ids of a text, of a conversation (through the model's chat template), or of ids, which are checked.

    Raises:
        ApiError: no tokenizer, no chat template, one that refuses the messages, an id beyond the vocabulary, no tokens.
    """
    if isinstance(prompt, str):
        _tokenizer(model)
        tokens = encode_text(model, prompt)
    elif messages := [part for part in prompt if isinstance(part, ChatMessage)]:
        tokens = _chat_tokens(model, messages)
    else:
        tokens = check_tokens(model, [part for part in prompt if isinstance(part, int)], "prompt")
    if not tokens:
        raise ApiError(400, "The prompt has no tokens.", code="empty_prompt")
    return tokens


def room_for(model: HookedModel, tokens: list[int]) -> int:
    """How many tokens the model can still generate: the last of them is never read, so a full context leaves one.

    Raises:
        ApiError: the prompt alone is longer than the model's context.
    """
    limit = model.cfg.max_positions
    if limit is None:
        return MAX_TOKENS
    if len(tokens) > limit:
        raise ApiError(
            400,
            f"The prompt has {len(tokens)} tokens; the model reads at most {limit}.",
            code="context_length_exceeded",
        )
    return limit - len(tokens) + 1


def tokenize(model: HookedModel, source: PromptSource) -> dict[str, Any]:
    """Ids, spelling and count of what a prompt becomes, which may be more than the model reads."""
    tokens = prompt_tokens(model, source)
    return {"tokens": tokens, "token_strings": token_strings(model, tokens), "count": len(tokens)}


def check_tokens(model: HookedModel, tokens: list[int], param: str) -> list[int]:
    """The same ids, if the model has them all."""
    beyond = next((token for token in tokens if not 0 <= token < model.cfg.d_vocab), None)
    if beyond is not None:
        raise ApiError(
            400,
            f"Token id {beyond} is beyond the vocabulary. Allowed: 0 to {model.cfg.d_vocab - 1}.",
            code="invalid_value",
            param=param,
        )
    return tokens


def token_strings(model: HookedModel, tokens: Sequence[int]) -> list[str]:
    """Each token's own text; without a tokenizer, its number."""
    spelling = TokenText(model.tokenizer)
    return [spelling.text(token) for token in tokens]


def text_of(model: HookedModel, tokens: list[int]) -> str:
    """The text that the ids spell together."""
    return str(_tokenizer(model).decode(check_tokens(model, tokens, "tokens")))


def logit_lens(model: HookedModel, asked: LogitLensRequest) -> Generator[dict[str, Any] | Progress, None, None]:
    """What the model would say after each layer at positions of a prompt, which it runs once; the reply comes last."""
    tokens = prompt_tokens(model, asked.source)
    room_for(model, tokens)
    one = asked.positions is None
    positions = _positions(tokens, asked.position if one else asked.positions, "position" if one else "positions")
    n_heads = max(1, model.cfg.n_heads)
    rows_each = sum(n_heads if component_of(c) == HEADS else 1 for c in asked.components) * model.cfg.n_layers
    if (count := len(positions) * rows_each * asked.top_k) > MAX_PREDICTIONS:
        raise ApiError(
            400,
            f"The reply would list {count} tokens; at most {MAX_PREDICTIONS} are allowed: ask for fewer positions, "
            "components or a smaller top_k.",
            code="limit_exceeded",
            param="positions",
        )
    rows = LogitLens.from_model(model).readings(
        tokens,
        components=asked.components,
        positions=positions,
        top_k=asked.top_k,
        norm=asked.norm,
        apply_norm=asked.apply_norm,
        apply_softmax=asked.apply_softmax,
        token_directions=asked.token_directions,
    )
    layers: list[dict[str, Any]] = []
    for row in rows:
        layers.append(asdict(row))
        if row.position == positions[-1]:
            yield Progress(min(1.0, len(layers) / (len(positions) * rows_each)), f"read layer {row.layer}")
    only = positions[0] if len(positions) == 1 else None
    strings = token_strings(model, tokens)
    yield {
        "position": only,
        "token": None if only is None else strings[only],
        "positions": positions,
        "prompt_tokens": tokens,
        "token_strings": strings,
        "layers": layers,
    }


def direct_logit_attribution(model: HookedModel, asked: AttributionRequest) -> dict[str, Any]:
    """What each part of the model adds to a logit at positions of a prompt, which it runs once."""
    tokens = prompt_tokens(model, asked.source)
    room_for(model, tokens)
    positions = _positions(tokens, -1 if asked.positions is None else asked.positions, "positions")
    names = attribution_points(model)
    # What a raw module gives has no named axes to select positions of.
    selects = all(name in model.hook_points for name in names)
    _, cache = model.run_with_cache(tokens, names, positions if selects else None, logits="none")
    found = attribution.direct_logit_attribution(cache, asked.token_directions, model=model, positions=positions)
    plain = found.to_dict()
    return {
        "positions": positions,
        "prompt_tokens": tokens,
        "token_strings": token_strings(model, tokens),
        "tokens": plain["tokens"][0],
        "contributions": [part | {"values": part["values"][0]} for part in plain["contributions"]],
        "logits": plain["logits"][0],
        **{name: plain[name] for name in ("deviation", "cap", "notes")},
    }


def _positions(tokens: list[int], asked: Any, param: str) -> list[int]:
    """Positions of a prompt from 0: an index, which may count from the end, "all", a list, or start and stop.

    Raises:
        ApiError: for one that the prompt does not have.
    """
    n = len(tokens)
    if isinstance(asked, dict):
        found = list(range(asked.get("start", 0), min(asked.get("stop", n), n)))
    else:
        found = list(range(n)) if asked == "all" else sorted(asked) if isinstance(asked, list) else [asked]
    outside = next((p for p in found if not -n <= p < n), None)
    if outside is None and found:
        return [p % n for p in found]
    what = f"no position {outside}" if found else "no such position"
    raise ApiError(
        400,
        f"There is {what}: the prompt has {n} tokens, positions 0 to {n - 1}.",
        code="invalid_value",
        param=param,
    )


def _chat_tokens(model: HookedModel, messages: list[ChatMessage]) -> list[int]:
    if not _tokenizer(model).has_chat_template:
        raise ApiError(
            400, "This model has no chat template: use /v1/completions.", code="no_chat_template", param="messages"
        )
    try:
        return encode_chat(model, [m.plain() for m in messages])
    except Exception as error:
        # A template is a program that came with the model: it may raise anything, and means the messages by it.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ApiError(
            400, f"The model's chat template refuses these messages: {reason}", code="invalid_value", param="messages"
        ) from error


def _tokenizer(model: HookedModel) -> Any:
    if model.tokenizer is None:
        raise ApiError(
            400, "This model has no tokenizer: send token ids to /v1/completions.", code="no_tokenizer", param="prompt"
        )
    return model.tokenizer
