"""What replies hold, for the description in ``/openapi.json``. Views answer with plain data of these shapes: running
megabytes of numbers through a model would only cost time. The tests hold every answer to them.

A field with a default is one that some answers lack. Fields may be added later; none is taken away or changes its type.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Reply(BaseModel):
    """The base of all replies."""

    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=())


# -- errors -----------------------------------------------------------------------------------------------------------


class ErrorFault(Reply):
    message: str = Field(description="One sentence: what was got, what is allowed.")
    type: Literal["invalid_request_error", "server_error"]
    code: str | None = Field(description="A short name to compare, such as `model_not_found`.")
    param: str | None = Field(description="The field at fault, such as `activation_hooks[0].component`.")
    request_id: str | None = Field(
        description="The same as the header `X-Request-Id`; null for a job that no request began."
    )


class ErrorReply(Reply):
    """Every error, OpenAI's shape."""

    error: ErrorFault


# -- server and models ------------------------------------------------------------------------------------------------


class HealthReply(Reply):
    status: Literal["healthy"]
    service: Literal["neuroscope-mlx"]
    version: str
    models: list[str] = Field(description="Ids of the loaded models, the one loaded last at the end.")


class ModelReply(Reply):
    """OpenAI's model object, with the configuration."""

    id: str
    model_id: str = Field(description="The same as `id`.")
    object: Literal["model"]
    created: int = Field(description="When it was loaded, in seconds since 1970.")
    owned_by: str
    supports_activations: bool
    weight_bytes: int = Field(description="What its weights take in memory.")
    eos_token_ids: list[int] = Field(description="Tokens that end a text.")
    untrusted_hook_points: list[str] = Field(description="Hook points at which an identity of the self-test fails.")
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab_size: int
    model_type: str
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    max_positions: int | None = Field(description="The longest context in tokens; null if none is stated.")
    quantization: dict[str, Any] | None = Field(description='Such as `{"group_size": 64, "bits": 4}`.')


class ModelsReply(Reply):
    object: Literal["list"]
    data: list[ModelReply]
    models: list[ModelReply] = Field(description="The same as `data`.")


class LoadedReply(ModelReply):
    status: Literal["loaded"]


class UnloadedReply(Reply):
    id: str
    object: Literal["model"]
    deleted: Literal[True]
    status: Literal["unloaded"]


class HookPointReply(Reply):
    name: str = Field(description="The canonical name, such as `blocks.2.attn.hook_z`.")
    layer: int | None = Field(description="null outside the blocks.")
    component: str
    axes: list[str]
    sizes: list[int | None] = Field(description="One per axis; null where it depends on the request.")


class HookPointsReply(Reply):
    model: str
    hook_points: list[HookPointReply] = Field(description="In forward order.")


class CheckReply(Reply):
    name: str
    passed: bool
    deviation: float | None = Field(description="The largest one found; null if it is not finite.")
    tolerance: float | None = Field(description="null allows everything.")
    why: str
    compared: int
    hook_points: list[str] = Field(description="Those at which the identity does not hold.")


class SelfTestReply(Reply):
    model: str
    model_type: str
    passed: bool
    untrusted: list[str]
    checks: list[CheckReply]


class JobReply(Reply):
    """Work that the server does for one request; times are in seconds since 1970."""

    id: str
    object: Literal["job"]
    kind: str = Field(description="What it is: `chat.completion`, `text_completion`, `load`, `selftest` and so on.")
    model: str | None
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    fraction: float | None = Field(ge=0, le=1, description="How far it has come; null where nobody knows.")
    message: str = Field(description="The same for a person: `12 of at most 100 tokens`.")
    cancelling: bool = Field(description="It will be cancelled at its next step.")
    created: float
    started: float | None
    finished: float | None
    request_id: str | None = Field(description="Of the request that began it.")
    result: dict[str, Any] | None = Field(
        description="Of work in the background: what the request would have been answered; null in the list of jobs."
    )
    error: ErrorFault | None


class JobsReply(Reply):
    object: Literal["list"]
    data: list[JobReply] = Field(description="The newest first; those that ended are forgotten after a while.")


class TokenizeReply(Reply):
    tokens: list[int]
    token_strings: list[str]
    count: int


class DetokenizeReply(Reply):
    text: str


