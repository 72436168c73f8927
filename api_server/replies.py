"""Replies to generation requests: OpenAI's shapes, with activations beside them. No transport here."""

import time
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from neuroscope_bridge import payload

from .errors import ApiError
from .inference import Start, Step
from .keeping import Keeping
from .schemas.requests import CaptureRequest, ChatRequest, GenerationRequest

Record = dict[str, Any]


class Reply:
    """The reply to one generation: fed with a job's results, it answers as a whole or as events.

        reply = Reply(request, "neuroscope-tiny")
        body = reply.whole(job.results())
        for event in reply.events(job.results()): ...

    A hook that captured nothing is an error, unless the text ended before the positions that it keeps.
    """

    def __init__(self, request: GenerationRequest, model_id: str, keeping: Keeping | None = None) -> None:
        self._keeping = keeping
        self._chat = isinstance(request, ChatRequest)
        self._capture = request if isinstance(request, CaptureRequest) else None
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model_id = model_id
        self._start = Start([], [], [])
        self._tokens: list[int] = []
        self._strings: list[str] = []
        self._finish_reason: str | None = None
        # Records without their data: receipts need no more, and a long stream is not kept in memory.
        self._seen: dict[str, list[Record]] = {}
        self._interventions: list[Record] = []

    def whole(self, results: Iterator[Start | Step]) -> dict[str, Any]:
        """One object with all text and all activations."""
        texts: list[str] = []
        activations: dict[str, list[Record]] = {}
        with self._keeping or nullcontext():
            for step in self._steps(results):
                texts.append(step.text)
                records = self._take(step)
                if self._keeping is not None and self._keeping.too_large:
                    activations = self._seen
                    continue
                for hook_id, found in records.items():
                    activations.setdefault(hook_id, []).extend(found)
            closing = self._closing()
        text = "".join(texts)
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        body = self._envelope("chat.completion" if self._chat else "text_completion", said, self._finish_reason)
        return body | ({"activations": activations} if self._capture else {}) | closing

    def events(self, results: Iterator[Start | Step]) -> Iterator[dict[str, Any]]:
        """One object per step that has something to tell, then one with the finish reason and the accounts."""
        first = True
        with self._keeping or nullcontext():
            for step in self._steps(results):
                records = self._take(step)
                if first or step.text or self._capture:
                    yield self._chunk(step.text, first) | ({"activations": records} if self._capture else {})
                first = False
            closing = self._closing()
        yield self._chunk(None, False) | closing

    def _steps(self, results: Iterator[Start | Step]) -> Iterator[Step]:
        for result in results:
            if isinstance(result, Start):
                self._start = result
                continue
            if result.token is not None and result.string is not None:
                self._tokens.append(result.token)
                self._strings.append(result.string)
            self._finish_reason = result.finish_reason
            self._interventions = result.interventions
            yield result

    def _take(self, step: Step) -> dict[str, list[Record]]:
        if self._keeping is None:
            return {}
        records = self._keeping.take(step)
        for hook_id, found in records.items():
            light = [{k: v for k, v in record.items() if k != "data"} | {"encoding": "none"} for record in found]
            self._seen.setdefault(hook_id, []).extend(light)
        return records

    def _chunk(self, text: str | None, first: bool) -> dict[str, Any]:
        finish_reason = self._finish_reason if text is None else None
        if not self._chat:
            return self._envelope("text_completion", {"text": text or ""}, finish_reason)
        delta = {} if text is None else {"content": text}
        return self._envelope(
            "chat.completion.chunk", {"delta": {"role": "assistant"} | delta if first else delta}, finish_reason
        )

    def _envelope(self, kind: str, said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **said, "finish_reason": finish_reason, "logprobs": None}
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model_id,
            "choices": [choice],
        }

    def _closing(self) -> dict[str, Any]:
        n_prompt, n_new = len(self._start.tokens), len(self._tokens)
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}
        if self._capture is None or self._keeping is None:
            return {"usage": usage}
        edited = {"interventions": self._interventions} if self._capture.interventions else {}
        receipts, tokens = self._receipts(), self._spelled()
        kept = self._keeping.finish(tokens, receipts, self._interventions, self._finish_reason)
        return {"usage": usage, "hooks": receipts, **edited, "tokens": tokens, **kept}

    def _receipts(self) -> dict[str, dict[str, Any]]:
        receipts = {hook_id: payload.receipt(self._seen.get(hook_id, [])) for hook_id in self._start.hook_ids}
        # The last token was never fed. A hook may keep positions that the text could have come to and did not.
        reached = len(self._start.tokens) + max(0, len(self._tokens) - 1)
        due = [hook_id for hook_id in receipts if self._start.due_from.get(hook_id, 0) < reached]
        silent = [hook_id for hook_id in due if not receipts[hook_id]["fired"]]
        if silent:
            raise ApiError(500, f"These hooks captured nothing: {', '.join(silent)}.", code="hook_not_fired")
        return receipts

    def _spelled(self) -> dict[str, Any]:
        """All tokens; the index in either list is the absolute position."""
        return {
            "ids": [*self._start.tokens, *self._tokens],
            "strings": [*self._start.strings, *self._strings],
            "prompt_length": len(self._start.tokens),
        }
