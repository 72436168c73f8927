"""Kept captures: list, describe, read in ranges, delete."""

import re
from typing import Any

from flask import Blueprint, Response
from pydantic import BaseModel

from neuroscope_bridge import payload

from ..captures import Capture, Entry
from ..description import described
from ..downloads import Source, check_if_match, download, entity_tag, is_known, not_modified, tagged_json
from ..errors import ApiError, json_reply
from ..ranges import Tensor, select, sources
from ..schemas.queries import CapturesQuery, NoQuery, RangeQuery
from ..schemas.replies import (
    CaptureActivationsReply,
    CaptureDeletedReply,
    CaptureReply,
    CapturesClearedReply,
    CapturesReply,
)
from ..transport import captures, config, read_query

blueprint = Blueprint("captures", __name__, url_prefix="/v1/captures")

NPY, SAFETENSORS = "application/x-npy", "application/x-safetensors"
BINARY = {kind: {"type": "string", "format": "binary"} for kind in (NPY, SAFETENSORS)}
HEADERS = {"ETag": "A strong tag: the same query of the same capture always gives the same bytes."}


@blueprint.get("")
@described(replies=CapturesReply, tags=["Captures"], query=CapturesQuery, errors=(404,))
def list_captures() -> Response:
    """The kept captures, the newest first."""
    asked, store = read_query(CapturesQuery), captures()
    entries = store.captures()
    if asked.after is not None:
        entries = _after(entries, asked.after)
    body = {
        "object": "list",
        "data": [_summary(entry) for entry in entries[: asked.limit]],
        "has_more": len(entries) > asked.limit,
        "disk_bytes": store.disk_bytes,
        "max_bytes": store.max_bytes,
        "max_age": store.max_age,
    }
    return json_reply(body)


@blueprint.delete("")
@described(replies=CapturesClearedReply, tags=["Captures"])
def clear_captures() -> Response:
    """Delete all captures."""
    read_query(NoQuery)
    return json_reply({"status": "captures_cleared", "deleted": captures().clear()})


@blueprint.get("/<capture_id>")
@described(replies=CaptureReply, tags=["Captures"], errors=(404,))
def get_capture(capture_id: str) -> Response:
    """What a capture holds: its tokens, receipts, and each array that can be read."""
    read_query(NoQuery)
    capture = captures().get(capture_id)
    about = capture.about
    body = _summary(capture.entry) | {
        "tokens": about.tokens,
        "hooks": about.hooks,
        "interventions": about.interventions,
        "finish_reason": about.finish_reason,
        "arrays": [_described(tensor) for tensor in select(capture)],
    }
    return json_reply(body)


@blueprint.delete("/<capture_id>")
@described(replies=CaptureDeletedReply, tags=["Captures"], errors=(404,))
def delete_capture(capture_id: str) -> Response:
    """Delete a capture; who is reading it reads it to its end."""
    read_query(NoQuery)
    captures().delete(capture_id)
    return json_reply({"id": capture_id, "object": "capture", "deleted": True})


@blueprint.get("/<capture_id>/activations")
@described(
    replies={200: CaptureActivationsReply, 206: None, 304: None},
    tags=["Captures"],
    query=RangeQuery,
    errors=(404, 412, 413, 416, 507),
    media=BINARY,
    headers=HEADERS,
)
def get_activations(capture_id: str) -> Response:
    """The activations of all hooks of a capture, whole or in ranges."""
    return _answer(capture_id, None, read_query(RangeQuery))


@blueprint.get("/<capture_id>/activations/<path:hook_id>")
@described(
    replies={200: CaptureActivationsReply, 206: None, 304: None},
    tags=["Captures"],
    query=RangeQuery,
    errors=(404, 412, 413, 416, 507),
    media=BINARY,
    headers=HEADERS,
)
def get_hook_activations(capture_id: str, hook_id: str) -> Response:
    """The activations of one hook of a capture, whole or in ranges."""
    return _answer(capture_id, hook_id, read_query(RangeQuery))


