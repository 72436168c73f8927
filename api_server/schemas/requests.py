"""What requests may hold. Types are strict (``"5"`` is no number, ``true`` is no integer) and an unknown field is
refused, never ignored. These models know no transport.

>>> ChatRequest.model_validate_json('{"messages": [{"role": "user", "content": "hello"}]}').token_limit
100
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticUseDefault, core_schema

MAX_TOKENS = 32768
DEFAULT_MAX_TOKENS = 100
MAX_MESSAGES = 1024
MAX_HOOKS = 2048
MAX_INTERVENTIONS = 256
MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_SEED = 2**63 - 1
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_TEXT_LOGPROBS = 5
MAX_BIASES = 1024
MAX_BIAS = 100
MAX_CONTENT_PARTS = 1024

MAX_TOKEN_ID = 2**31 - 1
MAX_ID_LENGTH = 200
MAX_RANGE_LENGTH = 10_000

ID_RULE = f"1 to {MAX_ID_LENGTH} printable characters, where no part between slashes is empty, '.' or '..'"
MODEL_PARTS = ("hook_points", "selftest")
"""What stands behind a model's id in an address."""
MODEL_ID_RULE = f"{ID_RULE}, neither 'load' nor ending in {' or '.join(repr('/' + part) for part in MODEL_PARTS)}"


def is_hook_id(text: str) -> bool:
    """Whether ``text`` can stand in an address: ``a/b`` can, ``a/../b`` would be another one."""
    return len(text) <= MAX_ID_LENGTH and text.isprintable() and not {"", ".", ".."} & set(text.split("/"))


def is_model_id(text: str) -> bool:
    """The same, and no address of its own: ``load`` is one."""
    return is_hook_id(text) and text != "load" and text.split("/")[-1] not in MODEL_PARTS


def _must(fits: Callable[[Any], bool], wanted: str) -> Callable[[Any], Any]:
    """A check that says one sentence."""

    def check(value: Any) -> Any:
        if fits(value):
            return value
        raise PydanticCustomError("unfit", "Input should be {wanted}", {"wanted": wanted})

    return check


@dataclass(frozen=True)
class _Inert(AfterValidator):
    """Marks a field that has no effect, and describes it by the values that it takes."""

    values: tuple[Any, ...] = ()

    def __get_pydantic_json_schema__(self, schema: Any, describe: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.values), "description": "Accepted, without effect."}


class _OrNull:
    """Marks a field whose null is the default, which its type does not show."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, describe: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [describe(schema), {"type": "null"}]}

    @staticmethod
    def _check(value: Any) -> Any:
        if value is None:
            raise PydanticUseDefault
        return value


def _only(*values: Any) -> _Inert:
    """A field that is taken at these values, which ask for nothing, and has no effect."""

    def check(value: Any) -> Any:
        # true is not 1, but 0.0 is 0.
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
            return value
        said = " or ".join(json.dumps(one) for one in values)
        raise PydanticCustomError("only", "only {said} is supported", {"said": said})

    return _Inert(check, values)


def supported(model: type[BaseModel]) -> list[str]:
    """The fields of a request that have an effect, in order."""
    fields = model.model_fields.items()
    return [name for name, field in fields if not any(isinstance(mark, _Inert) for mark in field.metadata)]


Name = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
"""An id in a question: an unknown one is answered with those that there are."""
ModelId = Annotated[Name, AfterValidator(_must(is_model_id, MODEL_ID_RULE))]
HookId = Annotated[Name, AfterValidator(_must(is_hook_id, ID_RULE))]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in value)
    return isinstance(value, str) and bool(value)


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= MAX_STOPS and all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts)


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)],
    # Before the union's own check, which would say a sentence per member.
    BeforeValidator(
        _must(_is_stop, f"a string of 1 to {MAX_STOP_LENGTH} characters or a list of at most {MAX_STOPS} of them")
    ),
]
Prompt = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[list[TokenId], Field(min_length=1)],
    BeforeValidator(_must(_is_prompt, "a string or a list of token ids, and not empty")),
]


def _is_bias(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_BIASES
        and all(key.isascii() and key.isdigit() and len(key) < 11 and str(int(key)) == key for key in value)
        and all(type(bias) in (int, float) and -MAX_BIAS <= bias <= MAX_BIAS for bias in value.values())
    )


LogitBias = Annotated[
    dict[str, float],
    BeforeValidator(
        _must(
            _is_bias,
            f"an object of at most {MAX_BIASES} token ids, each with a number from -{MAX_BIAS} to {MAX_BIAS}",
        )
    ),
]


class Request(BaseModel):
    """The base of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


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
    refusal: Annotated[Any, _only(None)] = None
    annotations: Annotated[Any, _only([], None)] = None
    audio: Annotated[Any, _only(None)] = None
    function_call: Annotated[Any, _only(None)] = None
    tool_calls: Annotated[Any, _only([], None)] = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates know it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN_ID