# -- activations ------------------------------------------------------------------------------------------------------


class ActivationRecord(Reply):
    """One array, and where in the model and the text it was taken."""

    hook_id: str
    layer_name: str
    component: str
    shape: list[Annotated[int, Field(ge=0)]] = Field(description="Of `data`.")
    dtype: Literal["float32", "float16", "int32"]
    is_input: bool
    hook_point: str
    layer_index: int | None = Field(description="null outside the blocks.")
    axes: list[str]
    phase: Literal["prefill", "decode"]
    step: int = Field(description="0 is the prompt, then one per generated token.")
    pass_index: int = Field(description="Which pass, for a layer that runs several times.")
    positions: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        description="Absolute token positions [start, stop)."
    )
    position_ids: list[int] | None = Field(
        None, description="The rows' absolute positions where they are not all of start..stop-1."
    )
    heads: list[int] | None = Field(None, description="The heads that are kept; null for all.")
    reduce: Literal["mean", "max", "last", "norm"] | None = None
    encoding: Literal["json", "base64", "none"]
    data: list[Any] | float | str | None = Field(
        None,
        description="`json`: nested lists, null for what is not finite. `base64`: little-endian bytes in C order. "
        "`none`: the field is absent.",
    )


Activations = dict[str, list[ActivationRecord]]


class Receipt(Reply):
    """What a hook delivered in the whole request."""

    fired: int = Field(ge=1, description="How many records.")
    positions: Annotated[list[int], Field(min_length=2, max_length=2)]
    bytes: int = Field(description="Size of the arrays before encoding.")


class InterventionReceipt(Reply):
    """What an intervention did in the whole request."""

    index: int
    type: str
    hook_points: list[str]
    fired: int
    positions: list[int]
    phases: list[Literal["prefill", "decode"]]
    norm_before: float | None
    norm_after: float | None


class SpelledTokens(Reply):
    """All tokens; the index in either list is the absolute position."""

    ids: list[int]
    strings: list[str]
    prompt_length: int


class Omitted(Reply):
    """Why the records have no data, and how to fetch it. In a stream, they have none from that event on."""

    bytes: int = Field(description="Of all numbers, before encoding.")
    limit: int = Field(description="The bytes of numbers that a reply carries; the records themselves do not count.")
    message: str


# -- captures ---------------------------------------------------------------------------------------------------------


class CaptureSummary(Reply):
    id: str
    object: Literal["capture"]
    created: int = Field(description="In seconds since 1970.")
    expires: int = Field(description="When it is deleted, unless somebody reads it before.")
    model: str
    bytes: int = Field(description="Size of the arrays.")
    hook_ids: list[str]
    prompt_tokens: int
    completion_tokens: int


class CapturesReply(Reply):
    object: Literal["list"]
    data: list[CaptureSummary]
    has_more: bool = Field(description="Whether there are more, after the last one's id.")
    disk_bytes: int = Field(description="What all captures take on disk.")
    max_bytes: int = Field(description="What they may take; those unused for longest make room.")
    max_age: float = Field(description="Seconds after which one that nobody reads is deleted.")


class CapturesClearedReply(Reply):
    status: Literal["captures_cleared"]
    deleted: int


class CaptureDeletedReply(Reply):
    id: str
    object: Literal["capture"]
    deleted: Literal[True]


class KeptArray(Reply):
    """One array of a capture: the records of one hook point as one sequence, where they are one."""

    name: str = Field(
        description="In safetensors: `{hook_id}/{hook_point}`, with `#pass{k}` where a layer runs several times and "
        "`#step{n}` where the records of several steps are no sequence."
    )
    hook_id: str
    layer_name: str
    component: str
    shape: list[Annotated[int, Field(ge=0)]]
    dtype: Literal["float32", "float16", "int32"]
    is_input: bool
    hook_point: str
    layer_index: int | None = Field(description="null outside the blocks.")
    axes: list[str]
    phase: Literal["prefill", "decode"] | None = Field(description="null where it is of both.")
    step: int | None = Field(description="null where it is of several.")
    pass_index: int
    positions: Annotated[list[int], Field(min_length=2, max_length=2)]
    position_ids: list[int] | None = Field(description="As of activation records.")
    heads: list[int] | None = Field(description="As of activation records.")
    reduce: Literal["mean", "max", "last", "norm"] | None


