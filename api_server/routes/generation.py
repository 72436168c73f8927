"""How all four ways to generate answer: one job on the worker, its results as one object or as events."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flask import Response

from mlx_hooks import HookError, HookSpec, UnknownHookError
from neuroscope_bridge import payload

from .. import inference
from ..downloads import large_json
from ..errors import ApiError
from ..keeping import Keeping
from ..models import LoadedModel
from ..replies import Reply
from ..schemas.requests import CaptureRequest, ChatRequest, GenerationRequest, HookRequest, InterventionRequest
from ..transport import captures, config, event_stream, reader_gone, submit, worker


def answer(asked: GenerationRequest, prompt: inference.PromptSource) -> Response:
    """Generate for ``asked`` on the model it names."""
    loaded = worker().get(asked.model)
    listed = isinstance(asked, CaptureRequest) and bool(asked.activation_hooks)
    with blame("activation_hooks", listed=listed):
        plan = loaded.model.resolve_hooks(_hooks(asked, loaded) if isinstance(asked, CaptureRequest) else [])
    edits = loaded.model.resolve_interventions(
        edits_of(asked.interventions if isinstance(asked, CaptureRequest) else [])
    )
    kind = "chat.completion" if isinstance(asked, ChatRequest) else "text_completion"
    job = submit(lambda: inference.generate(loaded.model, asked, prompt, plan, edits), kind, loaded, asked.user)
    reply = Reply(asked, loaded.model_id, _keeping(asked, loaded))
    results = _blaming(job.results(reader_gone()), plan.hook_ids, listed)
    if asked.stream:
        return event_stream(reply.events(results), job)
    try:
        return large_json(reply.whole(results))
    finally:
        job.cancel()


def _keeping(asked: GenerationRequest, loaded: LoadedModel) -> Keeping | None:
    """Where the activations of a request go; None if it captures nothing."""
    if not isinstance(asked, CaptureRequest):
        return None
    return Keeping(captures(), asked, loaded, config().max_reply_bytes)


def specs_of(hooks: Sequence[HookRequest]) -> list[HookSpec]:
    """The engine's specs of the hooks in a request."""
    specs: list[HookSpec] = []
    for hook in hooks:
        try:
            specs.append(HookSpec.of(hook.model_dump()))
        except HookError as error:
            error.hook = len(specs)
            raise
    return specs


@contextmanager
def blame(param: str, hook_ids: Sequence[str] = (), *, listed: bool = True) -> Iterator[None]:
    """What the engine says about a hook, as an error about the field that named it.

    Args:
        param: the request's list of hooks.
        hook_ids: their ids, for an error that knows the id alone.
        listed: False where the hooks are registered ones, which have no index in the request.
    """
    try:
        yield
    except HookError as error:
        index = hook_ids.index(error.hook_id) if error.hook_id in hook_ids else error.hook
        if index is None:
            raise
        code = "unknown_hook" if isinstance(error, UnknownHookError) else "invalid_hook"
        place = f"{param}[{index}]" + (f".{error.field}" if error.field else "")
        raise ApiError(400, str(error), code=code, param=place if listed else param) from error


def _blaming(results: Iterator[Any], hook_ids: Sequence[str], listed: bool) -> Iterator[Any]:
    """The same results; some faults of hooks are found once the prompt's length is known."""
    with blame("activation_hooks", hook_ids, listed=listed):
        yield from results


def edits_of(interventions: Sequence[InterventionRequest] | None) -> list[dict[str, Any]]:
    """A request's interventions as the engine takes them: the data of their sources as arrays."""
    specs = []
    for i, wanted in enumerate(interventions or []):
        # Not model_dump: it would copy and check each number of a long list.
        spec = {name: value for name, value in wanted if value is not None}
        if wanted.source is not None:
            records = wanted.source if isinstance(wanted.source, list) else [wanted.source]
            try:
                spec["source"] = [_decoded(record) for record in records]
            except payload.PayloadError as error:
                param = f"interventions[{i}].source"
                raise ApiError(400, str(error), code="invalid_intervention", param=param) from error
        specs.append(spec)
    return specs


_NEEDED = ("hook_point", "axes", "positions", "shape", "dtype")


def _decoded(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a source with its data as an array."""
    missing = [name for name in _NEEDED if name not in record]
    if missing:
        needed = ", ".join(_NEEDED)
        raise payload.PayloadError(
            f"A record of a source lacks {missing[0]!r}: it needs {needed} and data, as this server returns them."
        )
    return {**record, "data": payload.decode_activation(record)}


def _hooks(asked: CaptureRequest, loaded: LoadedModel) -> list[HookSpec]:
    """The request's own hooks, or those registered for its model."""
    hooks = specs_of(asked.activation_hooks or []) or list(loaded.hooks.values())
    if not hooks and not asked.interventions:
        others = [other.model_id for other in worker().models() if other.hooks]
        elsewhere = f" Hooks are registered for {', '.join(others)}, not for {loaded.model_id}." if others else ""
        raise ApiError(
            400,
            "Nothing to capture: give 'activation_hooks', or register hooks with POST /v1/activations/hooks."
            + elsewhere,
            code="no_hooks",
            param="activation_hooks",
        )
    return hooks
