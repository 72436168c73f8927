"""Text completions, plain and with activations."""

from flask import Blueprint, Response

from ..schemas.requests import CompletionCaptureRequest, CompletionRequest
from ..transport import read
from .generation import answer

blueprint = Blueprint("completions", __name__, url_prefix="/v1/completions")


@blueprint.post("")
def complete() -> Response:
    asked = read(CompletionRequest)
    return answer(asked, asked.prompt)


@blueprint.post("/with_activations")
def complete_with_activations() -> Response:
    asked = read(CompletionCaptureRequest)
    return answer(asked, asked.prompt)
