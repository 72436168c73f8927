"""What becomes of a run's activations: they go into the reply, into the capture store, or both.

A run that asks for it is kept. One whose activations are too large for a reply is kept whether it asks or not: the
records come without data then, and the reply says how to fetch it. Writing is done in the reader's thread.
"""

import math
from types import TracebackType
from typing import Any

import numpy as np

from neuroscope_bridge import payload

from .captures import CaptureAbout, CaptureStore, CaptureWriter
from .errors import ApiError
from .inference import Step
from .models import LoadedModel
from .schemas.requests import CaptureRequest

Record = dict[str, Any]

HELD_BYTES = 2**20
"""What a stream holds in memory, in case that it turns out too large and is kept from its start. More is written."""


class Keeping:
    """The activations of one request on their way.

        with Keeping(store, request, loaded, max_reply_bytes) as keeping:     # discards what was not finished
            records = keeping.take(step)                                      # for the reply
            body |= keeping.finish(tokens, receipts, interventions, finish_reason)

    Args:
        store: where captures are kept.
        request: what is asked.
        loaded: the model that runs.
        max_reply_bytes: the most bytes of activations, before encoding, in a reply.
    """

    def __init__(self, store: CaptureStore, request: CaptureRequest, loaded: LoadedModel, max_reply_bytes: int) -> None:
        self._store = store
        self._encoding = request.activation_encoding
        self._dtype = request.activation_dtype
        self._wanted = request.keep_capture
        # A whole reply holds its arrays in any case.
        self._hold = min(HELD_BYTES, max_reply_bytes) if request.stream else max_reply_bytes
        self._limit = max_reply_bytes if self._encoding != "none" else math.inf
        self._loaded = loaded
        self._bytes = 0
        self._held: list[tuple[Record, np.ndarray]] = []
        self._held_bytes = 0
        self._writer: CaptureWriter | None = None
        self._refusal: ApiError | None = None

    @property
    def too_large(self) -> bool:
        """Whether the run's activations so far are too large for a reply."""
        return self._bytes > self._limit

    def take(self, step: Step) -> dict[str, list[Record]]:
        """The step's records for the reply; without data once they are too large for one."""
        plain = step.records("none", "float32")
        self._bytes += sum(self._sent_bytes(record) for records in plain.values() for record in records)
        if self._wanted or self._limit < math.inf:
            self._keep(plain, step)
        if self.too_large:
            sent = {"float32": self._dtype}
            return {
                hook_id: [record | {"dtype": sent.get(record["dtype"], record["dtype"])} for record in records]
                for hook_id, records in plain.items()
            }
        return step.records(self._encoding, self._dtype)

    def finish(
        self,
        tokens: dict[str, Any],
        receipts: dict[str, Any],
        interventions: list[dict[str, Any]],
        finish_reason: str | None,
    ) -> dict[str, Any]:
        """Keep what is to be kept; answers the fields of the reply that say so.

        Raises:
            ApiError: it is to be kept and cannot be.
        """
        if not (self._wanted or self.too_large):
            return {"capture_id": None}
        writer = self._begun()
        writer.finish(
            CaptureAbout(
                model=self._loaded.model_id,
                n_layers=self._loaded.model.cfg.n_layers,
                n_heads=self._loaded.model.cfg.n_heads,
                head_counts=self._head_counts(),
                tokens=tokens,
                hooks=receipts,
                interventions=interventions,
                finish_reason=finish_reason,
            )
        )
        return {"capture_id": writer.capture_id} | (self._omitted(writer.capture_id) if self.too_large else {})

    def __enter__(self) -> "Keeping":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        if self._writer is not None:
            self._writer.discard()

    def _sent_bytes(self, record: Record) -> int:
        nbytes = int(payload.receipt([record])["bytes"])
        return nbytes // 2 if record["dtype"] == "float32" and self._dtype == "float16" else nbytes

    def _keep(self, plain: dict[str, list[Record]], step: Step) -> None:
        """Hold a step, or write it, and what was held before."""
        if self._refusal is None:
            for hook_id, found in step.captured.items():
                arrays = [payload.as_wire_dtype(array, "float32", hook_id) for _, array in found]
                self._held += zip(plain[hook_id], arrays, strict=True)
                self._held_bytes += sum(array.nbytes for array in arrays)
        if self._wanted or self.too_large:
            self._write(self._begun())
        elif self._held_bytes > self._hold and self._refusal is None:
            try:
                self._writer = self._writer or self._store.begin(claimed=False)
                self._write(self._writer)
            except ApiError as error:
                # It may never be needed.
                self._refusal = error
                self._held.clear()

    def _begun(self) -> CaptureWriter:
        """The writer of a capture that is needed."""
        if self._refusal is not None:
            raise self._refusal
        if self._writer is None:
            self._writer = self._store.begin()
        self._writer.claim()
        return self._writer

    def _write(self, writer: CaptureWriter) -> None:
        for about, array in self._held:
            writer.add(about, array)
        self._held.clear()
        if self._writer is not None:
            # From here on each step is written as it comes.
            self._held_bytes, self._hold = 0, 0

    def _head_counts(self) -> dict[str, int]:
        points = self._loaded.model.hook_points
        return {name: size for name, point in points.items() if (size := point.size("head")) is not None}

    def _omitted(self, capture_id: str) -> dict[str, Any]:
        message = (
            f"The activations have {self._bytes} bytes; a reply carries at most {self._limit}. They are kept: "
            f"GET /v1/captures/{capture_id}/activations?format=safetensors, whole or in ranges."
        )
        return {"omitted": {"bytes": self._bytes, "limit": self._limit, "message": message}}
