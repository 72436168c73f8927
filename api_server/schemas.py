"""What requests may hold. Types are strict (``"5"`` is no number, ``true`` is no integer) and an unknown field is
refused, never ignored. These models know no transport.

>>> ChatRequest.model_validate_json('{"messages": [{"role": "user", "content": "hello"}]}').max_tokens
100
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_TOKENS = 32768
MAX_MESSAGES = 1024
MAX_HOOKS = 2048
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_SEED = 2**63 - 1

ModelId = Annotated[str, Field(min_length=1, max_length=200)]
HookId = Annotated[str, Field(min_length=1, max_length=200)]
TokenId = Annotated[int, Field(ge=0)]


def _check_union(fits: Callable[[Any], bool], wanted: str) -> BeforeValidator:
    """A whole check before a union's own, so that one sentence is said instead of one per member."""

    def check(value: Any) -> Any:
        if fits(value):
            return value
        raise PydanticCustomError("union", "Input should be {wanted}", {"wanted": wanted})

    return BeforeValidator(check)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(token) is int and token >= 0 for token in value)
    return isinstance(value, str) and bool(value)


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= MAX_STOPS and all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts)


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)],
    _check_union(_is_stop, f"a string of 1 to {MAX_STOP_LENGTH} characters or a list of at most {MAX_STOPS} of them"),
]
Prompt = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[list[TokenId], Field(min_length=1)],
    _check_union(_is_prompt, "a string or a list of token ids, and not empty"),
]


class Request(BaseModel):
    """The base of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class ChatMessage(Request):
    role: Literal["system", "user", "assistant"]
    content: str


class HookRequest(Request):
    """One thing to capture: ``{"layer_name": "transformer.h.5", "component": "residual", "hook_id": "mine"}``."""

    layer_name: Annotated[str, Field(min_length=1, max_length=500)]
    component: Annotated[str, Field(min_length=1, max_length=100)]
    hook_id: HookId | None = None
    capture_input: bool = False
    capture_output: bool = True

    @model_validator(mode="after")
    def _captures_something(self) -> "HookRequest":
        if not (self.capture_input or self.capture_output):
            raise PydanticCustomError("captures_nothing", "capture_input or capture_output must be true")
        return self


class GenerationRequest(Request):
    """What all four ways to generate have in common."""

    model: ModelId | None = None
    max_tokens: int = Field(100, ge=1, le=MAX_TOKENS)
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1_000_000)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stop: Stop | None = None
    stream: bool = False

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

    max_tokens: int = Field(100, ge=0, le=MAX_TOKENS)
    activation_hooks: list[HookRequest] | None = Field(None, max_length=MAX_HOOKS)
    activation_encoding: Literal["json", "base64", "none"] = "json"
    activation_dtype: Literal["float32", "float16"] = "float32"


class ChatCaptureRequest(CaptureRequest, ChatRequest):
    """``POST /v1/chat/completions/with_activations``"""


class CompletionCaptureRequest(CaptureRequest, CompletionRequest):
    """``POST /v1/completions/with_activations``"""


class LoadRequest(Request):
    """``POST /v1/models/load``"""

    model_path: Annotated[str, Field(min_length=1, max_length=4096)]
    model_id: ModelId | None = None


class RegisterHooksRequest(Request):
    """``POST /v1/activations/hooks``"""

    hooks: list[HookRequest] = Field(min_length=1, max_length=MAX_HOOKS)
    model: ModelId | None = None


class TokenizeRequest(Request):
    """``POST /v1/tokenize``: exactly one of ``text`` and ``messages``."""

    text: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    model: ModelId | None = None

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
    model: ModelId | None = None


class LogitLensRequest(Request):
    """``POST /v1/analysis/logit_lens``: one of ``prompt`` and ``messages``; ``position`` may count from the end."""

    prompt: Prompt | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    model: ModelId | None = None
    top_k: int = Field(5, ge=1, le=1000)
    position: int = -1

    @model_validator(mode="after")
    def _one_source(self) -> "LogitLensRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_source", "Exactly one of 'prompt' and 'messages' is required")
        return self

    @property
    def source(self) -> "str | list[int] | list[ChatMessage]":
        return self.prompt if self.prompt is not None else self.messages or []
