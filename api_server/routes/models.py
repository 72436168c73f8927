"""Models: list, load, describe, unload, and what can be hooked in them."""

from pathlib import Path
from typing import Any

from flask import Blueprint, Response

from mlx_hooks import ModelLoadError, UnsupportedModelError

from ..description import described
from ..errors import ApiError, json_reply
from ..schemas.replies import HookPointsReply, LoadedReply, ModelReply, ModelsReply, SelfTestReply, UnloadedReply
from ..schemas.requests import LoadRequest, NoQuery, SelfTestRequest
from ..transport import read, read_query, reader_gone, worker
from ..worker import LoadedModel

blueprint = Blueprint("models", __name__, url_prefix="/v1/models")


@blueprint.get("")
@described(replies=ModelsReply, tags=["Models"])
def list_models() -> Response:
    """The loaded models, the one loaded last at the end."""
    read_query(NoQuery)
    models = [describe_model(loaded) for loaded in worker().models()]
    return json_reply({"object": "list", "data": models, "models": models})


@blueprint.post("/load")
@described(LoadRequest, replies=LoadedReply, tags=["Models"], errors=(404, 503))
def load_model() -> Response:
    """Load the bundled model, a folder that the server can read, or a Hugging Face id.

    It becomes the model that requests without a model mean. One of the same id is replaced, with its hooks.
    """
    asked = read(LoadRequest)
    try:
        loaded = worker().load(asked.model_path, asked.model_id)
    except (ModelLoadError, UnsupportedModelError) as error:
        status, code = (400, "model_not_loadable") if _exists(asked.model_path) else (404, "model_not_found")
        raise ApiError(status, str(error), code=code, param="model_path") from error
    return json_reply({"status": "loaded"} | describe_model(loaded))


@blueprint.get("/<model:model_id>")
@described(replies=ModelReply, tags=["Models"], errors=(404,))
def get_model(model_id: str) -> Response:
    """The configuration of a loaded model."""
    read_query(NoQuery)
    return json_reply(describe_model(worker().get(model_id)))


@blueprint.delete("/<model:model_id>")
@described(replies=UnloadedReply, tags=["Models"], errors=(404, 503))
def unload_model(model_id: str) -> Response:
    """Unload a model; a request that already uses it runs to its end."""
    read_query(NoQuery)
    worker().unload(model_id)
    return json_reply({"id": model_id, "object": "model", "deleted": True, "status": "unloaded"})


@blueprint.get("/<path:model_id>/hook_points")
@described(replies=HookPointsReply, tags=["Models"], errors=(404,))
def hook_points(model_id: str) -> Response:
    """Everything that can be hooked in a model, in forward order."""
    read_query(NoQuery)
    loaded = worker().get(model_id)
    points = [
        {
            "name": point.name,
            "layer": point.layer,
            "component": point.component,
            "axes": point.axes,
            "sizes": point.sizes,
        }
        for point in loaded.model.hook_points.values()
    ]
    return json_reply({"model": loaded.model_id, "hook_points": points})


@blueprint.post("/<path:model_id>/selftest")
@described(SelfTestRequest, replies=SelfTestReply, tags=["Models"], errors=(404, 503))
def selftest(model_id: str) -> Response:
    """Prove on a loaded model that what is captured is what was computed. The body is an empty object."""
    read(SelfTestRequest)
    loaded = worker().get(model_id)
    report = worker().call(loaded.model.selftest, reader_gone())
    return json_reply({"model": loaded.model_id} | report.to_dict())


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False  # too long, of no user, or no path at all


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """OpenAI's model object, and the configuration under both its own names and those that clients know."""
    cfg = loaded.model.cfg
    return {
        "id": loaded.model_id,
        "model_id": loaded.model_id,
        "object": "model",
        "created": loaded.created,
        "owned_by": "local",
        "supports_activations": True,
        "untrusted_hook_points": loaded.model.untrusted,
        "num_layers": cfg.n_layers,
        "num_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_key_value_heads,
        "vocab_size": cfg.d_vocab,
        **cfg.to_dict(),
    }
