"""Analyses that the worker computes on a prompt."""

from functools import partial

from flask import Blueprint, Response

from .. import inference
from ..description import described
from ..errors import json_reply
from ..schemas.replies import AttributionReply, LogitLensReply
from ..schemas.requests import AttributionRequest, LogitLensRequest
from ..transport import call, read, reader_gone, submit, worker

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
    """What the model would predict after each layer, at one position of a prompt or at several."""
    asked = read(LogitLensRequest)
    loaded = worker().get(asked.model)
    job = submit(partial(inference.logit_lens, loaded.model, asked), "logit_lens", loaded, brief=asked.is_brief)
    return json_reply({"model": loaded.model_id} | job.result(reader_gone()))


@blueprint.post("/direct_logit_attribution")
@described(
    AttributionRequest,
    replies=AttributionReply,
    tags=["Analysis"],
    errors=(404,),
    job=True,
    example={"prompt": "The capital of France is", "token_directions": [["Paris", "Rome"]]},
)
def direct_logit_attribution() -> Response:
    """What embedding, heads, MLPs and biases add to the logit of a token, or to the difference of two."""
    asked = read(AttributionRequest)
    loaded = worker().get(asked.model)
    work = partial(inference.direct_logit_attribution, loaded.model, asked)
    return json_reply({"model": loaded.model_id} | call(work, "direct_logit_attribution", loaded))
