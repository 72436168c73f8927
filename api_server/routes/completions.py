"""Text completions, plain and with activations."""

from flask import Blueprint, Response

from ..description import described
from ..schemas.replies import CompletionCaptureEvent, CompletionCaptureReply, CompletionEvent, CompletionReply
from ..schemas.requests import CompletionCaptureRequest, CompletionRequest
from ..transport import read
from .generation import answer

blueprint = Blueprint("completions", __name__, url_prefix="/v1/completions")


@blueprint.post("")
@described(
    CompletionRequest,
    replies=CompletionReply,
    event=CompletionEvent,
    tags=["Generation"],
    errors=(404,),
    job=True,
    example={"prompt": "The capital of France is", "max_tokens": 4},
)
def complete() -> Response:
    """Continue a text or token ids, in OpenAI's format."""
    asked = read(CompletionRequest)
    return answer(asked, asked.prompt)


@blueprint.post("/with_activations")
@described(
    CompletionCaptureRequest,
    replies=CompletionCaptureReply,
    event=CompletionCaptureEvent,
    tags=["Generation"],
    errors=(404, 413, 507),
    job=True,
    example={
        "prompt": "The capital of France is",
        "activation_hooks": [{"layer_name": "transformer.h.1", "component": "residual", "hook_id": "layer_1_residual"}],
        "activation_encoding": "base64",
        "max_tokens": 2,
        "temperature": 0,
    },
)
def complete_with_activations() -> Response:
    """Continue a text or token ids, and bring back what the hooks captured."""
    asked = read(CompletionCaptureRequest)
    return answer(asked, asked.prompt)
