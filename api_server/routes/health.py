"""``GET /health``: answers at once, whatever the worker is doing."""

from importlib.metadata import version

from flask import Blueprint, Response

from ..description import described
from ..errors import json_reply
from ..schemas.queries import NoQuery
from ..schemas.replies import HealthReply
from ..transport import read_query, worker

blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
@described(replies=HealthReply, tags=["Server"])
def health() -> Response:
    """Whether the server runs, and what it has loaded. It answers at once, whatever the model is doing."""
    read_query(NoQuery)
    ids = [loaded.model_id for loaded in worker().models()]
    body = {"status": "healthy", "service": "neuroscope-mlx", "version": version("neuroscope-mlx"), "models": ids}
    return json_reply(body)
