"""Text to token ids and back, with the loaded model's tokenizer."""

from flask import Blueprint, Response

from .. import inference
from ..errors import json_reply
from ..schemas.requests import DetokenizeRequest, TokenizeRequest
from ..transport import read, reader_gone, worker

blueprint = Blueprint("tokens", __name__, url_prefix="/v1")


@blueprint.post("/tokenize")
def tokenize() -> Response:
    asked = read(TokenizeRequest)
    model = worker().get(asked.model).model
    return json_reply(worker().call(lambda: inference.tokenize(model, asked.source), reader_gone()))


@blueprint.post("/detokenize")
def detokenize() -> Response:
    asked = read(DetokenizeRequest)
    model = worker().get(asked.model).model
    return json_reply({"text": worker().call(lambda: inference.text_of(model, asked.tokens), reader_gone())})
