"""Analyses of activations that were captured during training, or that a request brings."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from flask import Blueprint, Response
from werkzeug.utils import secure_filename

from ..description import described
from ..downloads import large_json
from ..errors import json_reply
from ..interpretability import Asked
from ..models import LoadedModel
from ..schemas.interpret import (
    InterpretReply,
    InterpretRequest,
    InterpretUploadReply,
    InterpretUploadRequest,
    LayersReply,
)
from ..schemas.queries import ModelQuery
from ..schemas.replies import JobReply
from ..transport import in_background, interpretability, read, read_form, read_query, reader_gone, submit, worker

blueprint = Blueprint("interpret", __name__, url_prefix="/interpret")


@blueprint.get("/layers")
@described(query=ModelQuery, replies=LayersReply, tags=["Interpretability"], errors=(404,))
def interpret_layers() -> Response:
    """What was captured during training, and what could be captured of a loaded model."""
    asked = read_query(ModelQuery)
    return json_reply(interpretability().layers(_model(asked.model)))


@blueprint.post("")
@described(
    InterpretRequest,
    replies={200: InterpretReply, 202: JobReply},
    tags=["Interpretability"],
    errors=(404,),
    job=True,
    example={"analysis_type": "neuron", "layer_name": "blocks.2.hook_resid_post", "config": {}},
)
def interpret() -> Response:
    """Analyse what was captured during training, or, by ``circuit`` and ``causal``, a loaded model."""
    asked = read(InterpretRequest)
    loaded = _model(asked.model)
    return _answer(asked, loaded, {})


@blueprint.post("/upload")
@described(
    form=InterpretUploadRequest,
    replies={200: InterpretUploadReply, 202: JobReply},
    tags=["Interpretability"],
    errors=(404,),
    job=True,
)
def interpret_upload() -> Response:
    """Analyse activations that come as a file."""
    asked, file = read_form(InterpretUploadRequest)
    loaded = _model(asked.model)
    # What it was called is told again, and used for nothing.
    name = secure_filename(file.filename or "") or "upload"
    return _answer(asked, loaded, {"filename": name}, file=file.stream)


def _model(model_id: str | None) -> LoadedModel | None:
    """The model that is named, or the one loaded last; None where none is loaded."""
    return worker().get(model_id) if model_id is not None or worker().models() else None


def _answer(
    asked: InterpretRequest | InterpretUploadRequest, loaded: LoadedModel | None, about: dict[str, Any], **source: Any
) -> Response:
    service = interpretability()
    wanted = Asked(asked.analysis_type, asked.layer_name, asked.config.options, asked.config.besides, asked.model)
    work = service.work(wanted, loaded, **source)

    def body(results: dict[str, Any]) -> dict[str, Any]:
        return {
            "analysis_type": asked.analysis_type,
            "layer_name": asked.layer_name,
            "results": results,
            "timestamp": time.time(),
            **about,
        }

    render: Callable[..., Any] | None = body if asked.background else None
    job = service.submit(partial(submit, work, "interpret", loaded if wanted.runs_model else None, render=render))
    return in_background(job) if asked.background else large_json(body(job.result(reader_gone())))
