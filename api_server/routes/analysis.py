"""Analyses that the worker computes on a prompt."""

from functools import partial

from flask import Blueprint, Response

from neuroscope_bridge import payload

from .. import inference
from ..description import described
from ..downloads import large_json
from ..errors import json_reply
from ..schemas.analysis import (
    AttributionReply,
    AttributionRequest,
    LogitLensReply,
    LogitLensRequest,
    StoredTraitsReply,
    TraitsEvent,
    TraitsReply,
    TraitsRequest,
)
from ..schemas.queries import ExperimentQuery
from ..stored_traits import StoredTraits
from ..trait_vectors import vectors_of
from ..traits import WatchReply, watch
from ..transport import call, config, event_stream, read, read_query, reader_gone, submit, worker
from .generation import edits_of

blueprint = Blueprint("analysis", __name__, url_prefix="/v1/analysis")

_FIRST_NUMBER = {"name": "first number", "layer": 1, "vector": payload.encode_vector([1.0] + [0.0] * 127)}
"""Of the bundled model's stream, which is 128 wide: of an example."""


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


@blueprint.get("/traits")
@described(query=ExperimentQuery, replies=StoredTraitsReply, tags=["Analysis"], errors=(404,))
def stored_traits() -> Response:
    """The stored traits that requests may watch, by experiment, and which vectors each has."""
    asked = read_query(ExperimentQuery)
    return json_reply({"experiments": StoredTraits(config().experiments).listing(asked.experiment)})


@blueprint.post("/traits")
@described(
    TraitsRequest,
    replies=TraitsReply,
    event=TraitsEvent,
    tags=["Analysis"],
    errors=(404,),
    job=True,
    example={"prompt": "The capital of France is", "max_tokens": 2, "temperature": 0, "vectors": [_FIRST_NUMBER]},
)
def traits() -> Response:
    """How much of each trait the model shows, at each token of a prompt and of what it goes on to write."""
    asked = read(TraitsRequest)
    loaded = worker().get(asked.model)
    vectors = vectors_of(asked, loaded.model, config().experiments)
    edits = loaded.model.resolve_interventions(edits_of(asked.interventions))
    job = submit(partial(watch, loaded, asked, vectors, edits), "traits", loaded, asked.user)
    reply, results = WatchReply(loaded.model_id, vectors, asked), job.results(reader_gone())
    if asked.stream:
        return event_stream(reply.events(results), job)
    return large_json(reply.whole(results))
