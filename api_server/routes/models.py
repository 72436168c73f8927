"""Models: list, load, describe, unload, and what can be hooked in them."""

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any

from flask import Blueprint, Response

from mlx_hooks import ModelLoadError, SelfTest, UnsupportedModelError, loading

from .. import inference, logs
from ..description import described
from ..errors import ApiError, json_reply
from ..jobs import Progress
from ..models import LoadedModel
from ..schemas.queries import NoQuery
from ..schemas.replies import (
    HookPointsReply,
    JobReply,
    LoadedReply,
    ModelReply,
    ModelsReply,
    SelfTestReply,
    UnloadedReply,
)
from ..schemas.requests import LoadRequest, SelfTestRequest
from ..transport import config, in_background, read, read_query, reader_gone, submit, worker
from ..worker import ModelWorker

blueprint = Blueprint("models", __name__, url_prefix="/v1/models")


@blueprint.get("")
@described(replies=ModelsReply, tags=["Models"])
def list_models() -> Response:
    """The loaded models, the one loaded last at the end."""
    read_query(NoQuery)
    models = [describe_model(loaded) for loaded in worker().models()]
    return json_reply({"object": "list", "data": models, "models": models})


@blueprint.post("/load")
@described(
    LoadRequest,
    replies={200: LoadedReply, 202: JobReply},
    tags=["Models"],
    errors=(404,),
    job=True,
    example={"model_path": "neuroscope-tiny"},
)
def load_model() -> Response:
    """Load the bundled model, a folder that the server can read, or a Hugging Face id.

    It becomes the model that requests without a model mean. One of the same id is replaced, with its hooks. Models that
    were not used for longest are unloaded where the memory for models would not suffice.
    """
    asked = read(LoadRequest)
    _check_place(asked.model_path)
    render = _loaded if asked.background else None
    job = submit(partial(_loading, worker(), asked), "load", render=render)
    return in_background(job) if render else json_reply(_loaded(job.result(reader_gone())))


def _loading(worker: ModelWorker, asked: LoadRequest) -> Generator[LoadedModel | Progress, None, None]:
    try:
        yield from worker.loading(asked.model_path, asked.model_id)
    except (ModelLoadError, UnsupportedModelError) as error:
        status, code = (400, "model_not_loadable") if _exists(asked.model_path) else (404, "model_not_found")
        raise ApiError(status, logs.scrub(str(error), asked.model_path), code=code, param="model_path") from error


def _check_place(name: str) -> None:
    """Refuse a folder that this server does not load from, in the same words whether it exists or not."""
    if name == loading.BUNDLED or loading.is_remote(name):
        return
    try:
        allowed = config().admits_folder(Path(name).expanduser())
    except (OSError, RuntimeError, ValueError):
        allowed = False  # too long, of no user, or no path at all
    if not allowed and (config().api_key or config().model_roots):
        raise ApiError(
            403,
            "This server loads models by path from its model roots only (--model-root). The bundled "
            f"{loading.BUNDLED!r} and Hugging Face ids such as 'owner/name' are allowed.",
            code="path_not_allowed",
            param="model_path",
        )


def _loaded(loaded: LoadedModel) -> dict[str, Any]:
    return {"status": "loaded"} | describe_model(loaded)


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
@described(
    SelfTestRequest,
    replies={200: SelfTestReply, 202: JobReply},
    tags=["Models"],
    errors=(404,),
    job=True,
    example={},
)
def selftest(model_id: str) -> Response:
    """Prove on a loaded model that what is captured is what was computed."""
    asked = read(SelfTestRequest)
    loaded = worker().get(model_id)

    name = loaded.model_id

    def render(report: SelfTest) -> dict[str, Any]:
        return {"model": name} | report.to_dict()

    work = partial(inference.selftest, loaded.model)
    job = submit(work, "selftest", loaded, render=render if asked.background else None)
    return in_background(job) if asked.background else json_reply(render(job.result(reader_gone())))


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
        "weight_bytes": loaded.nbytes,
        "eos_token_ids": sorted(getattr(loaded.model.tokenizer, "eos_token_ids", None) or ()),
        "supports_activations": True,
        "untrusted_hook_points": loaded.model.untrusted,
        "num_layers": cfg.n_layers,
        "num_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_key_value_heads,
        "vocab_size": cfg.d_vocab,
        **cfg.to_dict(),
    }
