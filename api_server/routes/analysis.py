"""Analyses that the worker computes on a prompt."""

from flask import Blueprint, Response

from .. import inference
from ..description import described
from ..errors import json_reply
from ..schemas.replies import LogitLensReply
from ..schemas.requests import LogitLensRequest
from ..transport import call, read, worker

blueprint = Blueprint("analysis", __name__, url_prefix="/v1/analysis")


@blueprint.post("/logit_lens")
@described(
    LogitLensRequest,
    replies=LogitLensReply,
    tags=["Analysis"],
    errors=(404,),
    job=True,
    example={"prompt": "The capital of France is", "top_k": 3},
)
def logit_lens() -> Response:
    """What the model would predict after each layer at one position of a prompt."""
    asked = read(LogitLensRequest)
    loaded = worker().get(asked.model)
    found = call(
        lambda: inference.logit_lens(loaded.model, asked.source, asked.position, asked.top_k), "logit_lens", loaded
    )
    return json_reply({"model": loaded.model_id} | found)
