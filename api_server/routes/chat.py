"""Chat completions, plain and with activations."""

from flask import Blueprint, Response

from ..description import described
from ..schemas.replies import ChatCaptureEvent, ChatCaptureReply, ChatEvent, ChatReply
from ..schemas.requests import ChatCaptureRequest, ChatRequest
from ..transport import read
from .generation import answer

blueprint = Blueprint("chat", __name__, url_prefix="/v1/chat/completions")


@blueprint.post("")
@described(ChatRequest, replies=ChatReply, event=ChatEvent, tags=["Generation"], errors=(404, 409, 503))
def chat() -> Response:
    """Answer a chat, in OpenAI's format."""
    asked = read(ChatRequest)
    return answer(asked, asked.messages)


@blueprint.post("/with_activations")
@described(
    ChatCaptureRequest,
    replies=ChatCaptureReply,
    event=ChatCaptureEvent,
    tags=["Generation"],
    errors=(404, 409, 413, 503, 507),
)
def chat_with_activations() -> Response:
    """Answer a chat, and bring back what the hooks captured."""
    asked = read(ChatCaptureRequest)
    return answer(asked, asked.messages)
