"""What analyses take and give: requests, and replies for the description. These models know no transport."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from mlx_hooks.analysis.logit_lens import HEADS, component_of

from .fields import (
    MAX_COMPONENTS,
    MAX_INTERVENTIONS,
    MAX_LAYERS,
    MAX_MESSAGES,
    MAX_TOKEN_ID,
    MAX_TOKENS,
    MAX_VECTORS,
    Direction,
    Directions,
    FolderName,
    Name,
    OrNull,
    Prompt,
    PromptPositions,
    Request,
    Vector,
    one_of,
)
from .replies import FinishReason, InterventionReceipt, Reply, SpelledTokens, Usage
from .requests import CHAT, LIMIT, MODEL, ChatMessage, InterventionRequest, SamplingRequest


class PromptRequest(Request):
    """A prompt to analyse: one of ``prompt`` and ``messages``."""

    model_config = ConfigDict(json_schema_extra=one_of(("prompt",), ("messages",)))

    prompt: Prompt | None = Field(None, description="A text, or token ids.")
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES, description=CHAT)
    model: Name | None = Field(None, description=MODEL)

    @model_validator(mode="after")
    def _one_source(self) -> "PromptRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_source", "Exactly one of 'prompt' and 'messages' is required")
        return self

    @property
    def source(self) -> "str | list[int] | list[ChatMessage]":
        return self.prompt if self.prompt is not None else self.messages or []


class LogitLensRequest(PromptRequest):
    """``POST /v1/analysis/logit_lens``: one of ``prompt`` and ``messages``; ``position`` may count from the end."""

    top_k: Annotated[int, OrNull()] = Field(5, ge=1, le=1000, description="How many tokens of each layer.")
    position: Annotated[int, OrNull()] = Field(
        -1, ge=-MAX_TOKEN_ID, le=MAX_TOKEN_ID, description="Of the prompt's tokens; negative ones count from the end."
    )
    positions: Annotated[PromptPositions, OrNull()] = Field(
        None, description="Several, or `all`, in the place of `position`."
    )
    components: Annotated[list[Name], Field(min_length=1, max_length=MAX_COMPONENTS), OrNull()] = Field(
        ["resid_post"], description="What is read: `resid_post`, `resid_mid`, `attn_out`, `mlp_out`, `heads` and so on."
    )
    norm: Annotated[Literal["own", "final"], OrNull()] = Field(
        "own", description="The last norm's statistics: of what it reads, or as they are at the model's end."
    )
    apply_norm: Annotated[bool, OrNull()] = Field(True, description="false reads without the last norm.")
    token_directions: Annotated[Directions, OrNull()] = Field(
        None, description="Tokens, or pairs of them, whose logits, or differences, each row tells in `values`."
    )
    apply_softmax: Annotated[bool, OrNull()] = Field(False, description="`values` are of probabilities, not logits.")

    @property
    def is_brief(self) -> bool:
        """Whether it takes no longer than reading the prompt once."""
        return self.positions is None and HEADS not in map(component_of, self.components)


class AttributionRequest(PromptRequest):
    """``POST /v1/analysis/direct_logit_attribution``: one of ``prompt`` and ``messages``."""

    token_directions: Direction = Field(description="One token, or one pair of them, in a list.")
    positions: Annotated[PromptPositions, OrNull()] = Field(
        None, description="Of the prompt's tokens; the last by default."
    )


class TraitVectorRequest(Request):
    """A direction of the residual stream, to watch: ``{"name": "polite", "layer": 2, "vector": [0.5, -1, ...]}``."""

    model_config = ConfigDict(json_schema_extra=one_of(("layer",), ("hook_point",)))

    name: Name = Field(description="What its scores are called.")
    layer: int | None = Field(None, ge=0, le=MAX_LAYERS, description="The layer after which it is watched.")
    hook_point: Annotated[str, Field(pattern=r"^blocks\.(0|[1-9][0-9]{0,3})\.hook_resid_post$")] | None = Field(
        None, description="The same, spelled: `blocks.2.hook_resid_post`."
    )
    vector: Vector
    threshold: float | None = Field(
        None, description="The score h.v/|v| that parts with from without; the reply repeats it."
    )

    @model_validator(mode="after")
    def _one_place(self) -> "TraitVectorRequest":
        if (self.layer is None) == (self.hook_point is None):
            raise PydanticCustomError("one_place", "A vector has exactly one of 'layer' and 'hook_point'")
        return self

    @property
    def at_layer(self) -> int:
        """The layer, however it was named."""
        return self.layer if self.layer is not None else int(str(self.hook_point).split(".")[1])


class DynamicsRequest(Request):
    """How the commitment point is found; see ``trait_dynamics``."""

    threshold: Annotated[float, OrNull()] = Field(
        0.1, gt=0, description="A trait is committed where its acceleration is smaller than this."
    )
    relative: Annotated[bool, OrNull()] = Field(False, description="The threshold is a share of the largest one.")
    stays_below: Annotated[bool, OrNull()] = Field(False, description="And stays smaller from there on.")

    @model_validator(mode="after")
    def _a_share(self) -> "DynamicsRequest":
        if self.relative and self.threshold > 1:
            raise PydanticCustomError("no_share", "A relative threshold is at most 1", {"param": "dynamics.threshold"})
        return self


_WATCHED = {
    "anyOf": [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in ("vectors", "experiment")
    ]
}


class TraitsRequest(PromptRequest, SamplingRequest):
    """``POST /v1/analysis/traits``: one of ``prompt`` and ``messages``; ``vectors``, ``experiment`` or both."""

    model_config = ConfigDict(json_schema_extra=one_of(("prompt",), ("messages",)) | _WATCHED)

    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS, description=f"{LIMIT} 0 only reads the prompt.")
    vectors: Annotated[list[TraitVectorRequest], Field(min_length=1, max_length=MAX_VECTORS)] | None = Field(
        None, description="Directions to watch; one name each."
    )
    experiment: FolderName | None = Field(None, description="Watch the stored vectors of this experiment's traits.")
    traits: Annotated[list[FolderName], Field(min_length=1, max_length=MAX_VECTORS)] | None = Field(
        None, description="Of the experiment; all that it has by default."
    )
    method: Literal["probe", "mean_diff", "ica", "gradient", "given"] | None = Field(
        None, description="Of the stored vectors; by default the first of these that there is."
    )
    layer: int | None = Field(None, ge=0, le=MAX_LAYERS, description="Of the stored vectors; by default the best one.")
    stored_chat: Annotated[bool, OrNull()] = Field(
        False,
        description="Put `prompt`, a text, to the model as the prompts were that the stored vectors were made of: "
        "through the same chat template, after the same system message.",
    )
    normalize: Annotated[bool, OrNull()] = Field(True, description="Scores are h.v/|v|; false: h.v.")
    interventions: list[InterventionRequest] | None = Field(
        None, max_length=MAX_INTERVENTIONS, description="What to edit, in this order, before anything is scored."
    )
    dynamics: DynamicsRequest | None = Field(None, description="How the commitment point is found.")

    @property
    def dynamics_settings(self) -> dict[str, Any]:
        """The arguments of ``trait_dynamics``."""
        return self.dynamics.model_dump() if self.dynamics is not None else {}

    @model_validator(mode="after")
    def _something_to_watch(self) -> "TraitsRequest":
        if self.vectors is None and self.experiment is None:
            raise PydanticCustomError("nothing_to_watch", "At least one of 'vectors' and 'experiment' is required")
        for name in ("traits", "method", "layer"):
            if self.experiment is None and getattr(self, name) is not None:
                raise PydanticCustomError(
                    "no_experiment", "Field '{param}' is of an experiment's stored vectors: name one", {"param": name}
                )
        return self

    @model_validator(mode="after")
    def _a_text_of_stored_vectors(self) -> "TraitsRequest":
        if self.stored_chat and not (isinstance(self.prompt, str) and self.experiment is not None):
            raise PydanticCustomError(
                "no_stored_chat",
                "Field '{param}' needs 'experiment' and a 'prompt' that is a text",
                {"param": "stored_chat"},
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> "TraitsRequest":
        for field, names in (("vectors", [one.name for one in self.vectors or []]), ("traits", self.traits or [])):
            twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
            if twice is not None:
                raise PydanticCustomError(
                    "same_name", "Field '{param}' names {name} twice", {"param": field, "name": repr(twice)}
                )
        return self


# -- replies ----------------------------------------------------------------------------------------------------------


class Prediction(Reply):
    token_id: int
    token: str
    probability: float | None


class LayerPredictions(Reply):
    layer: int
    hook_point: str
    position: int
    head: int | None = Field(description="The head whose part was read; null for a whole value.")
    pass_index: int = Field(description="Which pass, of a layer that runs several times.")
    predictions: list[Prediction]
    values: list[float | None] = Field(description="One per entry of `token_directions`.")


class LogitLensReply(Reply):
    model: str
    position: int | None = Field(description="null where several were asked for.")
    token: str | None
    positions: list[int]
    prompt_tokens: list[int]
    token_strings: list[str]
    layers: list[LayerPredictions] = Field(description="By layer, component, head and position.")


class ContributionReply(Reply):
    name: str
    layer: int | None
    head: int | None
    values: list[float | None] = Field(description="One per position.")


class AttributionReply(Reply):
    model: str
    positions: list[int]
    prompt_tokens: list[int]
    token_strings: list[str]
    tokens: list[int] = Field(description="The token, or the pair, as ids.")
    contributions: list[ContributionReply]
    logits: list[float | None] = Field(description="What they add up to, per position, before a soft cap.")
    deviation: float | None = Field(description="How far the sums are off at most.")
    cap: float | None = Field(description="The model's soft cap on logits.")
    notes: dict[str, str] = Field(description="By layer: why its heads are not told apart.")


class ChatSettings(Reply):
    """How the prompts were put to the model that a vector was made of."""

    use: bool | None = Field(description="As a user's message, through a chat template; null: if there is one.")
    system: str | None = Field(description="The system message before it.")
    template: str | None = Field(description="A chat template (Jinja) in the place of the model's own.")


class WatchedTrait(Reply):
    """A vector whose scores the reply has."""

    name: str
    layer: int
    hook_point: str = Field(description="Where it is scored: the stream after the layer.")
    method: str = Field(
        description="How it was made: `probe`, `mean_diff`, `ica` or `gradient`; `given` in the request."
    )
    norm: float = Field(description="|v|: steering by a moves h.v by a*|v|^2, and the score by a*|v|.")
    threshold: float | None = Field(description="The score h.v/|v| that parts with from without, if it is known.")
    chat: ChatSettings | None = Field(description="Of a stored vector; see `stored_chat`.")


class TokenScores(Reply):
    """The scores at one token: of the stream at that token's own position."""

    position: int = Field(description="Absolute, from 0.")
    token_id: int
    token: str
    phase: Literal["prompt", "response"]
    scores: dict[str, float | None] = Field(description="By trait; null for what is not finite.")