def _after(entries: list[Entry], capture_id: str) -> list[Entry]:
    """The part of the list behind a capture, which is not opened: looking on is no use of it."""
    for i, entry in enumerate(entries):
        if entry.capture_id == capture_id:
            return entries[i + 1 :]
    message = f"Capture {capture_id[:100]!r} is in the list no more: read it from its start, without 'after'."
    raise ApiError(404, message, code="capture_not_found", param="after")


def _answer(capture_id: str, hook_id: str | None, asked: RangeQuery) -> Response:
    capture = captures().get(capture_id)
    etag = entity_tag(capture.capture_id, hook_id, _plain(asked))
    tensors = select(capture, hook_id, asked.positions, asked.heads, asked.layers, asked.reduce, asked.hook_point)
    check_if_match(etag)
    if is_known(etag):
        return not_modified(etag)
    name = re.sub(r"[^A-Za-z0-9_-]", "_", "-".join(filter(None, [capture_id, hook_id])))[:120]
    if asked.format == "npy":
        return download(_npy(tensors, asked.dtype), NPY, f"{name}.npy", etag)
    if asked.format == "safetensors":
        return download(_safetensors(capture, tensors, asked.dtype), SAFETENSORS, f"{name}.safetensors", etag)
    return tagged_json(_records(capture, tensors, asked.encoding, asked.dtype), etag)


def _plain(asked: BaseModel) -> list[tuple[str, Any]]:
    return sorted(asked.model_dump().items())


def _npy(tensors: list[Tensor], dtype: str) -> list[Source | bytes]:
    if len(tensors) != 1:
        names = ", ".join(tensor.name for tensor in tensors[:10]) + (" and more" if len(tensors) > 10 else "")
        raise ApiError(
            400,
            f"npy holds one array, and this asks for {len(tensors)}{f': {names}' if names else ''}. "
            "Ask for one hook and narrow it with 'hook_point' or 'layers', or for safetensors.",
            code="invalid_value",
            param="format",
        )
    (tensor,) = tensors
    return [payload.npy_header(tensor.wire_dtype(dtype), tensor.shape), *sources(tensors, dtype)]


def _safetensors(capture: Capture, tensors: list[Tensor], dtype: str) -> list[Source | bytes]:
    about = {"capture_id": capture.capture_id, "model": capture.about.model}
    records = {tensor.name: _described(tensor, dtype) for tensor in tensors}
    header = payload.safetensors_header(
        {tensor.name: (tensor.wire_dtype(dtype), tensor.shape) for tensor in tensors},
        about | {"arrays": payload.dumps(records).decode()},
    )
    return [header, *sources(tensors, dtype)]


def _records(capture: Capture, tensors: list[Tensor], encoding: str, dtype: str) -> dict[str, Any]:
    nbytes = sum(tensor.nbytes(dtype) for tensor in tensors) if encoding != "none" else 0
    if nbytes > config().max_reply_bytes:
        raise ApiError(
            413,
            f"This asks for {nbytes} bytes of numbers; a JSON reply carries at most {config().max_reply_bytes}. "
            "Narrow it with 'positions', 'heads', 'layers' or 'reduce', or ask for format 'safetensors'.",
            code="reply_too_large",
        )
    activations: dict[str, list[dict[str, Any]]] = {}
    for tensor in tensors:
        record = _described(tensor, dtype) | {"encoding": encoding}
        if encoding != "none":
            record["data"] = payload.encoded(tensor.array(dtype), encoding)
        activations.setdefault(record["hook_id"], []).append(record)
    return {"capture_id": capture.capture_id, "model": capture.about.model, "activations": activations}


def _described(tensor: Tensor, dtype: str = "float32") -> dict[str, Any]:
    return {"name": tensor.name, **tensor.about, "shape": list(tensor.shape), "dtype": tensor.wire_dtype(dtype).name}


def _summary(entry: Entry) -> dict[str, Any]:
    return {
        "id": entry.capture_id,
        "object": "capture",
        "created": int(entry.created),
        "expires": int(entry.used + captures().max_age),
        "model": entry.model,
        "bytes": entry.nbytes,
        "hook_ids": list(entry.hook_ids),
        "prompt_tokens": entry.prompt_length,
        "completion_tokens": entry.n_tokens - entry.prompt_length,
    }
