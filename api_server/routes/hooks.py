"""Registered hooks: they belong to a model and serve requests with activations that name none."""

from flask import Blueprint, Response, request

from ..errors import json_reply
from ..schemas.requests import RegisterHooksRequest
from ..transport import read, worker
from .generation import blame, spec_of

blueprint = Blueprint("hooks", __name__, url_prefix="/v1/activations/hooks")


@blueprint.post("")
def register_hooks() -> Response:
    asked = read(RegisterHooksRequest)
    with blame("hooks"):
        ids = worker().loaded.register_hooks([spec_of(hook) for hook in asked.hooks], asked.model)
    return json_reply({"status": "hooks_registered", "registered_hooks": ids})


@blueprint.get("")
def list_hooks() -> Response:
    """The hooks of ``?model=``, or of the model that requests without a model mean; none if none is loaded."""
    wanted = request.args.get("model")
    loaded = worker().get(wanted) if wanted is not None or worker().models() else None
    hooks = [spec.to_dict() for spec in loaded.hooks.values()] if loaded else []
    return json_reply({"model": loaded.model_id if loaded else None, "hooks": hooks})


@blueprint.delete("")
def clear_hooks() -> Response:
    """Forget the hooks of ``?model=``, or of every model."""
    worker().loaded.clear_hooks(request.args.get("model"))
    return json_reply({"status": "hooks_cleared"})


@blueprint.delete("/<path:hook_id>")
def remove_hook(hook_id: str) -> Response:
    worker().loaded.remove_hook(hook_id, request.args.get("model"))
    return json_reply({"status": "hook_removed", "hook_id": hook_id})
