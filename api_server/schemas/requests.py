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
    MAX_TOKEN_ID,
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


class TextPart(Request):
    """Part of a message: ``{"type": "text", "text": "hello"}``; other types than text are refused."""

    type: Literal["text"]
    text: str


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("unfit", "Input should be a string or a list of text parts")
    return value


class ChatMessage(Request):
    """What somebody said. ``developer`` is OpenAI's newer name of ``system``; the parts of a text are joined."""

    role: Literal["system", "developer", "user", "assistant"]
    # A list in any case: the error about a part then has the address of that part.
    content: Annotated[
        list[TextPart],
        Field(min_length=1, max_length=MAX_CONTENT_PARTS),
        BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
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

    layer_name: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    component: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    hook_point: HookId | None = None
    hook_id: HookId | None = None
    capture_input: Annotated[bool, OrNull()] = False
    capture_output: Annotated[bool, OrNull()] = True
    positions: Positions = None
    heads: Heads = None
    reduce: Literal["mean", "max", "last", "norm"] | None = None

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

    type: Literal["zero", "mean", "set", "patch", "add", "scale", "clamp", "noise"]
    hook_point: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    layer_name: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    component: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    positions: Positions = None
    heads: Selection = None
    neurons: Selection = None
    keys: Selection = None
    phase: Literal["prefill", "decode"] | None = None
    passes: Selection = None
    values: Numbers = None
    source: Source = None
    over: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    vector: Numbers = None
    coefficient: float | None = None
    norm_match: bool | None = None
    factor: float | None = None
    min: float | None = None
    max: float | None = None
    std: float | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)

    _nulls = field_validator("positions", "heads", "neurons", "keys", "passes", "source", mode="wrap")(null_is_none)


class StreamOptions(Request):
    """OpenAI's. With ``include_usage`` the usage has a last event of its own, without it the finishing one has it."""

    include_usage: Annotated[bool, OrNull()] = False
    include_obfuscation: Annotated[Any, only(False, None)] = None


class GenerationRequest(Request):
    """What all four ways to generate have in common. A number that is null is the default."""

    model: Name | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: Annotated[Temperature, OrNull()] = 0.7
    top_p: Annotated[float, OrNull()] = Field(1.0, gt=0, le=1)
    top_k: Annotated[int, OrNull()] = Field(0, ge=0, le=1_000_000)
    min_p: Annotated[float, OrNull()] = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    frequency_penalty: Annotated[float, OrNull()] = Field(0.0, ge=-2, le=2)
    presence_penalty: Annotated[float, OrNull()] = Field(0.0, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    n: Annotated[int, OrNull()] = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: Stop | None = None
    stream: Annotated[bool, OrNull()] = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=MAX_ID_LENGTH)] | None = None

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

    @property
    def stop_texts(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``"""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: Annotated[bool, OrNull()] = False
    top_logprobs: Annotated[int, OrNull()] = Field(0, ge=0, le=MAX_TOP_LOGPROBS)

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

    prompt: Prompt
    logprobs: Annotated[
        _LogprobsCount | None,
        # A chat's way to ask for none.
        BeforeValidator(
            lambda value: None if value is False else value,
            json_schema_input_type=_LogprobsCount | Literal[False] | None,
        ),
    ] = None

    top_logprobs: Annotated[Any, only(0, None)] = None
    best_of: Annotated[Any, only(1, None)] = None
    suffix: Annotated[Any, only(None)] = None

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs


class CaptureRequest(GenerationRequest):
    """What capturing adds; ``max_tokens: 0`` only reads the prompt. There is one answer, whose activations come."""

    n: Annotated[Any, only(1), OrNull()] = 1
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    activation_hooks: list[HookRequest] | None = Field(None, max_length=MAX_HOOKS)
    interventions: list[InterventionRequest] | None = Field(None, max_length=MAX_INTERVENTIONS)
    activation_encoding: Annotated[Literal["json", "base64", "none"], OrNull()] = "json"
    activation_dtype: Annotated[Literal["float32", "float16"], OrNull()] = "float32"
    keep_capture: Annotated[bool, OrNull()] = False


class ChatCaptureRequest(CaptureRequest, ChatRequest):
    """``POST /v1/chat/completions/with_activations``"""


class CompletionCaptureRequest(CaptureRequest, CompletionRequest):
    """``POST /v1/completions/with_activations``"""


class LoadRequest(Request):
    """``POST /v1/models/load``; in the background, the reply is the job."""

    model_path: Annotated[str, Field(min_length=1, max_length=4096)]
    model_id: ModelId | None = None
    background: Annotated[bool, OrNull()] = False


class SelfTestRequest(Request):
    """``POST /v1/models/{id}/selftest``; in the background, the reply is the job."""

    background: Annotated[bool, OrNull()] = False


class RegisterHooksRequest(Request):
    """``POST /v1/activations/hooks``"""

    hooks: list[HookRequest] = Field(min_length=1, max_length=MAX_HOOKS)
    model: Name | None = None


class TokenizeRequest(Request):
    """``POST /v1/tokenize``: exactly one of ``text`` and ``messages``."""

    model_config = ConfigDict(json_schema_extra=one_of(("text",), ("messages",)))

    text: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    model: Name | None = None

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

    tokens: list[TokenId]
    model: Name | None = None


class LogitLensRequest(Request):
    """``POST /v1/analysis/logit_lens``: one of ``prompt`` and ``messages``; ``position`` may count from the end."""

    model_config = ConfigDict(json_schema_extra=one_of(("prompt",), ("messages",)))

    prompt: Prompt | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    model: Name | None = None
    top_k: Annotated[int, OrNull()] = Field(5, ge=1, le=1000)
    position: Annotated[int, OrNull()] = Field(-1, ge=-MAX_TOKEN_ID, le=MAX_TOKEN_ID)

    @model_validator(mode="after")
    def _one_source(self) -> "LogitLensRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_source", "Exactly one of 'prompt' and 'messages' is required")
        return self

    @property
    def source(self) -> "str | list[int] | list[ChatMessage]":
        return self.prompt if self.prompt is not None else self.messages or []
