"""What analyses of attention heads take and give: one prompt's patterns, rules that heads follow, and their weights."""

from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from .analysis import PromptRequest
from .circuits import MAX_BATCH, MAX_EXAMPLES, MAX_RESAMPLES, MAX_SEED
from .fields import MAX_LAYERS, Name, OrNull, Prompt, Request
from .replies import Reply
from .requests import MODEL

MAX_ATTENTION_TOKENS = 1024
"""Of a prompt whose patterns are analysed: they grow with the square."""
MAX_SEQUENCES = 256
MAX_LENGTH = 512
MAX_SCORES_LISTED = 10_000

BACKGROUND = "Answer 202 and the job at once; its `result` is the reply in the end."
Layer = Annotated[int, Field(ge=-MAX_LAYERS, le=MAX_LAYERS)]
Layers = Annotated[list[Layer], Field(min_length=1, max_length=MAX_LAYERS)]
LAYERS = "Which layers, all by default; negative numbers count from the last."


def _each_once(asked: Any) -> None:
    if asked.layers is not None and len(set(asked.layers)) < len(asked.layers):
        raise PydanticCustomError("twice", "Field '{param}' has each layer once", {"param": "layers"})


class AttentionRequest(PromptRequest):
    """``POST /v1/analysis/attention``: one of ``prompt`` and ``messages``."""

    layers: Layers | None = Field(None, description=LAYERS)
    threshold: Annotated[float, OrNull()] = Field(
        0.5, gt=0, le=1, description="The share of a head's attention that makes it one of a class."
    )
    broad: Annotated[float, OrNull()] = Field(
        0.9, gt=0, le=1, description="The entropy, as a share of the largest possible, from which on a head is broad."
    )
    local: Annotated[int, OrNull()] = Field(4, ge=1, le=MAX_LENGTH, description="So many positions before are near.")
    top_k: Annotated[int, OrNull()] = Field(5, ge=0, le=100, description="Edges that are told of each head.")
    dependencies: Annotated[int, OrNull()] = Field(
        20, ge=0, le=200, description="Pairs of layers that are told, by composition of weights."
    )
    background: Annotated[bool, OrNull()] = Field(False, description=BACKGROUND)

    @model_validator(mode="after")
    def _layers_once(self) -> "AttentionRequest":
        _each_once(self)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """As the engine takes them."""
        own = self.model_dump(include={"threshold", "broad", "local", "top_k", "dependencies"})
        return own | {"max_tokens": MAX_ATTENTION_TOKENS}


class HeadsRequest(Request):
    """``POST /v1/analysis/heads``: on random tokens that are said twice, or on ``prompts``."""

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_EXAMPLES)] | None = Field(
        None, description="Texts, or rows of token ids, in the place of random tokens."
    )
    layers: Layers | None = Field(None, description=LAYERS)
    sequences: Annotated[int, OrNull()] = Field(16, ge=1, le=MAX_SEQUENCES, description="Random ones that are made.")
    length: Annotated[int, OrNull()] = Field(
        25, ge=2, le=MAX_LENGTH, description="Different tokens of each; fewer if the model reads less."
    )
    copying: Annotated[bool, OrNull()] = Field(True, description="Tell from the weights which heads copy, too.")
    batch_size: Annotated[int, OrNull()] = Field(8, ge=1, le=MAX_BATCH, description="Sequences that run at once.")
    confidence: Annotated[float, OrNull()] = Field(0.95, gt=0, lt=1, description="Of the intervals.")
    resamples: Annotated[int, OrNull()] = Field(2000, ge=100, le=MAX_RESAMPLES, description="Of the bootstrap.")
    seed: Annotated[int, OrNull()] = Field(0, ge=0, le=MAX_SEED, description="Of the tokens and the intervals.")
    model: Name | None = Field(None, description=MODEL)
    background: Annotated[bool, OrNull()] = Field(False, description=BACKGROUND)

    @model_validator(mode="after")
    def _layers_once(self) -> "HeadsRequest":
        _each_once(self)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """As the engine takes them."""
        return self.model_dump(exclude={"prompts", "model", "background"})


class CompositionRequest(Request):
    """``POST /v1/analysis/composition``: from the weights alone."""

    layers: Layers | None = Field(None, description=LAYERS)
    top: Annotated[int, OrNull()] = Field(
        50, ge=1, le=MAX_SCORES_LISTED, description="How many scores the reply lists, the highest first."
    )
    model: Name | None = Field(None, description=MODEL)
    background: Annotated[bool, OrNull()] = Field(False, description=BACKGROUND)

    @model_validator(mode="after")
    def _layers_once(self) -> "CompositionRequest":
        _each_once(self)
        return self


# -- replies ----------------------------------------------------------------------------------------------------------


class PatternClassReply(Reply):
    pattern_type: str
    description: str
    head_count: int
    heads: list[str]
    strength: float | None = Field(description="Mean confidence of these heads.")


class HeadAttentionReply(Reply):
    name: str
    layer: int
    head: int
    pattern_type: str
    confidence: float | None = Field(description="The number that chose the class; no probability.")
    also: list[str] = Field(description="Further rules that it follows.")
    scores: dict[str, float | None] = Field(description="By rule; null where no query of the prompt can follow it.")
    entropy: float | None
    local: float | None
    sink: float | None
    key_tokens: list[dict[str, Any]] = Field(description="The tokens that get most attention.")
    edges: list[dict[str, Any]] = Field(description="What flows most from token to token.")


class LeftOutLayer(Reply):
    layer: int
    reason: str


class AttentionReply(Reply):
    model: str
    tokens: list[str]
    token_ids: list[int]
    analyzed_layers: list[int]
    attention_heads: list[HeadAttentionReply]
    attention_patterns: list[PatternClassReply]
    cross_layer_dependencies: list[dict[str, Any]] = Field(description="From weights: which layers may read which.")
    token_flow: list[dict[str, Any]] = Field(description="By layer, what each token gives, keeps and receives.")
    rollout: dict[str, Any] = Field(description="Whose embeddings reach the last position, by attention alone.")
    pattern_statistics: dict[str, int]
    how_computed: dict[str, Any] = Field(description="What each number is, in words, with the limits used.")
    left_out: list[LeftOutLayer]
    not_told: dict[str, str] = Field(description="Why a number is null.")
    notes: list[str] = Field(description="What is else to be known of the numbers: queries that see later keys.")


class ScoredHead(Reply):
    name: str
    layer: int
    head: int
    scores: dict[str, dict[str, float | int | None]] = Field(description="By rule, the mean with its interval.")


class HeadsReply(Reply):
    model: str
    tokens_from: str
    sequences: int
    length: int | None = Field(description="Different random tokens of each; null of `prompts`.")
    how_computed: dict[str, str]
    chance: dict[str, float] = Field(description="By rule, the score of a head that attends to all keys alike.")
    heads: list[ScoredHead]
    not_told: dict[str, str]
    warnings: list[str] = Field(description="Of the intervals, and where `length` is less than was asked.")


class CompositionScoreReply(Reply):
    edge: str = Field(description="`L0H1->L1H0<k>`")
    source: list[int] = Field(description="Layer and head.")
    target: list[int]
    kind: str = Field(description="`q`, `k` or `v`.")
    score: float
    baseline: float
    above_baseline: float


class CompositionReply(Reply):
    model: str
    how_computed: str
    baseline: float
    scored: int
    strongest: list[CompositionScoreReply]
    not_told: dict[str, str]
