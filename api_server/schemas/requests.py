"""What requests may hold. Types are strict (``"5"`` is no number, ``true`` is no integer) and an unknown field is
refused, never ignored. These models know no transport.

>>> ChatRequest.model_validate_json('{"messages": [{"role": "user", "content": "hello"}]}').token_limit
100
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from .fields import (
    DEFAULT_MAX_TOKENS,
    MAX_CHOICES,
    MAX_CONTENT_PARTS,
    MAX_HOOKS,
    MAX_ID_LENGTH,
    MAX_INTERVENTIONS,
    MAX_MESSAGES,
    MAX_PROMPTS,
    MAX_SEED,
    MAX_TEXT_LOGPROBS,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    Heads,
    HookId,
    LogitBias,
    ModelId,
    Name,
    Numbers,
    OrNull,
    Positions,
    Prompt,
    Request,
    Selection,
    Source,
    Stop,
    Temperature,
    TokenId,
    null_is_none,
    one_of,
    only,
)

MODEL = "A loaded model's id; by default the model loaded last."
LIMIT = f"The most tokens to generate; {DEFAULT_MAX_TOKENS} by default."
CHAT = "A chat, as the model's template writes it."
_LAYER_NAME = "A block, such as `transformer.h.5` or `*` for all; `transformer.wte`; `transformer.ln_f`."
_COMPONENT = (
    "`residual`, `attention`, `mlp`, `embedding`, `layernorm`, `query`, `key`, `value`, `attention_scores` or "
    "`attention_pattern`."
)


class TextPart(Request):
    """Part of a message: ``{"type": "text", "text": "hello"}``; other types than text are refused."""

    type: Literal["text"] = Field(description="Text is all that is read.")
    text: str = Field(description="The text.")


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("unfit", "Input should be a string or a list of text parts")
    return value


class ChatMessage(Request):
    """What somebody said. ``developer`` is OpenAI's newer name of ``system``; the parts of a text are joined."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="Who said it.")
    # A list in any case: the error about a part then has the address of that part.
    content: Annotated[
        list[TextPart],
        Field(min_length=1, max_length=MAX_CONTENT_PARTS),
        BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
        Field(description="What was said: a string, or parts that are joined."),
    ]

    # An answer's other fields, with which it may come back as a message.
    refusal: Annotated[Any, only(None)] = None
    annotations: Annotated[Any, only([], None)] = None
    audio: Annotated[Any, only(None)] = None
    function_call: Annotated[Any, only(None)] = None
    tool_calls: Annotated[Any, only([], None)] = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


_PLACE = one_of(("layer_name", "component"), ("hook_point",))
# Something is captured, and a hook point has no input of its own.
_SIDES: dict[str, Any] = {
    "anyOf": [
        {"properties": {"capture_output": {"enum": [True, None]}}},
        {"required": ["capture_input"], "properties": {"capture_input": {"const": True}}},
    ],
    "if": {"required": ["hook_point"], "properties": {"hook_point": {"type": "string"}}},
    "then": {"properties": {"capture_input": {"enum": [False, None]}}},
}


