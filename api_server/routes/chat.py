"""Chat completions, plain and with activations."""

from flask import Blueprint, Response

from ..schemas.requests import ChatCaptureRequest, ChatRequest
from ..transport import read
from .generation import answer

blueprint = Blueprint("chat", __name__, url_prefix="/v1/chat/completions")


@blueprint.post("")
def chat() -> Response:
    asked = read(ChatRequest)
    return answer(asked, asked.messages)


@blueprint.post("/with_activations")
def chat_with_activations() -> Response:
    asked = read(ChatCaptureRequest)
    return answer(asked, asked.messages)
