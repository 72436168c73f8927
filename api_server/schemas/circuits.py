"""What ``/v1/analysis`` takes and gives where a model is run on clean and corrupted prompts: causal analyses."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from .fields import MAX_ID_LENGTH, MAX_TOKEN_ID, Name, OrNull, Prompt, Request, must
from .replies import Reply
from .requests import MODEL

MAX_EXAMPLES = 256
"""Prompts that one request brings."""
MAX_BATCH = 64
MAX_GROUPS = 4096
MAX_GROUP = 256
"""Components of one group."""
MAX_RUNS = 100_000
"""Runs of one prompt that a sweep may take, of all its cells together."""
MAX_CELLS = 20_000
MAX_EDGES = 100_000
"""That a reply lists."""
MAX_STEPS = 64
MAX_RESAMPLES = 10_000
MAX_SEED = 2**32 - 1

AblationName = Literal["zero", "mean", "resample"]
METRIC = (
    "What is measured: `logit_difference` (of `answer` and `wrong`), `logit` (of `answer`), `probability`, "
    "`log_probability`, `loss`, `kl` (from the clean run); by default `logit_difference` where there are wrong "
    "answers, else `log_probability`."
)
MetricName = Literal["logit_difference", "logit", "probability", "log_probability", "loss", "kl"]
MeanOver = Literal["all", "position"]
MEAN_OVER = "The mean is over `all` positions, or one for each `position`."
PARTS = "Kinds of components: `heads`, `attn_out`, `mlp_out`, `mixer_out`, `side_out`, `blocks`."
EdgeAblation = Literal["corrupted", "resample", "mean", "zero"]
EDGE_ABLATION = (
    "What an ablated edge carries: what its source writes on the `corrupted` prompt, on another prompt (`resample`), "
    "its `mean`, or `zero`; by default `corrupted` where there are such prompts, else `mean`."
)
Direction = Literal["denoising", "noising"]
SweepName = Literal["layer x position", "layer x head", "layer x head x position", "component"]
CircuitFormat = Literal["neuroscope-circuit", "neuronpedia", "graphml"]
Place = Annotated[int, Field(ge=-MAX_TOKEN_ID, le=MAX_TOKEN_ID)]
Places = Annotated[list[Place], Field(min_length=1, max_length=10_000)]


def as_list(value: Any) -> Any:
    """One place is a list of it."""
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


Part = Literal["attn_out", "mlp_out", "mixer_out", "side_out", "heads", "blocks"]


def _is_token(value: Any) -> bool:
    if type(value) is int:
        return 0 <= value <= MAX_TOKEN_ID
    return isinstance(value, str) and bool(value)


_TOKEN = "a token: an id, or a text that is one token"
AnswerToken = Annotated[
    Any,
    BeforeValidator(must(_is_token, _TOKEN)),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
                {"type": "string", "minLength": 1},
            ],
            "description": _TOKEN,
        }
    ),
]


class EvalPrompt(Request):
    """A prompt, and what should follow it: ``{"clean": ..., "corrupted": ..., "answer": "Paris", "wrong": "Rome"}``."""

    clean: Prompt = Field(description="A text, or token ids: the prompt that has the answer.")
    corrupted: Prompt | None = Field(None, description="As many tokens that ask for something else.")
    answer: AnswerToken = Field(description="The token that should follow, an id or a text.")
    wrong: Annotated[AnswerToken, OrNull()] = Field(
        None, description="The token that the answer is compared with, an id or a text."
    )


class EvalRequest(Request):
    """What is run on prompts with answers; all have the same fields."""

    eval_data: Annotated[list[EvalPrompt], Field(min_length=1, max_length=MAX_EXAMPLES)] = Field(
        description="The prompts. Where one has `corrupted` or `wrong`, all have it."
    )
    batch_size: Annotated[int, OrNull()] = Field(
        8, ge=1, le=MAX_BATCH, description="Prompts of one length that run together, fewer of long ones."
    )
    model: Name | None = Field(None, description=MODEL)
    background: Annotated[bool, OrNull()] = Field(
        False, description="Answer 202 and the job at once; its `result` is the reply in the end."
    )


Groups = Annotated[
    list[Annotated[list[Name], Field(min_length=1, max_length=MAX_GROUP)]],
    Field(min_length=1, max_length=MAX_GROUPS),
]


class AblationRequest(EvalRequest):
    """``POST /v1/analysis/ablation``: components one by one, with intervals, or ``groups``, each together."""

    ablations: Annotated[list[AblationName], Field(min_length=1, max_length=3)] | None = Field(
        None,
        description="What is put in: `zero`s, the `mean` over the data, or, to `resample`, what another prompt gives, "
        "the `corrupted` partner where there is one. By default all three, of groups `zero`.",
    )
    components: Annotated[list[Part], Field(min_length=1, max_length=6)] | None = Field(
        None, description=f"{PARTS} By default attention, mixers and MLPs."
    )
    groups: Groups | None = Field(
        None,
        description="Names of components (`L2H1`, `L0 attn`, `L0 mlp`) that are ablated together; each group is run.",
    )
    metric: MetricName | None = Field(None, description=f"Of `groups`. {METRIC}")
    mean_over: Annotated[MeanOver, OrNull()] = Field("all", description=MEAN_OVER)
    confidence: Annotated[float, OrNull()] = Field(0.95, gt=0, lt=1, description="Of the bootstrap intervals.")
    resamples: Annotated[int, OrNull()] = Field(2000, ge=100, le=MAX_RESAMPLES, description="Of the bootstrap.")
    seed: Annotated[int, OrNull()] = Field(0, ge=0, le=MAX_SEED, description="Of resampling and of the bootstrap.")

    @model_validator(mode="after")
    def _one_kind(self) -> "AblationRequest":
        for name, given in (("ablations", self.ablations or []), ("components", self.components or [])):
            if len(set(given)) < len(given):
                raise PydanticCustomError("twice", "Field '{param}' has each name once", {"param": name})
        if self.groups is None:
            _refuse(self, "metric", "is of 'groups': leave it out, loss, divergence and logit difference are told")
        else:
            _refuse(self, "components", "is left out where 'groups' names components")
        return self

    @property
    def chosen(self) -> list[AblationName]:
        """The ablations to make."""
        return self.ablations or (["zero", "mean", "resample"] if self.groups is None else ["zero"])


def _refuse(asked: Request, name: str, why: str) -> None:
    if getattr(asked, name) is not None:
        raise PydanticCustomError("not_taken", "Field '{param}' {why}", {"param": name, "why": why})


class CellRequest(Request):
    """A place that is patched: ``{"hook_point": "blocks.2.attn.hook_z", "heads": [1], "positions": [3]}``."""

    hook_point: Name = Field(
        description="A name, or a pattern such as `blocks.2.*`; what it selects is patched at once."
    )
    positions: Annotated[Places, BeforeValidator(as_list)] | None = Field(
        None, description="An index or a list; negative ones count from the end. All by default."
    )
    heads: Annotated[Places, BeforeValidator(as_list)] | None = Field(None, description="An index or a list.")

    def plain(self) -> dict[str, Any]:
        """As the engine takes it."""
        return self.model_dump(exclude_none=True)


class PatchingRequest(EvalRequest):
    """``POST /v1/analysis/patching``: a ``sweep``, ``cells``, or ``groups``."""

    sweep: SweepName | None = Field(None, description="Which places; by default `layer x position`.")
    cells: Annotated[list[CellRequest], Field(min_length=1, max_length=MAX_CELLS)] | None = Field(
        None, description="Places of one's own, one after the other, in the place of a sweep."
    )
    groups: Groups | None = Field(
        None,
        description="Names of components (`L2H1`, `L0 mlp`, `L2 resid`) that are patched together, at all positions.",
    )
    component: Name | None = Field(
        None,
        description="What a sweep over layers patches: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out` "
        "and so on; with heads `z`, `q`, `k`, `v`, `pattern`. By default `resid_pre`, with heads `z`.",
    )
    components: Annotated[list[Part], Field(min_length=1, max_length=6)] | None = Field(
        None, description=f"Of the sweep `component`. {PARTS}"
    )
    direction: Annotated[Direction, OrNull()] = Field(
        "denoising",
        description="`denoising` puts the clean run's activations into the corrupted one, `noising` the other way.",
    )
    align: Literal["start", "end"] | None = Field(
        None, description="Where positions are counted from if prompts differ in length."
    )
    method: Annotated[Literal["exact", "attribution"], OrNull()] = Field(
        "exact", description="`attribution` estimates all places at once from a gradient, to first order."
    )
    metric: MetricName | None = Field(None, description=METRIC)

    @model_validator(mode="after")
    def _one_kind(self) -> "PatchingRequest":
        if self.groups is not None and self.method == "attribution":
            _refuse(self, "groups", "is patched exactly: leave 'method' out")
        given = [name for name in ("sweep", "cells", "groups") if getattr(self, name) is not None]
        if len(given) > 1:
            _refuse(self, given[1], f"is left out where '{given[0]}' says what is patched")
        for name in ("component", "components", "align"):
            if self.cells is not None or self.groups is not None:
                _refuse(self, name, "is of a sweep")
        if self.sweep == "component":
            _refuse(self, "component", "is of sweeps over layers; this one takes 'components'")
        else:
            _refuse(self, "components", "is of the sweep 'component'; one over layers has a 'component'")
        return self


def _is_receiver(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return 0 < len(names) <= MAX_GROUP and all(isinstance(one, str) and 0 < len(one) <= MAX_ID_LENGTH for one in names)


_RECEIVER = f"an input's or a node's name, or a list of 1 to {MAX_GROUP} of them"
_NAME: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}
Receiver = Annotated[
    Any,
    BeforeValidator(must(_is_receiver, _RECEIVER)),
    WithJsonSchema(
        {
            "anyOf": [_NAME, {"type": "array", "items": _NAME, "minItems": 1, "maxItems": MAX_GROUP}],
            "description": _RECEIVER,
        }
    ),
]


class PathPatchingRequest(EvalRequest):
    """``POST /v1/analysis/path_patching``: from each sender to each receiver, the rest as it is."""

    receivers: Annotated[list[Receiver], Field(min_length=1, max_length=MAX_GROUPS)] = Field(
        description="What reads: inputs (`L3H0<q>`, `L1KV0<k>`, `L1 mlp`, `logits`), or a node for all that it reads; "
        "of a list in the list all read together."
    )
    senders: Annotated[list[Name], Field(min_length=1, max_length=MAX_GROUPS)] | None = Field(
        None, description="What writes: `embed`, `L0H1`, `L0 mlp`; all that are before some receiver by default."
    )
    direction: Annotated[Direction, OrNull()] = Field(
        "noising", description="`noising`: what is lost when the corrupted run's part is read; `denoising`: regained."
    )
    metric: MetricName | None = Field(None, description=METRIC)


class EdgeRunsRequest(EvalRequest):
    """What runs with edges replaced have in common."""

    steps: Annotated[int, OrNull()] = Field(5, ge=1, le=MAX_STEPS, description="Points on the way of `eap-ig`.")
    rule: Annotated[Literal["gauss", "left", "right"], OrNull()] = Field("gauss", description="Which points.")
    ablation: EdgeAblation | None = Field(None, description=EDGE_ABLATION)
    metric: MetricName | None = Field(None, description=METRIC)
    mean_over: Annotated[MeanOver, OrNull()] = Field("position", description=MEAN_OVER)
    seed: Annotated[int, OrNull()] = Field(0, ge=0, le=MAX_SEED, description="Of resampling, and of what is drawn.")

    @model_validator(mode="after")
    def _has_a_gradient(self) -> "EdgeRunsRequest":
        if self.metric == "kl" and getattr(self, "method", None) == "eap":
            why = "is at its smallest in the run as it is, where its gradient is 0: take 'eap-ig' or 'exact'"
            _refuse(self, "metric", why)
        return self


class EdgesRequest(EdgeRunsRequest):
    """``POST /v1/analysis/edges``: scores for all edges of the model's graph."""

    method: Annotated[Literal["eap", "eap-ig", "exact"], OrNull()] = Field(
        "eap-ig",
        description="`eap` (one gradient), `eap-ig` (gradients along a way, integrated) or `exact` (a run per edge).",
    )
    top: Annotated[int, OrNull()] = Field(1000, ge=1, le=MAX_EDGES, description="How many edges the reply lists.")


