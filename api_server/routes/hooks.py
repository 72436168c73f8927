"""Registered hooks: they belong to a model and serve requests with activations that name none."""

from flask import Blueprint, Response

from ..description import described
from ..errors import ApiError, json_reply
from ..schemas.queries import ModelQuery
from ..schemas.replies import HookRemovedReply, HooksClearedReply, HooksRegisteredReply, HooksReply
from ..schemas.requests import RegisterHooksRequest
from ..transport import config, read, read_query, worker
from .generation import blame, specs_of

blueprint = Blueprint("hooks", __name__, url_prefix="/v1/activations/hooks")


@blueprint.post("")
@described(
    RegisterHooksRequest,
    replies=HooksRegisteredReply,
    tags=["Hooks"],
    errors=(404, 409),
    example={"hooks": [{"layer_name": "transformer.h.1", "component": "residual", "hook_id": "layer_1_residual"}]},
)
def register_hooks() -> Response:
    """Register hooks for the requests that name none of their own."""
    asked = read(RegisterHooksRequest)
    known = worker().get(asked.model).hooks
    new = [hook for hook in asked.hooks if hook.hook_id not in known]
    if len(known) + len(new) > config().max_hooks:
        raise ApiError(
            400,
            f"{len(known)} hooks are registered and {len(new)} more asked for; this server keeps at most "
            f"{config().max_hooks} per model. DELETE /v1/activations/hooks makes room.",
            code="limit_exceeded",
            param="hooks",
        )
    with blame("hooks"):
        ids = worker().loaded.register_hooks(specs_of(asked.hooks), asked.model)
    return json_reply({"status": "hooks_registered", "registered_hooks": ids})


@blueprint.get("")
@described(query=ModelQuery, replies=HooksReply, tags=["Hooks"], errors=(404,))
def list_hooks() -> Response:
    """The hooks of a model, by default of the one that requests without a model mean; none if none is loaded."""
    wanted = read_query(ModelQuery).model
    loaded = worker().get(wanted) if wanted is not None or worker().models() else None
    hooks = [spec.to_dict() for spec in loaded.hooks.values()] if loaded else []
    return json_reply({"model": loaded.model_id if loaded else None, "hooks": hooks})


@blueprint.delete("")
@described(query=ModelQuery, replies=HooksClearedReply, tags=["Hooks"], errors=(404,))
def clear_hooks() -> Response:
    """Forget the hooks of a model, by default of every model."""
    worker().loaded.clear_hooks(read_query(ModelQuery).model)
    return json_reply({"status": "hooks_cleared"})


@blueprint.delete("/<path:hook_id>")
@described(query=ModelQuery, replies=HookRemovedReply, tags=["Hooks"], errors=(404,))
def remove_hook(hook_id: str) -> Response:
    """Forget one hook, in one model or wherever it is registered."""
    worker().loaded.remove_hook(hook_id, read_query(ModelQuery).model)
    return json_reply({"status": "hook_removed", "hook_id": hook_id})
