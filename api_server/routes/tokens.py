"""Text to token ids and back, with the loaded model's tokenizer."""

from flask import Blueprint, Response

from .. import inference
from ..description import described
from ..errors import json_reply
from ..schemas.replies import DetokenizeReply, TokenizeReply
from ..schemas.requests import DetokenizeRequest, TokenizeRequest
from ..transport import call, read, worker

blueprint = Blueprint("tokens", __name__, url_prefix="/v1")


@blueprint.post("/tokenize")
@described(
    TokenizeRequest,
    replies=TokenizeReply,
    tags=["Tokens"],
    errors=(404,),
    job=True,
    example={"text": "The capital of France is"},
)
def tokenize() -> Response:
    """The tokens of a text, or of a chat as the model's template writes it."""
    asked = read(TokenizeRequest)
    loaded = worker().get(asked.model)
    return json_reply(call(lambda: inference.tokenize(loaded.model, asked.source), "tokenize", loaded))


@blueprint.post("/detokenize")
@described(
    DetokenizeRequest,
    replies=DetokenizeReply,
    tags=["Tokens"],
    errors=(404,),
    job=True,
    example={"tokens": [5, 17, 33]},
)
def detokenize() -> Response:
    """The text that token ids spell together."""
    asked = read(DetokenizeRequest)
    loaded = worker().get(asked.model)
    return json_reply({"text": call(lambda: inference.text_of(loaded.model, asked.tokens), "detokenize", loaded)})