class HookRequest(Request):
    """One thing to capture: ``{"layer_name": "transformer.h.5", "component": "residual", "hook_id": "mine"}``.

    Either ``layer_name`` (``"*"`` for every layer) and ``component``, or ``hook_point``, a name or a glob.
    ``positions``, ``heads`` and ``reduce`` limit what is computed and sent.
    """

    model_config = ConfigDict(json_schema_extra=_PLACE | _SIDES)

    layer_name: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(None, description=_LAYER_NAME)
    component: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(None, description=_COMPONENT)
    hook_point: HookId | None = Field(
        None, description="A name of `GET .../hook_points`, or a glob: `blocks.*.attn.hook_z`."
    )
    hook_id: HookId | None = Field(None, description="Its name in the reply; made of the place where it is missing.")
    capture_input: Annotated[bool, OrNull()] = Field(False, description="What goes into the component.")
    capture_output: Annotated[bool, OrNull()] = Field(True, description="What comes out of it.")
    positions: Positions = None
    heads: Heads = None
    reduce: Literal["mean", "max", "last", "norm"] | None = Field(
        None, description="Over a record's positions; `norm` (L2) over its last axis. The result is float32."
    )

    _nulls = field_validator("positions", "heads", mode="wrap")(null_is_none)

    @model_validator(mode="after")
    def _one_place(self) -> "HookRequest":
        named = (self.layer_name is not None, self.component is not None)
        if named != ((False, False) if self.hook_point is not None else (True, True)):
            raise PydanticCustomError("one_place", "A hook has 'layer_name' and 'component', or else 'hook_point'")
        if self.hook_point is not None and self.capture_input:
            raise PydanticCustomError(
                "one_side", "A hook_point is one place: capture_input belongs to 'layer_name' and 'component'"
            )
        return self

    @model_validator(mode="after")
    def _captures_something(self) -> "HookRequest":
        if not (self.capture_input or self.capture_output):
            raise PydanticCustomError("captures_nothing", "capture_input or capture_output must be true")
        return self


class InterventionRequest(Request):
    """One edit: ``{"hook_point": "blocks.2.attn.hook_z", "type": "zero", "heads": [1]}``; see ``Intervention``."""

    model_config = ConfigDict(json_schema_extra=_PLACE)

    type: Literal["zero", "mean", "set", "patch", "add", "scale", "clamp", "noise"] = Field(
        description="What becomes of the selected values."
    )
    hook_point: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(
        None, description="A name of `GET .../hook_points`, or a glob: `blocks.*.attn.hook_z`."
    )
    layer_name: Annotated[str, Field(min_length=1, max_length=500)] | None = Field(None, description=_LAYER_NAME)
    component: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(None, description=_COMPONENT)
    positions: Positions = None
    heads: Selection = None
    neurons: Selection = None
    keys: Selection = None
    phase: Literal["prefill", "decode"] | None = Field(None, description="In the prompt or in generated tokens only.")
    passes: Selection = None
    values: Numbers = None
    source: Source = Field(None, description="An activation record as this server returns it, or a list of them.")
    over: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)] | None = Field(
        None, description="Of `mean`: the prompts over whose positions it is taken."
    )
    vector: Numbers = None
    coefficient: float | None = Field(None, description="Of `add`: how much of the vector.")
    norm_match: bool | None = Field(None, description="Of `add`: give the vector the length of what it is added to.")
    factor: float | None = Field(None, description="Of `scale`.")
    min: float | None = Field(None, description="Of `clamp`.")
    max: float | None = Field(None, description="Of `clamp`.")
    std: float | None = Field(None, ge=0, description="Of `noise`: the standard deviation.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Of `noise`: the same seed gives the same noise.")

    _nulls = field_validator("positions", "heads", "neurons", "keys", "passes", "source", mode="wrap")(null_is_none)


class StreamOptions(Request):
    """OpenAI's. With ``include_usage`` the usage has a last event of its own, without it the finishing one has it."""

    include_usage: Annotated[bool, OrNull()] = Field(False, description="Give the usage an event of its own.")
    include_obfuscation: Annotated[Any, only(False, None)] = None