def _is_selection(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and not set(value) - {"start", "stop"} and all(_is_index(end) for end in value.values())
    return _is_index(value) or (isinstance(value, list) and bool(value) and all(_is_index(index) for index in value))


def _are_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_are_numbers(one) for one in value)
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_source(value: Any) -> bool:
    records = value if isinstance(value, list) else [value]
    return bool(records) and all(isinstance(record, dict) for record in records)


_SELECTION = "an index from 0 up, a list of them, or an object with 'start', 'stop' or both"
_HEADS = "an index from 0 up or a list of them"

# What these check themselves, and say in one sentence, is told to the description in JSON Schema.
_INDEX: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
_INDICES: dict[str, Any] = {"type": "array", "items": _INDEX, "minItems": 1, "uniqueItems": True}
_INTERVAL: dict[str, Any] = {
    "type": "object",
    "properties": {"start": _INDEX, "stop": _INDEX},
    "additionalProperties": False,
    "minProperties": 1,
}
_NULL: dict[str, Any] = {"type": "null"}


def _lists_of_numbers(depth: int) -> dict[str, Any]:
    """A number, null, or lists of these nested up to ``depth`` deep: as many axes as an activation has."""
    if not depth:
        return {"type": ["number", "null"]}
    inner = _lists_of_numbers(depth - 1)
    return {"anyOf": [{"type": ["number", "null"]}, {"type": "array", "items": inner, "minItems": 1}]}


_RECORD: dict[str, Any] = {
    "type": "object",
    "description": "an activation record, as this server returns it",
    "required": ["hook_point", "axes", "positions", "shape", "dtype", "data"],
}

Selection = Annotated[
    Any,
    BeforeValidator(_must(_is_selection, _SELECTION)),
    WithJsonSchema({"anyOf": [_INDEX, _INDICES, _INTERVAL, _NULL], "description": _SELECTION}),
]
Positions = Annotated[
    Any,
    BeforeValidator(_must(lambda value: value == "last" or _is_selection(value), f"'last', {_SELECTION}")),
    WithJsonSchema(
        {"anyOf": [{"const": "last"}, _INDEX, _INDICES, _INTERVAL, _NULL], "description": f"'last', {_SELECTION}"}
    ),
]
Heads = Annotated[
    Any,
    BeforeValidator(_must(lambda value: not isinstance(value, dict) and _is_selection(value), _HEADS)),
    WithJsonSchema({"anyOf": [_INDEX, _INDICES, _NULL], "description": _HEADS}),
]
Numbers = Annotated[
    Any,
    BeforeValidator(_must(_are_numbers, "a number, or lists of numbers")),
    WithJsonSchema(_lists_of_numbers(5) | {"description": "a number, or lists of numbers; null is -inf"}),
]
Source = Annotated[
    Any,
    BeforeValidator(_must(_is_source, "an activation record or a list of records")),
    WithJsonSchema({"anyOf": [_RECORD, {"type": "array", "items": _RECORD, "minItems": 1}, _NULL]}),
]


def _null_is_none(value: Any, check: Callable[[Any], Any]) -> Any:
    """A field that checks itself takes null as not given."""
    return None if value is None else check(value)


