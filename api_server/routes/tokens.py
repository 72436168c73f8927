"""Text to token ids and back, with the loaded model's tokenizer."""

from flask import Blueprint, Response

from .. import inference
from ..errors import json_reply
from ..schemas.requests import DetokenizeRequest, TokenizeRequest
from ..transport import call, read, worker

blueprint = Blueprint("tokens", __name__, url_prefix="/v1")


@blueprint.post("/tokenize")
def tokenize() -> Response:
    asked = read(TokenizeRequest)
    loaded = worker().get(asked.model)
    return json_reply(call(lambda: inference.tokenize(loaded.model, asked.source), "tokenize", loaded))


@blueprint.post("/detokenize")
def detokenize() -> Response:
    asked = read(DetokenizeRequest)
    loaded = worker().get(asked.model)
    return json_reply({"text": call(lambda: inference.text_of(loaded.model, asked.tokens), "detokenize", loaded)})