class KeptRecord(KeptArray):
    """The same with its numbers."""

    encoding: Literal["json", "base64", "none"]
    data: list[Any] | float | str | None = Field(None, description="As of activation records.")


class CaptureReply(CaptureSummary):
    tokens: SpelledTokens
    hooks: dict[str, Receipt]
    interventions: list[InterventionReceipt]
    finish_reason: Literal["stop", "length"] | None
    arrays: list[KeptArray]


class CaptureActivationsReply(Reply):
    capture_id: str
    model: str
    activations: dict[str, list[KeptRecord]] = Field(description="By hook id.")


# -- generation -------------------------------------------------------------------------------------------------------


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length"]


class AssistantMessage(Reply):
    role: Literal["assistant"]
    content: str


class TokenLogprob(Reply):
    """How probable the model itself found a token: the softmax of its logits, before bias, penalties, temperature and
    filters, and after interventions."""

    token: str = Field(description="Its own text; bytes that are no character by themselves as `\\xf0`.")
    logprob: float = Field(description="Natural logarithm of the probability; -9999 for one that cannot be.")
    bytes: list[int] | None = Field(description="UTF-8; a token may hold a part of a character.")


class ChosenTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob] = Field(description="The likeliest in its place, the likeliest first.")


class ChatLogprobs(Reply):
    """One entry per generated token, an end token included; in an event those of its step."""

    content: list[ChosenTokenLogprob]
    refusal: None


class TextLogprobs(Reply):
    """Four lists with one entry per generated token, an end token included; in an event those of its step."""

    tokens: list[str] = Field(description="Their texts; `bytes:\\xf0` for bytes that are no character by themselves.")
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] = Field(
        description="By text: the likeliest and the chosen one, so there may be one more than asked for."
    )
    text_offset: list[int] = Field(
        description="How many characters of the choice's text come before the token; a stop text counts."
    )


class ChatChoice(Reply):
    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None


class Delta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Reply):
    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None


class TextChoice(Reply):
    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None


class Generated(Reply):
    """What every reply to a generation has."""

    id: str
    created: int
    model: str


class Captured(Reply):
    """What capturing adds to a whole reply."""

    activations: Activations = Field(description="Records by hook id.")
    hooks: dict[str, Receipt]
    interventions: list[InterventionReceipt] = Field([], description="One receipt per intervention, in order.")
    tokens: SpelledTokens
    capture_id: str | None = Field(None, description="Where the activations can be fetched later; null if not kept.")
    omitted: Omitted | None = None


class CapturedEvent(Reply):
    """What capturing adds to an event: the activations of its step; to the last one, the accounts."""

    activations: Activations | None = None
    hooks: dict[str, Receipt] | None = None
    interventions: list[InterventionReceipt] | None = None
    tokens: SpelledTokens | None = None
    capture_id: str | None = None
    omitted: Omitted | None = None


class ChatReply(Generated):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatEvent(Generated):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionReply(Generated):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class CompletionEvent(Generated):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class ChatCaptureReply(Captured, ChatReply):
    """A chat reply with activations."""


class ChatCaptureEvent(CapturedEvent, ChatEvent):
    """One event of a chat reply with activations."""


class CompletionCaptureReply(Captured, CompletionReply):
    """A completion with activations."""


class CompletionCaptureEvent(CapturedEvent, CompletionEvent):
    """One event of a completion with activations."""


# -- hooks ------------------------------------------------------------------------------------------------------------


class HooksRegisteredReply(Reply):
    status: Literal["hooks_registered"]
    registered_hooks: list[str] = Field(description="The ids, those that the server made up included.")


class HookReply(Reply):
    layer_name: str | None = None
    component: str | None = None
    hook_id: str
    hook_point: str | None = None
    capture_input: bool
    capture_output: bool
    positions: Any = None
    heads: Any = None
    reduce: str | None = None


class HooksReply(Reply):
    model: str | None = Field(description="null if no model is loaded.")
    hooks: list[HookReply]


class HooksClearedReply(Reply):
    status: Literal["hooks_cleared"]


class HookRemovedReply(Reply):
    status: Literal["hook_removed"]
    hook_id: str
