"""Attention heads: what they attend to, which rules they follow, what their weights could read."""

from flask import Blueprint, Response

from .. import heads as analyses
from ..description import described
from ..schemas.heads import (
    AttentionReply,
    AttentionRequest,
    CompositionReply,
    CompositionRequest,
    HeadsReply,
    HeadsRequest,
)
from ..schemas.replies import JobReply
from ..transport import answer_of_model, read

blueprint = Blueprint("heads", __name__, url_prefix="/v1/analysis")


@blueprint.post("/attention")
@described(
    AttentionRequest,
    replies={200: AttentionReply, 202: JobReply},
    tags=["Analysis"],
    errors=(404,),
    job=True,
    example={"prompt": "When Mary and John went to the store , John gave a drink to", "layers": [1, 2]},
)
def attention() -> Response:
    """What each head attends to in a prompt: its class, by which numbers, and what flows from token to token."""
    return answer_of_model(read(AttentionRequest), "attention", analyses.attention)


@blueprint.post("/heads")
@described(
    HeadsRequest,
    replies={200: HeadsReply, 202: JobReply},
    tags=["Analysis"],
    errors=(404,),
    job=True,
    example={"sequences": 4, "length": 10},
)
def heads() -> Response:
    """Which heads attend to the previous token, look for what followed before, and so on, over many sequences."""
    return answer_of_model(read(HeadsRequest), "heads", analyses.heads)


@blueprint.post("/composition")
@described(
    CompositionRequest,
    replies={200: CompositionReply, 202: JobReply},
    tags=["Analysis"],
    errors=(404,),
    job=True,
    example={"top": 5},
)
def composition() -> Response:
    """Which heads could read, with queries, keys or values, what earlier heads write: from the weights alone."""
    return answer_of_model(read(CompositionRequest), "composition", analyses.composition)
