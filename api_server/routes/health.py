"""``GET /health``: answers at once, whatever the worker is doing."""

from importlib.metadata import version

from flask import Blueprint, Response

from ..errors import json_reply
from ..transport import worker

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
def health() -> Response:
    ids = [loaded.model_id for loaded in worker().models()]
    body = {"status": "healthy", "service": "neuroscope-mlx", "version": version("neuroscope-mlx"), "models": ids}
    return json_reply(body)
