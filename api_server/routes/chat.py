"""Chat completions, plain and with activations."""

from flask import Blueprint, Response

from ..description import described
from ..schemas.replies import ChatCaptureEvent, ChatCaptureReply, ChatEvent, ChatReply
from ..schemas.requests import ChatCaptureRequest, ChatRequest
from ..transport import read
from .generation import answer

blueprint = Blueprint("chat", __name__, url_prefix="/v1/chat/completions")


@blueprint.post("")
@described(
    ChatRequest,
    replies=ChatReply,
    event=ChatEvent,
    tags=["Generation"],
    errors=(404,),
    job=True,
    example={"messages": [{"role": "user", "content": "What is the capital of France ?"}], "max_tokens": 4},
)
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
    errors=(404, 413, 507),
    job=True,
    example={
        "messages": [{"role": "user", "content": "What is the capital of France ?"}],
        "activation_hooks": [{"layer_name": "transformer.h.1", "component": "residual", "hook_id": "layer_1_residual"}],
        "activation_encoding": "base64",
        "max_tokens": 2,
        "temperature": 0,
    },
)
def chat_with_activations() -> Response:
    """Answer a chat, and bring back what the hooks captured."""
    asked = read(ChatCaptureRequest)
    return answer(asked, asked.messages)