class CircuitRequest(EdgeRunsRequest):
    """``POST /v1/analysis/circuit``: find a circuit, prune it, and judge it."""

    method: Annotated[Literal["eap", "eap-ig", "exact", "acdc"], OrNull()] = Field(
        "eap-ig",
        description="Scores by which the strongest edges are taken, or `acdc`: edge after edge is left out, exactly.",
    )
    size: int | None = Field(None, ge=1, le=MAX_EDGES, description="Take so many of the strongest edges.")
    threshold: float | None = Field(
        None, gt=0, description="Take the edges that score as much or more, either sign; of `acdc` what it goes by."
    )
    faithfulness: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Take the fewest of the strongest that reach it; 0.9 by default, save for `acdc`.",
    )
    judge_by: Annotated[list[EvalPrompt], Field(min_length=1, max_length=MAX_EXAMPLES)] | None = Field(
        None, description="Other prompts, by which the circuit is judged: those it was found with flatter it."
    )
    random_circuits: Annotated[int, OrNull()] = Field(
        10, ge=0, le=100, description="As many of its size are drawn to compare."
    )
    name: Annotated[Name, OrNull()] = Field("circuit", description="What it is to be called.")
    formats: Annotated[list[CircuitFormat], Field(max_length=3), OrNull()] = Field(
        ["neuroscope-circuit"],
        description="What else it is written as: `neuroscope-circuit` for Pharo, `neuronpedia` for the viewer of "
        "attribution graphs (on the first prompt), `graphml`.",
    )

    @model_validator(mode="after")
    def _one_limit(self) -> "CircuitRequest":
        if self.method == "acdc":
            for name in ("size", "faithfulness"):
                _refuse(self, name, "is not taken by acdc, which goes by 'threshold'")
            if self.threshold is None:
                raise PydanticCustomError(
                    "no_threshold", "Field '{param}' is required for acdc", {"param": "threshold"}
                )
        given = [name for name in ("size", "threshold", "faithfulness") if getattr(self, name) is not None]
        if len(given) > 1:
            _refuse(self, given[1], f"is left out where '{given[0]}' says how much is taken")
        if len(set(self.formats)) < len(self.formats):
            raise PydanticCustomError("twice", "Field '{param}' has each name once", {"param": "formats"})
        return self