class SamplingRequest(Request):
    """How one text is generated. A number that is null is the default."""

    model: Name | None = Field(None, description=MODEL)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description=LIMIT)
    temperature: Annotated[Temperature, OrNull()] = Field(0.7, description="0 takes the likeliest token.")
    top_p: Annotated[float, OrNull()] = Field(
        1.0, gt=0, le=1, description="Draw among the likeliest tokens that have this probability together."
    )
    top_k: Annotated[int, OrNull()] = Field(
        0, ge=0, le=1_000_000, description="Draw among this many of the likeliest tokens; 0 is all."
    )
    min_p: Annotated[float, OrNull()] = Field(
        0.0, ge=0, le=1, description="Leave out tokens below this share of the likeliest one's probability."
    )
    repetition_penalty: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Positive logits of the last 20 tokens are divided by it, negative ones multiplied.",
    )
    frequency_penalty: Annotated[float, OrNull()] = Field(
        0.0, ge=-2, le=2, description="A token's logit loses this as often as the token was generated."
    )
    presence_penalty: Annotated[float, OrNull()] = Field(
        0.0, ge=-2, le=2, description="A token's logit loses this once the token was generated."
    )
    logit_bias: LogitBias | None = Field(None, description="Token ids, each with what is added to its logit.")
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="The same seed gives the same text.")
    stop: Stop | None = Field(None, description="The text ends before the one that is complete first.")
    stream: Annotated[bool, OrNull()] = Field(False, description="Answer with server-sent events.")
    user: Annotated[str, Field(max_length=MAX_ID_LENGTH)] | None = Field(
        None, description="Who asks: users of one address are served by turns."
    )

    @property
    def token_limit(self) -> int:
        """The most tokens to generate."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def stop_texts(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class GenerationRequest(SamplingRequest):
    """What all four ways to generate have in common."""

    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS, description="The same as `max_tokens`.")
    n: Annotated[int, OrNull()] = Field(
        1, ge=1, le=MAX_CHOICES, description="How many choices; choice i draws with `seed` + i."
    )
    stream_options: StreamOptions | None = Field(None, description="With `stream` only.")

    response_format: Annotated[Any, only({"type": "text"}, None)] = None
    tools: Annotated[Any, only([], None)] = None
    tool_choice: Annotated[Any, only("none", None)] = None
    store: Annotated[Any, only(False, None)] = None
    echo: Annotated[Any, only(False, None)] = None

    @model_validator(mode="after")
    def _one_limit(self) -> "GenerationRequest":
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise PydanticCustomError(
                "one_limit",
                "'max_tokens' and 'max_completion_tokens' are two names of one limit: give one",
                {"param": "max_tokens"},
            )
        return self

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream", True):
            raise PydanticCustomError("no_stream", "it is allowed with 'stream': true only")
        return value

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell with each token; None if nothing is asked about probabilities."""
        return None

    @property
    def token_limit(self) -> int:
        """The most tokens to generate, under whichever of its names it came."""
        given = (limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None)
        return next(given, DEFAULT_MAX_TOKENS)


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``"""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, description="The chat, in order.")
    logprobs: Annotated[bool, OrNull()] = Field(False, description="Tell how probable the model found each token.")
    top_logprobs: Annotated[int, OrNull()] = Field(
        0,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="How many of the likeliest tokens to tell with each; with `logprobs` only.",
    )

    audio: Annotated[Any, only(None)] = None
    function_call: Annotated[Any, only("none", None)] = None
    functions: Annotated[Any, only([], None)] = None
    metadata: Annotated[Any, only({}, None)] = None
    modalities: Annotated[Any, only(["text"], None)] = None
    moderation: Annotated[Any, only(None)] = None
    parallel_tool_calls: Annotated[Any, only(True, False, None)] = None
    prediction: Annotated[Any, only(None)] = None
    prompt_cache_key: Annotated[Any, only(None)] = None
    prompt_cache_options: Annotated[Any, only(None)] = None
    prompt_cache_retention: Annotated[Any, only(None)] = None
    reasoning_effort: Annotated[Any, only("none", None)] = None
    safety_identifier: Annotated[Any, only(None)] = None
    service_tier: Annotated[Any, only("auto", "default", None)] = None
    verbosity: Annotated[Any, only(None)] = None
    web_search_options: Annotated[Any, only(None)] = None

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("logprobs", True):
            raise PydanticCustomError("no_logprobs", "it is allowed with 'logprobs': true only")
        return value

    @property
    def n_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


_LogprobsCount = Annotated[int, Field(ge=0, le=MAX_TEXT_LOGPROBS)]


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``"""

    prompt: Prompt = Field(description="A text, or token ids.")
    logprobs: Annotated[
        _LogprobsCount | None,
        # A chat's way to ask for none.
        BeforeValidator(
            lambda value: None if value is False else value,
            json_schema_input_type=_LogprobsCount | Literal[False] | None,
        ),
    ] = Field(None, description="Tell how probable the model found each token, and this many of the likeliest ones.")

    top_logprobs: Annotated[Any, only(0, None)] = None
    best_of: Annotated[Any, only(1, None)] = None
    suffix: Annotated[Any, only(None)] = None

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs


