"""``/interpret`` in another Flask application: the same addresses, with a worker of their own."""

import atexit
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, current_app, g, request
from werkzeug.exceptions import HTTPException

from mlx_hooks import HookedModel, HookError
from mlx_hooks.training.config import MechIntConfig

from . import logs
from .config import ServerConfig
from .description import JOB_ID_HEADER, REQUEST_ID_HEADER
from .errors import Stopping, describe, json_reply
from .interpretability import UNPACKED, Interpretability, check_defaults
from .models import LoadedModel
from .routes.interpret import interpret, interpret_layers, interpret_upload
from .routes.jobs import cancel_job, get_job, list_jobs
from .worker import ModelWorker


class InterpretabilityBlueprint(Blueprint):
    """Made by :func:`interpretability_blueprint`."""

    def __init__(self, name: str, parts: dict[str, Any]) -> None:
        super().__init__(name, __name__)
        self._parts = parts
        self._worker: ModelWorker = parts["model_worker"]
        self._starting = threading.Lock()
        self._is_started = self._is_closed = False
        self.add_url_rule("/interpret/layers", view_func=interpret_layers, methods=["GET"])
        self.add_url_rule("/interpret", view_func=interpret, methods=["POST"])
        self.add_url_rule("/interpret/upload", view_func=interpret_upload, methods=["POST"])
        self.add_url_rule("/v1/jobs", view_func=list_jobs, methods=["GET"])
        self.add_url_rule("/v1/jobs/<job_id>", view_func=get_job, methods=["GET"])
        self.add_url_rule("/v1/jobs/<job_id>", view_func=cancel_job, methods=["DELETE"])
        self.before_request(self._begin)
        self.after_request(self._account)
        self.register_error_handler(Exception, self._render)

    def close(self) -> None:
        """Leave what still computes, and end the worker; no request is answered afterwards."""
        with self._starting:
            self._is_closed = True
        # What is left below is answered as what the worker no longer takes.
        self._worker.request_stop()
        self._parts["interpretability"].close()
        self._worker.stop()
        atexit.unregister(self.close)

    def _begin(self) -> None:
        g.request_id, g.began = logs.request_id(request.headers.get(REQUEST_ID_HEADER, "")), time.perf_counter()
        g.neuroscope_parts = {**self._parts, "job_endpoint": f"{request.blueprint}.get_job"}
        request.max_content_length = self._parts["server_config"].max_body_bytes
        # With the first request, so that a server that forks its processes has a worker in each.
        with self._starting:
            if self._is_closed:
                raise Stopping
            if not self._is_started:
                self._is_started = True
                self._worker.start()
                atexit.register(self.close)

    @staticmethod
    def _account(response: Response) -> Response:
        if not _is_begun():
            return response
        response.headers[REQUEST_ID_HEADER] = g.request_id
        if "job_id" in g:
            response.headers[JOB_ID_HEADER] = g.job_id
        return response

    @staticmethod
    def _render(error: Exception) -> Any:
        if not _is_begun():
            return _of_application(error)
        known = describe(error, g.request_id)
        return json_reply(known.body(g.request_id), known.status, known.headers)


def _is_begun() -> bool:
    """Whether the request came as far as the blueprint: the application answers those that it refuses itself."""
    return "neuroscope_parts" in g


def _of_application(error: Exception) -> Any:
    """What the application itself makes of an error; a handler of ours comes before those that it has for classes."""
    handlers = current_app.error_handler_spec[None][None]
    for kind in type(error).__mro__:
        if kind in handlers:
            return current_app.ensure_sync(handlers[kind])(error)
    if isinstance(error, HTTPException):
        return error
    raise error


def interpretability_blueprint(
    model: Any = None,
    config: MechIntConfig | Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    name: str = "interpretability",
    max_upload_bytes: int = 32 * 2**20,
    cors_origins: Sequence[str] = (),
) -> InterpretabilityBlueprint:
    """The addresses under ``/interpret`` for a Flask application of one's own.

        app = Flask(__name__)
        app.register_blueprint(interpretability_blueprint(model, MechIntConfig(storage_path="mechint_cache")))

    ``GET /interpret/layers``, ``POST /interpret`` and ``POST /interpret/upload`` are those of ``create_app``, errors
    included, and so is ``/v1/jobs``, for analyses in the background. Who may ask is for the application to say.

    Args:
        model: a ``HookedModel``, or any model of mlx-lm's; None where nothing is to be run.
        config: ``storage_path`` is the folder whose shards are analysed, ``analysis_options`` the options that hold
            unless a request gives its own; with ``enable_feature_steering`` ``sae`` steers where it is given
            ``eval_data``.
        tokenizer: of a model of mlx-lm's, to read texts and to spell tokens.
        name: what the blueprint and the model are called.
        max_upload_bytes: the largest body of a request.
        cors_origins: whose pages may upload besides the application's own; "*" is everybody's. A browser shows them the
            answers if the application sends CORS headers.

    Raises:
        HookError: a configuration that is none, or whose ``analysis_options`` no request could have.
        ValueError: an origin is none.
        UnsupportedModelError: a model that cannot be hooked.
    """
    config = MechIntConfig.of(config)
    check_defaults(config.analysis_options)
    if type(max_upload_bytes) is not int or max_upload_bytes < 1:
        raise HookError(f"max_upload_bytes is a number of bytes, got {max_upload_bytes!r}.", field="max_upload_bytes")
    limits = ServerConfig(max_body_bytes=max_upload_bytes, cors_origins=tuple(cors_origins))
    worker = ModelWorker()
    if model is not None:
        hooked = model if isinstance(model, HookedModel) else HookedModel(model, tokenizer)
        worker.loaded.put(LoadedModel(name, name, hooked, int(time.time())))
    service = Interpretability(
        worker,
        Path(config.storage_path),
        defaults=config.analysis_options,
        steer=config.enable_feature_steering,
        max_array_bytes=UNPACKED * max_upload_bytes,
        to_load="Give interpretability_blueprint one",
    )
    return InterpretabilityBlueprint(
        name,
        {
            "model_worker": worker,
            "server_config": limits,
            "interpretability": service,
        },
    )
