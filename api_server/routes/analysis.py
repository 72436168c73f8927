"""Analyses that the worker computes on a prompt."""

from flask import Blueprint, Response

from .. import inference
from ..errors import json_reply
from ..schemas.requests import LogitLensRequest
from ..transport import call, read, worker

blueprint = Blueprint("analysis", __name__, url_prefix="/v1/analysis")


@blueprint.post("/logit_lens")
def logit_lens() -> Response:
    asked = read(LogitLensRequest)
    loaded = worker().get(asked.model)
    found = call(
        lambda: inference.logit_lens(loaded.model, asked.source, asked.position, asked.top_k), "logit_lens", loaded
    )
    return json_reply({"model": loaded.model_id} | found)