class CaptureRequest(GenerationRequest):
    """What capturing adds; ``max_tokens: 0`` only reads the prompt. There is one answer, whose activations come."""

    n: Annotated[Any, only(1), OrNull()] = Field(1, description="There is one answer.")
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description=f"{LIMIT} 0 only reads the prompt.")
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description="The same as `max_tokens`.")
    activation_hooks: list[HookRequest] | None = Field(
        None, max_length=MAX_HOOKS, description="What to capture; without any, what the registered hooks do."
    )
    interventions: list[InterventionRequest] | None = Field(
        None, max_length=MAX_INTERVENTIONS, description="What to edit, in this order, before anything is captured."
    )
    activation_encoding: Annotated[Literal["json", "base64", "none"], OrNull()] = Field(
        "json", description="How the numbers travel; `none`: records without data."
    )
    activation_dtype: Annotated[Literal["float32", "float16"], OrNull()] = Field(
        "float32", description="As what; integers are int32 in any case."
    )
    keep_capture: Annotated[bool, OrNull()] = Field(False, description="Keep the activations, to be fetched later.")


class ChatCaptureRequest(CaptureRequest, ChatRequest):
    """``POST /v1/chat/completions/with_activations``"""


class CompletionCaptureRequest(CaptureRequest, CompletionRequest):
    """``POST /v1/completions/with_activations``"""


class LoadRequest(Request):
    """``POST /v1/models/load``; in the background, the reply is the job."""

    model_path: Annotated[str, Field(min_length=1, max_length=4096)] = Field(
        description="`neuroscope-tiny`, a folder on the server, or a Hugging Face id."
    )
    model_id: ModelId | None = Field(None, description="Its name in requests; by default the last part of the path.")
    background: Annotated[bool, OrNull()] = Field(False, description="Answer 202 and the job at once.")


class SelfTestRequest(Request):
    """``POST /v1/models/{id}/selftest``; in the background, the reply is the job."""

    background: Annotated[bool, OrNull()] = Field(False, description="Answer 202 and the job at once.")


class RegisterHooksRequest(Request):
    """``POST /v1/activations/hooks``"""

    hooks: list[HookRequest] = Field(
        min_length=1, max_length=MAX_HOOKS, description="One with a known id takes that one's place."
    )
    model: Name | None = Field(None, description=MODEL)


class TokenizeRequest(Request):
    """``POST /v1/tokenize``: exactly one of ``text`` and ``messages``."""

    model_config = ConfigDict(json_schema_extra=one_of(("text",), ("messages",)))

    text: str | None = Field(None, description="A text.")
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES, description=CHAT)
    model: Name | None = Field(None, description=MODEL)

    @model_validator(mode="after")
    def _one_source(self) -> "TokenizeRequest":
        if (self.text is None) == (self.messages is None):
            raise PydanticCustomError("one_source", "Exactly one of 'text' and 'messages' is required")
        return self

    @property
    def source(self) -> "str | list[ChatMessage]":
        return self.text if self.text is not None else self.messages or []


class DetokenizeRequest(Request):
    """``POST /v1/detokenize``"""

    tokens: list[TokenId] = Field(description="Token ids.")
    model: Name | None = Field(None, description=MODEL)