class Peak(Reply):
    """Where a score is farthest from 0."""

    index: int = Field(description="Which of the tokens, from 0.")
    score: float


class DynamicsReply(Reply):
    """How a score moves over the response's tokens, or over the prompt's where nothing was generated."""

    n: int = Field(description="How many tokens.")
    velocity: list[float] = Field(description="First differences: one less than tokens.")
    acceleration: list[float] = Field(description="Second differences: two less than tokens.")
    commitment_point: int | None = Field(description="The first token whose acceleration is below the threshold.")
    peak: Peak | None
    peak_velocity: float | None = Field(description="The largest change from one token to the next.")
    avg_velocity: float | None = Field(description="The mean size of these changes.")
    persistence: int = Field(description="Tokens right after the peak, of its sign and above half of it.")
    persistence_total: int = Field(description="All such tokens after the peak.")
    threshold: float = Field(description="In units of score, also where it was asked for as a share.")
    relative: bool
    stays_below: bool


class TraitsReply(Reply):
    model: str
    traits: list[WatchedTrait]
    scores: list[TokenScores] = Field(
        description="A row per token of the prompt and of the response, the last one included."
    )
    dynamics: dict[str, DynamicsReply | None] = Field(description="By trait; null where a score is not finite.")
    text: str = Field(description="What was generated.")
    finish_reason: FinishReason
    usage: Usage
    tokens: SpelledTokens
    interventions: list[InterventionReceipt] = Field([], description="One receipt per intervention, in order.")


class StoredVector(Reply):
    method: str
    layer: int


class StoredTrait(Reply):
    name: str
    display_name: str = Field(description="What it is called in titles.")
    vectors: list[StoredVector] = Field(description="By method in the order in which one is looked for, then by layer.")


class StoredExperiment(Reply):
    name: str
    traits: list[StoredTrait]


class StoredTraitsReply(Reply):
    experiments: list[StoredExperiment]


class TraitsEvent(Reply):
    """The first event has the prompt's scores, each further one a generated token's; the last one has the accounts."""

    model: str | None = None
    traits: list[WatchedTrait] | None = None
    scores: list[TokenScores] = Field([], description="Of this event's tokens.")
    text: str = Field("", description="Text that became certain with them.")
    dynamics: dict[str, DynamicsReply | None] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    tokens: SpelledTokens | None = None
    interventions: list[InterventionReceipt] | None = None
