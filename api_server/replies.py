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
from .logprobs import TokenScore, chat_logprobs, text_logprobs
from .schemas.requests import CaptureRequest, ChatRequest, GenerationRequest

Record = dict[str, Any]


class _Choice:
    """What is known of one of the answers: its tokens, their spelling, and how it ended."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.strings: list[str] = []
        self.finish_reason: str | None = None

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def add(self, step: Step) -> None:
        if step.token is not None and step.string is not None:
            self.tokens.append(step.token)
            self.strings.append(step.string)
        self.finish_reason = step.finish_reason


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
        self._scored = request.n_logprobs is not None
        self._include_usage = request.include_usage
        self._start = Start([], [], [])
        self._choices = [_Choice() for _ in range(request.n)]
        # Records without their data: receipts need no more, and a long stream is not kept in memory.
        self._seen: dict[str, list[Record]] = {}
        self._interventions: list[Record] = []

    def whole(self, results: Iterator[Start | Step]) -> dict[str, Any]:
        """One object with all text and all activations."""
        texts: list[list[str]] = [[] for _ in self._choices]
        scores: list[list[TokenScore]] = [[] for _ in self._choices]
        activations: dict[str, list[Record]] = {}
        with self._keeping or nullcontext():
            for step in self._steps(results):
                texts[step.choice].append(step.text)
                scores[step.choice] += [step.score] if step.score else []
                records = self._take(step)
                if self._keeping is not None and self._keeping.too_large:
                    activations = self._seen
                    continue
                for hook_id, found in records.items():
                    activations.setdefault(hook_id, []).extend(found)
            closing = self._closing(self._usage())
        choices = []
        for index, choice in enumerate(self._choices):
            text = "".join(texts[index])
            said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choices.append(self._choice(index, said, choice.finish_reason, scores[index]))
        body = self._envelope("chat.completion" if self._chat else "text_completion", choices)
        return body | ({"activations": activations} if self._capture else {}) | closing

    def events(self, results: Iterator[Start | Step]) -> Iterator[dict[str, Any]]:
        """One object per step that has something to tell, and one per choice with its finish reason.

        The last of these has the accounts, save that the usage comes after it where that was asked for.
        """
        usage_later = {"usage": None} if self._include_usage else {}
        with self._keeping or nullcontext():
            for step in self._steps(results):
                records = self._take(step)
                first = self._choices[step.choice].n_tokens <= 1
                if first or step.text or step.score or self._capture:
                    yield self._said(step, first) | ({"activations": records} if self._capture else {}) | usage_later
                if step.finish_reason and step.choice < len(self._choices) - 1:
                    yield self._finished(step.choice) | usage_later
            usage = self._usage()
            closing = self._closing(usage)
        yield self._finished(len(self._choices) - 1) | closing | usage_later
        if self._include_usage:
            yield self._envelope(self._event_kind, []) | {"usage": usage}

    def _steps(self, results: Iterator[Start | Step]) -> Iterator[Step]:
        for result in results:
            if isinstance(result, Start):
                self._start = result
                continue
            self._choices[result.choice].add(result)
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

    def _said(self, step: Step, first: bool) -> dict[str, Any]:
        scores = [step.score] if step.score else []
        if not self._chat:
            return self._event(self._choice(step.choice, {"text": step.text}, None, scores))
        role = {"role": "assistant"} if first else {}
        return self._event(self._choice(step.choice, {"delta": role | {"content": step.text}}, None, scores))

    def _finished(self, index: int) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._event(self._choice(index, said, self._choices[index].finish_reason))

    @property
    def _event_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _event(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._envelope(self._event_kind, [choice])

    def _choice(
        self, index: int, said: dict[str, Any], finish_reason: str | None, scores: list[TokenScore] | None = None
    ) -> dict[str, Any]:
        shape = chat_logprobs if self._chat else text_logprobs
        logprobs = shape(scores) if self._scored and scores is not None else None
        return {"index": index, **said, "finish_reason": finish_reason, "logprobs": logprobs}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model_id,
            "choices": choices,
        }

    def _usage(self) -> dict[str, int]:
        n_prompt, n_new = len(self._start.tokens), sum(choice.n_tokens for choice in self._choices)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}

    def _closing(self, usage: dict[str, int]) -> dict[str, Any]:
        if self._capture is None or self._keeping is None:
            return {"usage": usage}
        edited = {"interventions": self._interventions} if self._capture.interventions else {}
        receipts, tokens = self._receipts(), self._spelled()
        kept = self._keeping.finish(tokens, receipts, self._interventions, self._choices[0].finish_reason)
        return {"usage": usage, "hooks": receipts, **edited, "tokens": tokens, **kept}

    def _receipts(self) -> dict[str, dict[str, Any]]:
        receipts = {hook_id: payload.receipt(self._seen.get(hook_id, [])) for hook_id in self._start.hook_ids}
        # The last token was never fed. A hook may keep positions that the text could have come to and did not.
        reached = len(self._start.tokens) + max(0, self._choices[0].n_tokens - 1)
        due = [hook_id for hook_id in receipts if self._start.due_from.get(hook_id, 0) < reached]
        silent = [hook_id for hook_id in due if not receipts[hook_id]["fired"]]
        if silent:
            raise ApiError(500, f"These hooks captured nothing: {', '.join(silent)}.", code="hook_not_fired")
        return receipts

    def _spelled(self) -> dict[str, Any]:
        """All tokens; the index in either list is the absolute position."""
        (choice,) = self._choices
        return {
            "ids": [*self._start.tokens, *choice.tokens],
            "strings": [*self._start.strings, *choice.strings],
            "prompt_length": len(self._start.tokens),
        }