# -- replies ----------------------------------------------------------------------------------------------------------


class MeanReply(Reply):
    """A mean over examples, with the ends of its confidence interval; null for few examples."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


class EvalDataReply(Reply):
    kind: Literal["texts", "answers"]
    examples: int
    targets: int
    corrupted: bool
    wrong_answers: bool
    cut: int


class ChangesReply(Reply):
    loss_change: MeanReply = Field(description="Ablated less plain, in nats.")
    kl: MeanReply = Field(description="KL(plain || ablated) in nats.")
    logit_difference_change: MeanReply | None = Field(description="null without wrong answers.")


class AblatedComponent(Reply):
    component: str
    layer: int
    part: Part
    head: int | None
    ablations: dict[str, ChangesReply]


class ReplacedGroup(Reply):
    components: list[str]
    values: list[float] = Field(description="The metric of each example, with the group replaced.")
    mean: float


class GroupEffects(Reply):
    """What replacing groups of components does."""

    metric: str
    ablation: str = Field(description="What was put in, and in which run, in words.")
    plain: list[float] = Field(description="The metric of each example, with nothing replaced.")
    other: list[float] | None = Field(description="That of the other prompts: of the corrupted ones in ablation.")
    groups: list[ReplacedGroup] = Field(description="In the order of the request.")


class AblationReply(Reply):
    model: str
    eval_data: EvalDataReply
    ablations: dict[str, str] = Field(description="What was put in, in words.")
    plain: dict[str, MeanReply] | None = Field(None, description="The measures without ablation.")
    components: list[AblatedComponent] | None = Field(None, description="Layer by layer; null where groups were asked.")
    groups: dict[str, GroupEffects] | None = Field(None, description="By ablation, where `groups` were asked.")
    confidence: float | None = None
    notes: list[str] = []


class PatchingReply(Reply):
    """What each place, or path, recovers, or damages; of ``groups`` the metric with each replaced."""

    model: str
    eval_data: EvalDataReply
    direction: Literal["denoising", "noising"]
    metric: str
    sweep: str | None = Field(None, description="`cells` where they were given, `path` of path patching.")
    estimate: bool | None = Field(
        None, description="Whether the numbers are first-order estimates (`attribution`), not exact runs."
    )
    component: str | None = None
    metric_description: str | None = None
    axes: dict[str, list[str]] | None = Field(None, description="What the numbers run over, with labels, in order.")
    levels: dict[str, float] | None = Field(None, description="The metric of the clean and the corrupted prompts.")
    patched: list[Any] | None = Field(
        None, description="The metric with each place patched, nested as the axes are; null where there is none."
    )
    effect: Literal["recovery", "damage"] | None = None
    effects: list[Any] | None = Field(None, description="Recovery or damage: 1 is all of it, 0 nothing.")
    groups: GroupEffects | None = Field(None, description="Where `groups` were asked.")


class EdgeScore(Reply):
    edge: str = Field(description="`L0H1->L2H3<q>`: what writes, and what reads it.")
    score: float = Field(description="The change of the metric when the edge alone is ablated, estimated or exact.")


class EdgesReply(Reply):
    model: str
    eval_data: EvalDataReply
    method: str
    metric: str
    ablation: str
    replaced_by: str = Field(description="What an ablated edge carries, in words.")
    settings: dict[str, Any]
    seconds: float
    n_edges: int = Field(description="How many the model has.")
    edges: list[EdgeScore] = Field(description="The strongest, by the size of their scores, the strongest first.")


class CircuitReply(Reply):
    model: str
    eval_data: EvalDataReply
    circuit: dict[str, Any] = Field(
        description="As `mlx_hooks` saves and loads it: edges with scores, inputs, metadata."
    )
    nodes: list[str]
    edges_of_model: int
    validation: dict[str, Any] = Field(
        description="Faithfulness, completeness, and random circuits of the same size, with intervals over prompts."
    )
    neuroscope_circuit: dict[str, Any] | None = Field(None, description="As Pharo's `Circuit` reads it.")
    neuronpedia: dict[str, Any] | None = Field(None, description="An attribution graph, on the first prompt.")
    graphml: str | None = Field(None, description="The text of a GraphML file.")
