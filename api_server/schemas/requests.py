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
    GetJsonSchemaHandler,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticUseDefault

MAX_TOKENS = 32768
DEFAULT_MAX_TOKENS = 100
MAX_MESSAGES = 1024
MAX_HOOKS = 2048
MAX_INTERVENTIONS = 256
MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_SEED = 2**63 - 1

MAX_TOKEN_ID = 2**31 - 1
MAX_ID_LENGTH = 200
MAX_RANGE_LENGTH = 10_000

ID_RULE = f"1 to {MAX_ID_LENGTH} printable characters, where no part between slashes is empty, '.' or '..'"
MODEL_ID_RULE = f"{ID_RULE}, neither 'load' nor ending in '/hook_points'"


def is_hook_id(text: str) -> bool:
    """Whether ``text`` can stand in an address: ``a/b`` can, ``a/../b`` would be another one."""
    return len(text) <= MAX_ID_LENGTH and text.isprintable() and not {"", ".", ".."} & set(text.split("/"))


def is_model_id(text: str) -> bool:
    """The same, and no address of its own: ``load`` is one."""
    return is_hook_id(text) and text != "load" and not text.endswith("/hook_points")


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
    """Describes a field whose null is the default, which its type does not show."""

    def __get_pydantic_json_schema__(self, schema: Any, describe: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [describe(schema), {"type": "null"}]}


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


class Request(BaseModel):
    """The base of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class ChatMessage(Request):
    role: Literal["system", "user", "assistant"]
    content: str


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
    """OpenAI's; the last event has the usage in any case."""

    include_usage: bool = False


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
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: Stop | None = None
    stream: Annotated[bool, _OrNull()] = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    n: Annotated[Any, _only(1, None)] = None
    logprobs: Annotated[Any, _only(False, None)] = None
    top_logprobs: Annotated[Any, _only(0, None)] = None
    frequency_penalty: Annotated[Any, _only(0, None)] = None
    presence_penalty: Annotated[Any, _only(0, None)] = None
    logit_bias: Annotated[Any, _only({}, None)] = None
    response_format: Annotated[Any, _only({"type": "text"}, None)] = None
    tools: Annotated[Any, _only([], None)] = None
    tool_choice: Annotated[Any, _only("none", None)] = None
    store: Annotated[Any, _only(False, None)] = None
    echo: Annotated[Any, _only(False, None)] = None

    @field_validator("temperature", "top_p", "top_k", "min_p", "stream", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any) -> Any:
        if value is None:
            raise PydanticUseDefault
        return value

    @model_validator(mode="after")
    def _one_limit(self) -> "GenerationRequest":
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise PydanticCustomError(
                "one_limit", "'max_tokens' and 'max_completion_tokens' are two names of one limit: give one"
            )
        return self

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


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``"""

    prompt: Prompt


class CaptureRequest(GenerationRequest):
    """What capturing adds; ``max_tokens: 0`` only reads the prompt."""

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