class HookRequest(Request):
    """One thing to capture: ``{"layer_name": "transformer.h.5", "component": "residual", "hook_id": "mine"}``.

    Either ``layer_name`` (``"*"`` for every layer) and ``component``, or ``hook_point``, a name or a glob.
    ``positions``, ``heads`` and ``reduce`` limit what is computed and sent.
    """

    layer_name: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    component: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    hook_point: HookId | None = None
    hook_id: HookId | None = None
    capture_input: bool = False
    capture_output: bool = True
    positions: Positions = None
    heads: Heads = None
    reduce: Literal["mean", "max", "last", "norm"] | None = None

    _nulls = field_validator("positions", "heads", mode="wrap")(_null_is_none)

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

    _nulls = field_validator("positions", "heads", "neurons", "keys", "passes", "source", mode="wrap")(_null_is_none)


class StreamOptions(Request):
    """OpenAI's. With ``include_usage`` the usage has a last event of its own, without it the finishing one has it."""

    include_usage: bool = False
    include_obfuscation: Annotated[Any, _only(False, None)] = None


class GenerationRequest(Request):
    """What all four ways to generate have in common. A number that is null is the default."""

    model: Name | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: Annotated[float, _OrNull()] = Field(0.7, ge=0, le=2)
    top_p: Annotated[float, _OrNull()] = Field(1.0, gt=0, le=1)
    top_k: Annotated[int, _OrNull()] = Field(0, ge=0, le=1_000_000)
    min_p: Annotated[float, _OrNull()] = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    frequency_penalty: Annotated[float, _OrNull()] = Field(0.0, ge=-2, le=2)
    presence_penalty: Annotated[float, _OrNull()] = Field(0.0, ge=-2, le=2)
    logit_bias: LogitBias | None = None
    n: Annotated[int, _OrNull()] = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: Stop | None = None
    stream: Annotated[bool, _OrNull()] = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    response_format: Annotated[Any, _only({"type": "text"}, None)] = None
    tools: Annotated[Any, _only([], None)] = None
    tool_choice: Annotated[Any, _only("none", None)] = None
    store: Annotated[Any, _only(False, None)] = None
    echo: Annotated[Any, _only(False, None)] = None

    @model_validator(mode="after")
    def _one_limit(self) -> "GenerationRequest":
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise PydanticCustomError(
                "one_limit", "'max_tokens' and 'max_completion_tokens' are two names of one limit: give one"
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
    logprobs: Annotated[bool, _OrNull()] = False
    top_logprobs: Annotated[int, _OrNull()] = Field(0, ge=0, le=MAX_TOP_LOGPROBS)

    audio: Annotated[Any, _only(None)] = None
    function_call: Annotated[Any, _only("none", None)] = None
    functions: Annotated[Any, _only([], None)] = None
    metadata: Annotated[Any, _only({}, None)] = None
    modalities: Annotated[Any, _only(["text"], None)] = None
    moderation: Annotated[Any, _only(None)] = None
    parallel_tool_calls: Annotated[Any, _only(True, False, None)] = None
    prediction: Annotated[Any, _only(None)] = None
    prompt_cache_key: Annotated[Any, _only(None)] = None
    prompt_cache_options: Annotated[Any, _only(None)] = None
    prompt_cache_retention: Annotated[Any, _only(None)] = None
    reasoning_effort: Annotated[Any, _only("none", None)] = None
    safety_identifier: Annotated[Any, _only(None)] = None
    service_tier: Annotated[Any, _only("auto", "default", None)] = None
    verbosity: Annotated[Any, _only(None)] = None
    web_search_options: Annotated[Any, _only(None)] = None

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

    top_logprobs: Annotated[Any, _only(0, None)] = None
    best_of: Annotated[Any, _only(1, None)] = None
    suffix: Annotated[Any, _only(None)] = None

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs


class CaptureRequest(GenerationRequest):
    """What capturing adds; ``max_tokens: 0`` only reads the prompt. There is one answer, whose activations come."""

    n: Annotated[Any, _only(1), _OrNull()] = 1
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    activation_hooks: list[HookRequest] | None = Field(None, max_length=MAX_HOOKS)
    interventions: list[InterventionRequest] | None = Field(None, max_length=MAX_INTERVENTIONS)
    activation_encoding: Literal["json", "base64", "none"] = "json"
    activation_dtype: Literal["float32", "float16"] = "float32"
    keep_capture: bool = False


class ChatCaptureRequest(CaptureRequest, ChatRequest):
    """``POST /v1/chat/completions/with_activations``"""


class CompletionCaptureRequest(CaptureRequest, CompletionRequest):
    """``POST /v1/completions/with_activations``"""


class NoQuery(Request):
    """The query of an address that takes no parameters."""


class ModelQuery(Request):
    """``?model=``"""

    model: Annotated[str, Field(max_length=MAX_ID_LENGTH)] | None = Field(None, description="A loaded model's id.")


_NUMBER = r"-?[0-9]{1,9}"
_SPAN = rf"({_NUMBER})?:({_NUMBER})?|{_NUMBER}(,{_NUMBER})*"
_WANTED = "'2', '0,2,5' or '2:10', where negative ones count from the end"


def _is_spelled(pattern: str, wanted: str) -> AfterValidator:
    fits = re.compile(pattern).fullmatch
    return AfterValidator(_must(lambda text: len(text) <= MAX_RANGE_LENGTH and bool(fits(text)), wanted))


def _pattern(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^({pattern})$", "maxLength": MAX_RANGE_LENGTH})


Range = Annotated[str, _is_spelled(_SPAN, _WANTED), _pattern(_SPAN)]
PositionRange = Annotated[str, _is_spelled(f"last|{_SPAN}", f"'last', {_WANTED}"), _pattern(f"last|{_SPAN}")]


class CapturesQuery(Request):
    """Which part of the list of captures."""

    limit: int = Field(100, ge=1, le=1000)
    after: Name | None = Field(None, description="The last capture's id of the part before.")


class RangeQuery(Request):
    """Which part of a capture, and as what."""

    positions: PositionRange | None = Field(
        None, description="Absolute positions. `last` is the prompt's last token and each generated one."
    )
    heads: Range | None = Field(None, description="Query heads; at k and v, the key-value heads that serve them.")
    layers: Range | None = Field(None, description="What belongs to no layer is left out.")
    reduce: Literal["mean", "max", "last", "norm"] | None = Field(
        None, description="Over positions, after the selection; `norm` is L2 over the last axis. The result is float32."
    )
    format: Literal["json", "npy", "safetensors"] = "json"
    encoding: Literal["json", "base64", "none"] = Field("json", description="Of `format=json`.")
    dtype: Literal["float32", "float16"] = Field("float32", description="Of numbers that are no integers.")


class LoadRequest(Request):
    """``POST /v1/models/load``; in the background, the reply is the job."""

    model_path: Annotated[str, Field(min_length=1, max_length=4096)]
    model_id: ModelId | None = None
    background: bool = False


class SelfTestRequest(Request):
    """``POST /v1/models/{id}/selftest``; in the background, the reply is the job."""

    background: bool = False


class RegisterHooksRequest(Request):
    """``POST /v1/activations/hooks``"""

    hooks: list[HookRequest] = Field(min_length=1, max_length=MAX_HOOKS)
    model: Name | None = None


class TokenizeRequest(Request):
    """``POST /v1/tokenize``: exactly one of ``text`` and ``messages``."""

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

    prompt: Prompt | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    model: Name | None = None
    top_k: Annotated[int, _OrNull()] = Field(5, ge=1, le=1000)
    position: int = Field(-1, ge=-MAX_TOKEN_ID, le=MAX_TOKEN_ID)

    @model_validator(mode="after")
    def _one_source(self) -> "LogitLensRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_source", "Exactly one of 'prompt' and 'messages' is required")
        return self

    @property
    def source(self) -> "str | list[int] | list[ChatMessage]":
        return self.prompt if self.prompt is not None else self.messages or []
