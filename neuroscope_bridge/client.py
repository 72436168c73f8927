"""The Python client: every route of the server as a method, activations as numpy arrays."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, overload
from urllib.parse import quote

import numpy as np

from .connection import Connection
from .errors import NeuroScopeError, PayloadError, ResponseFormatError
from .events import EventStream
from .payload import dumps, encode_intervention, encode_vector, read_npy, read_safetensors, safetensors_buffers
from .replies import Reply, error_of, expect, read_body, with_arrays

Messages = Sequence[Mapping[str, Any]]
Hooks = Sequence[Mapping[str, Any]]
Interventions = Sequence[Mapping[str, Any]]
Vectors = Sequence[Mapping[str, Any]]
Prompts = Iterable[Mapping[str, Any]]
Indices = int | str | slice | Sequence[int]
ReadPositions = Indices | None
Token = int | str


class LMStudioNeuroScopeClient(Connection):
    """A NeuroScope server, from Python.

        with LMStudioNeuroScopeClient() as client:
            client.load_model("neuroscope-tiny")
            hooks = [{"layer_name": "transformer.h.1", "component": "residual", "hook_id": "r1"}]
            messages = [{"role": "user", "content": "hello"}]
            result = client.generate_with_activations(messages, hooks, max_tokens=5)
            result["choices"][0]["message"]["content"]
            result["activations"]["r1"][0]["data"].shape      # (1, prompt tokens, d_model)

    Connections are kept open between calls. Use one client per thread.

    Args:
        base_url: Where the server is, `http://127.0.0.1:8080` by default.
        timeout: Seconds that the server may stay silent before `ServerTimeoutError`. Without `stream` it is
            silent for the whole of a generation.
        api_key: The key that the server was started with, sent as a Bearer token.
        compress: Whether the server may compress its answers: worth it over a slow network, on the same machine it
            only costs time.

    Every method raises `ServerUnreachableError`, `ServerTimeoutError`, `NeuroScopeAPIError` (the server said
    no) or `ResponseFormatError` (the answer is not NeuroScope's), all of them `NeuroScopeError`.

    Raises:
        ValueError: `base_url` is no http or https URL or holds a password, `timeout` is not a number of seconds
            above 0 and at most 1,000,000, or `api_key` cannot stand in an HTTP header.
    """

    # -- server and models -----------------------------------------------------------------------

    def health(self) -> Reply:
        """What the server says about itself: `{"status": "healthy", ...}`."""
        return self._json("GET", "/health")

    def health_check(self) -> bool:
        """Whether a healthy server answers; False instead of an error where none does."""
        try:
            return self.health().get("status") == "healthy"
        except NeuroScopeError:
            return False

    def list_models(self) -> list[Reply]:
        """The loaded models, the one loaded last at the end: `[{"id": "neuroscope-tiny", ...}]`."""
        return cast("list[Reply]", self._field("GET", "/v1/models", "data", list))

    def load_model(self, model_path: str | os.PathLike[str], model_id: str | None = None, **options: Any) -> Reply:
        """Load a model into the server.

            client.load_model("neuroscope-tiny")
            # {'model_id': 'neuroscope-tiny', 'status': 'loaded', 'num_layers': 4, ...}

        Args:
            model_path: `neuroscope-tiny`, a folder that the server can read, or a Hugging Face id.
            model_id: The name to use in requests; by default the last part of the path.
            options: Further fields of the request; with `background=True` the reply is the job that loads it.
        """
        return self._json(
            "POST", "/v1/models/load", {"model_path": os.fspath(model_path), "model_id": model_id, **options}
        )

    def unload_model(self, model_id: str | None = None) -> Reply:
        """Unload a model, by default the one loaded last."""
        return self._json("DELETE", self._model_route(model_id))

    def model_info(self, model_id: str | None = None) -> Reply:
        """The configuration of a model, by default the one loaded last: num_layers, model_type and so on."""
        return self._json("GET", self._model_route(model_id))

    def hook_points(self, model_id: str | None = None) -> list[Reply]:
        """Everything that a model lets one capture, in forward order.

            client.hook_points()[0]["name"]      # 'hook_embed'

        Each has name, layer (None outside the blocks), component and axes.
        """
        route = f"{self._model_route(model_id)}/hook_points"
        return cast("list[Reply]", self._field("GET", route, "hook_points", list))

    def selftest(self, model_id: str | None = None, background: bool = False) -> Reply:
        """Prove on a loaded model that what is captured is what was computed.

            client.selftest()["passed"]          # True

        `checks` has each identity with its largest deviation, what is allowed and why; `untrusted` lists the hook
        points at which one does not hold. In the background the reply is the job, whose result this is in the end.
        """
        return self._json("POST", f"{self._model_route(model_id)}/selftest", {"background": background or None})

    def tokenize(self, text: str | None = None, *, messages: Messages | None = None, model: str | None = None) -> Reply:
        """The tokens of a text, or of a chat as its template writes it.

            client.tokenize("the cat sat")      # {'tokens': [5, 17, 90], 'token_strings': [...], 'count': 3}

        Raises:
            ValueError: both or neither of `text` and `messages`.
        """
        _require_one(text=text, messages=messages)
        return self._json("POST", "/v1/tokenize", {"text": text, "messages": messages, "model": model})

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids.

        Raises:
            ValueError: something in `tokens` is not a whole number.
        """
        body = {"tokens": _token_ids(tokens), "model": model}
        return cast(str, self._field("POST", "/v1/detokenize", "text", str, body))

    # -- generation ------------------------------------------------------------------------------

    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **options: Any) -> EventStream: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[False] = False, **options: Any) -> Reply: ...
    def chat(
        self,
        messages: Messages,
        max_tokens: int | None = None,
        temperature: float = 0.7,
        stream: bool = False,
        **options: Any,
    ) -> Reply | EventStream:
        """Answer a chat, in OpenAI's format.

            client.chat([{"role": "user", "content": "hello"}])["choices"][0]["message"]["content"]
            for event in client.chat(messages, stream=True):
                print(event["choices"][0]["delta"].get("content", ""), end="")

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`; a content may be a list of
                `{"type": "text", "text": "..."}`. Roles: system, developer, user, assistant.
            max_tokens: The most tokens to generate; None for the server's default, 100.
            temperature: 0 takes the likeliest token each time.
            stream: Return an `EventStream`, one event per token, instead of one reply.
            options: Further fields: model, top_p, top_k, min_p, seed, stop (a text or a list of them),
                repetition_penalty, frequency_penalty, presence_penalty, logit_bias (`{"17": -100}`: token ids and what
                is added to their logits), n (1 to 16 answers: number i is that of `seed + i` alone), logprobs with
                top_logprobs (0 to 20), stream_options (`{"include_usage": True}`: the usage as an event of its own,
                whose `choices` are empty).

        With `logprobs=True` a choice has `logprobs["content"]`: per token its text, its bytes and the natural log of
        the probability that the model itself gave it, before bias, penalties and temperature.
        """
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": temperature, **options}
        return self._generate("/v1/chat/completions", body, stream)

    @overload
    def complete(self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Any) -> EventStream: ...
    @overload
    def complete(self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Any) -> Reply: ...
    def complete(
        self,
        prompt: str | Sequence[int],
        max_tokens: int | None = None,
        temperature: float = 0.7,
        stream: bool = False,
        **options: Any,
    ) -> Reply | EventStream:
        """Continue a text, or token ids.

            client.complete("The capital of France is", max_tokens=1, temperature=0)["choices"][0]["text"]

        The other arguments are those of `chat`, save that `logprobs` is how many of the likeliest tokens to tell with
        each token, 0 to 5: `choices[0]["logprobs"]` then has `tokens`, `token_logprobs`, `top_logprobs` and
        `text_offset`, where each token begins in the text.
        """
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, **options}
        return self._generate("/v1/completions", body, stream)

    @overload
    def generate_with_activations(
        self,
        messages: Messages,
        activation_hooks: Hooks | None = None,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> EventStream: ...
    @overload
    def generate_with_activations(
        self,
        messages: Messages,
        activation_hooks: Hooks | None = None,
        *,
        stream: Literal[False] = False,
        **options: Any,
    ) -> Reply: ...
    def generate_with_activations(
        self,
        messages: Messages,
        activation_hooks: Hooks | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.7,
        stream: bool = False,
        activation_encoding: str = "base64",
        interventions: Interventions | None = None,
        **options: Any,
    ) -> Reply | EventStream:
        """Answer a chat and bring back what the hooks captured.

            hooks = [{"layer_name": "transformer.h.5", "component": "residual", "hook_id": "r5"}]
            result = client.generate_with_activations(messages, hooks, max_tokens=2)
            [record["data"].shape for record in result["activations"]["r5"]]
            # [(1, 10, 768), (1, 1, 768)]: the prompt, then each token that was fed back

        Args:
            messages: `[{"role": "user", "content": "..."}, ...]`.
            activation_hooks: Hook specs; None for the registered ones (`register_hooks`). `positions`, `heads` and
                `reduce` of a spec limit what is computed and sent: `{"hook_point": "blocks.*.attn.hook_z",
                "positions": "last", "heads": [0, 3]}`.
            max_tokens: 0 only reads the prompt.
            temperature: 0 takes the likeliest token each time.
            stream: Return an `EventStream`; each event has the activations of its step.
            activation_encoding: How arrays travel: `base64`, `json`, or `none` (records without data).
            interventions: Edits, made in this order before anything is captured. `values` and `vector` may be numpy
                arrays, `source` a record of an earlier reply or a list of them.
            options: Further fields: activation_dtype (`float32`, `float16`) and those of `chat`, save `n`.

        Returns:
            The reply, or the events, as sent, save that `data` of every record is a numpy array. With interventions
            the reply, or the last event, has a receipt for each: `result["interventions"][0]["norm_before"]`.
            `stack_records` joins the records of a hook.
        """
        body = {
            "messages": messages,
            "activation_hooks": activation_hooks,
            "activation_encoding": activation_encoding,
            "interventions": [encode_intervention(one) for one in interventions] if interventions else None,
            "max_tokens": max_tokens,
            "temperature": temperature,
            **options,
        }
        return self._generate("/v1/chat/completions/with_activations", body, stream)

    @overload
    def complete_with_activations(
        self,
        prompt: str | Sequence[int],
        activation_hooks: Hooks | None = None,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> EventStream: ...
    @overload
    def complete_with_activations(
        self,
        prompt: str | Sequence[int],
        activation_hooks: Hooks | None = None,
        *,
        stream: Literal[False] = False,
        **options: Any,
    ) -> Reply: ...
    def complete_with_activations(
        self,
        prompt: str | Sequence[int],
        activation_hooks: Hooks | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.7,
        stream: bool = False,
        activation_encoding: str = "base64",
        interventions: Interventions | None = None,
        **options: Any,
    ) -> Reply | EventStream:
        """Continue a text and bring back what the hooks captured.

            client.complete_with_activations("When Mary and John went to", hooks, max_tokens=0)["activations"]

        Arguments and result are those of `generate_with_activations`, with a text or token ids as `prompt`.
        """
        body = {
            "prompt": prompt,
            "activation_hooks": activation_hooks,
            "activation_encoding": activation_encoding,
            "interventions": [encode_intervention(one) for one in interventions] if interventions else None,
            "max_tokens": max_tokens,
            "temperature": temperature,
            **options,
        }
        return self._generate("/v1/completions/with_activations", body, stream)

    # -- hooks ----------------------------------------------------------------------------------

    def register_hooks(self, hooks: Hooks, model: str | None = None) -> list[str]:
        """Register hooks for the requests that name none of their own.

            client.register_hooks([{"layer_name": "transformer.h.5", "component": "mlp", "hook_id": "m5"}])
            # ['m5']

        Returns:
            The ids, those that the server made up included.
        """
        body = {"hooks": hooks, "model": model}
        return cast("list[str]", self._field("POST", "/v1/activations/hooks", "registered_hooks", list, body))

    def list_hooks(self, model: str | None = None) -> list[Reply]:
        """The registered hook specs."""
        return cast("list[Reply]", self._field("GET", "/v1/activations/hooks", "hooks", list, params={"model": model}))

    def clear_hooks(self, model: str | None = None) -> Reply:
        """Remove all registered hooks."""
        return self._json("DELETE", "/v1/activations/hooks", params={"model": model})

    def delete_hook(self, hook_id: str, model: str | None = None) -> Reply:
        """Remove one registered hook; an unknown id is a `NeuroScopeAPIError` with status 404."""
        return self._json("DELETE", f"/v1/activations/hooks/{quote(hook_id, safe='')}", params={"model": model})

    register_activation_hooks = register_hooks
    clear_activation_hooks = clear_hooks

    # -- captures --------------------------------------------------------------------------------

    def list_captures(self, limit: int = 100, after: str | None = None) -> list[Reply]:
        """The runs whose activations the server keeps, the newest first.

            client.list_captures()[0]["id"]      # 'cap-...'

        Args:
            limit: The most to list, up to 1000.
            after: The id of the last one of the part before.
        """
        params = {"limit": limit, "after": after}
        return cast("list[Reply]", self._field("GET", "/v1/captures", "data", list, params=params))

    def capture(self, capture_id: str) -> Reply:
        """What a capture holds: `tokens`, the hooks' receipts, and under `arrays` name, axes and shape of each."""
        return self._json("GET", f"/v1/captures/{quote(capture_id, safe='')}")

    def delete_capture(self, capture_id: str) -> Reply:
        """Delete a capture; an unknown id is a `NeuroScopeAPIError` with status 404."""
        return self._json("DELETE", f"/v1/captures/{quote(capture_id, safe='')}")

    def clear_captures(self) -> Reply:
        """Delete all captures."""
        return self._json("DELETE", "/v1/captures")

    @overload
    def capture_activations(
        self,
        capture_id: str,
        hook_id: str | None = None,
        positions: Indices | None = None,
        heads: Indices | None = None,
        layers: Indices | None = None,
        reduce: str | None = None,
        *,
        format: Literal["npy"],
        dtype: str = "float32",
        encoding: str = "base64",
        hook_point: str | None = None,
    ) -> np.ndarray: ...
    @overload
    def capture_activations(
        self,
        capture_id: str,
        hook_id: str | None = None,
        positions: Indices | None = None,
        heads: Indices | None = None,
        layers: Indices | None = None,
        reduce: str | None = None,
        *,
        format: Literal["json"],
        dtype: str = "float32",
        encoding: str = "base64",
        hook_point: str | None = None,
    ) -> dict[str, list[Reply]]: ...
    @overload
    def capture_activations(
        self,
        capture_id: str,
        hook_id: str | None = None,
        positions: Indices | None = None,
        heads: Indices | None = None,
        layers: Indices | None = None,
        reduce: str | None = None,
        format: Literal["safetensors"] = "safetensors",
        dtype: str = "float32",
        encoding: str = "base64",
        *,
        hook_point: str | None = None,
    ) -> dict[str, np.ndarray]: ...
    def capture_activations(
        self,
        capture_id: str,
        hook_id: str | None = None,
        positions: Indices | None = None,
        heads: Indices | None = None,
        layers: Indices | None = None,
        reduce: str | None = None,
        format: str = "safetensors",
        dtype: str = "float32",
        encoding: str = "base64",
        *,
        hook_point: str | None = None,
    ) -> dict[str, np.ndarray] | np.ndarray | dict[str, list[Reply]]:
        """Activations of a run that was kept, whole or in ranges.

            capture_id = client.generate_with_activations(messages, hooks, keep_capture=True)["capture_id"]
            client.capture_activations(capture_id, "r5", positions=slice(-3, None))
            # {'r5/blocks.5.hook_resid_post': array of shape (1, 3, 768)}

        The records of a hook point are one array: prompt and generated tokens as one sequence.

        Args:
            capture_id: The run's `capture_id`.
            hook_id: Those of one hook; None for all.
            positions: Absolute positions: an index, a list, a slice without step, or `"last"`, which is the prompt's
                last token and each generated one. Negative ones count from the end.
            heads: Query heads, alike; at k and v, the key-value heads that serve them.
            layers: Layers, alike.
            reduce: `mean`, `max` or `last` over the positions, or `norm` over the last axis, of what is selected.
            format: How they travel: `safetensors`, `npy` (which holds one array) or `json`.
            dtype: `float32`, or `float16` for half the bytes.
            encoding: How `json` carries arrays: `base64`, `json`, or `none`.
            hook_point: Those of one hook point, or of a glob such as `blocks.*.attn.hook_z`.

        Returns:
            With `safetensors` arrays by `{hook_id}/{hook_point}`, which share one buffer; with `npy` the array; with
            `json` records by hook id, whose `data` are arrays.

        Raises:
            ValueError: `positions`, `heads` or `layers` is something else.
        """
        route = f"/v1/captures/{quote(capture_id, safe='')}/activations"
        route += f"/{quote(hook_id, safe='')}" if hook_id is not None else ""
        ranges = {"positions": positions, "heads": heads, "layers": layers}
        params: Reply = {name: indices(value, name) for name, value in ranges.items() if value is not None}
        params |= {"reduce": reduce, "format": format, "dtype": dtype, "hook_point": hook_point}
        source = f"GET {route}"
        if format == "json":
            reply = with_arrays(self._large_json("GET", route, params=params | {"encoding": encoding}), source)
            return cast("dict[str, list[Reply]]", expect(reply, "activations", dict, source))
        response = self._send("GET", route, params=params, stream=True, accept=f"application/x-{format}")
        body = read_body(response, source, self.timeout)
        try:
            return read_npy(body) if format == "npy" else read_safetensors(body)[0]
        except PayloadError as error:
            raise ResponseFormatError(f"{source}: {error}") from error

    # -- analysis --------------------------------------------------------------------------------

    def logit_lens(
        self,
        prompt: str | Sequence[int] | None = None,
        messages: Messages | None = None,
        top_k: int = 5,
        position: int = -1,
        model: str | None = None,
        *,
        positions: ReadPositions = None,
        components: str | Sequence[str] | None = None,
        norm: str | None = None,
        apply_norm: bool | None = None,
        token_directions: str | Sequence[Token] | Sequence[Sequence[Token]] | None = None,
        apply_softmax: bool | None = None,
    ) -> Reply:
        """What the model would predict after each layer.

            lens = client.logit_lens("The capital of France is")
            [layer["predictions"][0]["token"] for layer in lens["layers"]]
            lens = client.logit_lens("The capital of France is", positions="all", components=["attn_out", "mlp_out"],
                                     norm="final", token_directions=[("Paris", "Rome")])
            [(row["layer"], row["hook_point"], row["position"], row["values"][0]) for row in lens["layers"]]

        Args:
            prompt: A text or token ids; or give `messages`.
            top_k: Predictions per layer.
            position: Token to read at; negative counts from the end.
            positions: In the place of `position`: "all", an index, a list, or a slice without a step.
            components: What is read of each layer, by default "resid_post"; "heads" is what each head adds.
            norm: The last norm's statistics: "own", of what it reads, or "final", as they are at the model's end.
            apply_norm: False reads without the last norm.
            token_directions: Tokens, ids or texts, whose logits each row has in "values"; of pairs, the differences.
            apply_softmax: Probabilities in the place of these logits.

        Raises:
            ValueError: both or neither of `prompt` and `messages`.
        """
        _require_one(prompt=prompt, messages=messages)
        body = {"prompt": prompt, "messages": messages, "top_k": top_k, "position": position, "model": model}
        more = {
            "positions": _read_positions(positions),
            "components": [components] if isinstance(components, str) else components and list(components),
            "norm": norm,
            "apply_norm": apply_norm,
            "token_directions": _directions(token_directions),
            "apply_softmax": apply_softmax,
        }
        return self._json("POST", "/v1/analysis/logit_lens", body | more)

    def direct_logit_attribution(
        self,
        prompt: str | Sequence[int] | None = None,
        tokens: Token | tuple[Token, Token] | None = None,
        messages: Messages | None = None,
        *,
        positions: ReadPositions = None,
        model: str | None = None,
    ) -> Reply:
        """What embedding, heads, MLPs and biases add to a token's logit, or to the difference of two.

            found = client.direct_logit_attribution("The capital of France is", ("Paris", "Rome"))
            sorted(found["contributions"], key=lambda part: -abs(part["values"][0]))[:5]

        Args:
            prompt: A text or token ids; or give `messages`.
            tokens: A token, id or text, or a pair of them.
            positions: "all", an index, a list, or a slice without a step; the last position by default.

        Raises:
            ValueError: both or neither of `prompt` and `messages`, or no `tokens`.
        """
        _require_one(prompt=prompt, messages=messages)
        if tokens is None:
            raise ValueError("tokens is a token or a pair of tokens")
        direction = list(tokens) if isinstance(tokens, tuple) else tokens
        body = {"prompt": prompt, "messages": messages, "positions": _read_positions(positions), "model": model}
        route = "/v1/analysis/direct_logit_attribution"
        return self._json("POST", route, body | {"token_directions": _directions([direction])})

    @overload
    def traits(
        self,
        prompt: str | Sequence[int] | None = None,
        messages: Messages | None = None,
        *,
        stream: Literal[True],
        vectors: Vectors | None = None,
        experiment: str | None = None,
        traits: Sequence[str] | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.7,
        interventions: Interventions | None = None,
        **options: Any,
    ) -> EventStream: ...
    @overload
    def traits(
        self,
        prompt: str | Sequence[int] | None = None,
        messages: Messages | None = None,
        *,
        stream: Literal[False] = False,
        vectors: Vectors | None = None,
        experiment: str | None = None,
        traits: Sequence[str] | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.7,
        interventions: Interventions | None = None,
        **options: Any,
    ) -> Reply: ...
    def traits(
        self,
        prompt: str | Sequence[int] | None = None,
        messages: Messages | None = None,
        *,
        stream: bool = False,
        vectors: Vectors | None = None,
        experiment: str | None = None,
        traits: Sequence[str] | None = None,
        max_tokens: int | None = None,
        temperature: float = 0.7,
        interventions: Interventions | None = None,
        **options: Any,
    ) -> Reply | EventStream:
        """How much of each trait the model shows at each token of a prompt, and of what it goes on to write.

            polite = {"name": "polite", "layer": 2, "vector": direction}       # numpy, as wide as the model
            found = client.traits("The capital of France is", vectors=[polite], max_tokens=5, temperature=0)
            [(row["token"], row["scores"]["polite"]) for row in found["scores"]]
            found["dynamics"]["polite"]["commitment_point"]
            with client.traits("The capital of France is", vectors=[polite], stream=True) as events:
                for event in events:
                    print(event["text"], [row["scores"]["polite"] for row in event["scores"]])

        Args:
            prompt: A text or token ids, read as they are; or give `messages`, which the model's chat template writes.
            stream: Return an `EventStream`: the prompt's scores, then an event per generated token, then the accounts.
            vectors: Directions of the residual stream, each with `name`, `layer` (or `hook_point`), `vector` (a list
                or a numpy array), and perhaps `threshold`.
            experiment: Watch the vectors that are stored for the traits of this experiment, in the folder that the
                server was started with; together with `vectors`, if both are given.
            traits: Of the experiment; all that it has by default.
            max_tokens: 0 only reads the prompt; None for the server's default, 100.
            temperature: 0 takes the likeliest token each time.
            interventions: Edits, as in `generate_with_activations`: steering, for one.
            options: Further fields: method and layer of the stored vectors, stored_chat (True: put the prompt, a text,
                as the prompts were that they were made of), normalize (False: scores are h.v in the
                place of h.v/|v|), dynamics (`{"threshold": 0.1, "relative": False, "stays_below": False}`), model, and
                those of `chat` that choose tokens: top_p, top_k, min_p, seed, stop, the penalties and logit_bias.

        Returns:
            The reply, or the events, as sent.

        Raises:
            ValueError: both or neither of `prompt` and `messages`.
            PayloadError: a vector that is none, or has numbers that are not finite.
        """
        _require_one(prompt=prompt, messages=messages)
        route = "/v1/analysis/traits"
        body = {
            "prompt": prompt,
            "messages": messages,
            "vectors": None if vectors is None else _vectors(vectors),
            "experiment": experiment,
            "traits": traits,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "interventions": [encode_intervention(one) for one in interventions] if interventions else None,
            "stream": stream,
            **options,
        }
        if stream:
            return EventStream(self._send("POST", route, body, stream=True), f"POST {route}", self.timeout)
        reply = self._large_json("POST", route, body)
        expect(reply, "scores", list, f"POST {route}")
        return reply

    def stored_traits(self, experiment: str | None = None) -> list[Reply]:
        """What `traits` can watch by name: the experiments in the server's folder, their traits and these's vectors.

            client.stored_traits()
            # [{'name': 'moods', 'traits': [{'name': 'calm', 'display_name': 'Calm', 'vectors': [...]}]}]

        Each of the vectors has `method` and `layer`.

        Args:
            experiment: One of them.
        """
        route, params = "/v1/analysis/traits", {"experiment": experiment}
        return cast("list[Reply]", self._field("GET", route, "experiments", list, params=params))

    # -- heads -----------------------------------------------------------------------------------

    def analyse_attention(
        self,
        prompt: str | Sequence[int] | None = None,
        messages: Messages | None = None,
        *,
        layers: Sequence[int] | None = None,
        model: str | None = None,
        background: bool = False,
        **options: Any,
    ) -> Reply:
        """What each head attends to in a prompt, and what flows from token to token.

            found = client.analyse_attention("When Mary and John went to the store , John gave a drink to")
            [(head["name"], head["pattern_type"]) for head in found["attention_heads"]]
            found["how_computed"]["classes"]["induction"]

        Args:
            prompt: A text or token ids; or give `messages`.
            layers: All by default; negative numbers count from the last.
            background: Answer the job at once; `wait_for_job` answers the reply.
            options: Further fields: threshold, broad, local, top_k (edges of each head), dependencies.

        Raises:
            ValueError: both or neither of `prompt` and `messages`.
        """
        _require_one(prompt=prompt, messages=messages)
        asked = prompt if prompt is None or isinstance(prompt, str) else _token_ids(prompt)
        body = {"prompt": asked, "messages": messages, "layers": _optional_ids(layers), "model": model, **options}
        return self._large_json("POST", "/v1/analysis/attention", body | {"background": background or None})

    def detect_heads(
        self,
        prompts: Iterable[str | Sequence[int]] | None = None,
        *,
        layers: Sequence[int] | None = None,
        model: str | None = None,
        background: bool = False,
        **options: Any,
    ) -> Reply:
        """Which heads attend to the previous token, look for what followed before, copy, and so on.

            found = client.detect_heads()
            max(found["heads"], key=lambda head: head["scores"]["induction"]["mean"])["name"]

        Args:
            prompts: Texts or token ids, in the place of random tokens that are said twice.
            layers: All by default.
            background: Answer the job at once; `wait_for_job` answers the reply.
            options: Further fields: sequences and length of the random tokens, copying, confidence, resamples, seed,
                batch_size.
        """
        rows = None if prompts is None else [row if isinstance(row, str) else _token_ids(row) for row in prompts]
        body = {"prompts": rows, "layers": _optional_ids(layers), "model": model, **options}
        return self._large_json("POST", "/v1/analysis/heads", body | {"background": background or None})

    def composition(
        self,
        *,
        layers: Sequence[int] | None = None,
        top: int | None = None,
        model: str | None = None,
        background: bool = False,
    ) -> Reply:
        """Which heads could read, with queries, keys or values, what earlier heads write: from the weights alone.

            client.composition(top=1)["strongest"]      # [{'edge': 'L0H1->L1H0<k>', 'score': 0.41, ...}]

        Args:
            layers: All by default.
            top: How many scores, the highest first; 50 by default.
            background: Answer the job at once; `wait_for_job` answers the reply.
        """
        body = {"layers": _optional_ids(layers), "top": top, "model": model, "background": background or None}
        return self._large_json("POST", "/v1/analysis/composition", body)

    # -- circuits --------------------------------------------------------------------------------

    def ablation(
        self,
        eval_data: Prompts,
        *,
        ablations: Sequence[str] | None = None,
        components: Sequence[str] | None = None,
        groups: str | Sequence[str | Sequence[str]] | None = None,
        metric: str | None = None,
        model: str | None = None,
        background: bool = False,
        **options: Any,
    ) -> Reply:
        """What a model loses without each of its components, or without groups of them.

            prompts = [{"clean": "The capital of France is", "answer": "Paris", "wrong": "Rome"}]
            found = client.ablation(prompts, components=["heads"], ablations=["zero"])
            found["components"][0]["ablations"]["zero"]["logit_difference_change"]["mean"]
            found = client.ablation(prompts, groups=[["L2H1"], ["L2H1", "L3 mlp"]])
            found["groups"]["zero"]["groups"][1]["values"]       # the metric of each prompt, without both

        Args:
            eval_data: Prompts with `clean` (a text or token ids) and `answer` (a token), and if wished `corrupted`, of
                as many tokens, and `wrong`.
            ablations: Of "zero", "mean" and "resample": all three by default, of groups "zero".
            components: Kinds of components, by default attention, mixers and MLPs: "heads", "attn_out", "mlp_out",
                "mixer_out", "side_out", "blocks".
            groups: Names of components, each group ablated together, in the place of `components`. A name alone is a
                group of one.
            metric: Of groups: "logit_difference", "logit", "probability", "log_probability", "loss" or "kl".
            background: Answer the job at once; `wait_for_job` answers the reply.
            options: Further fields: mean_over, confidence, resamples, seed, batch_size.

        Raises:
            ValueError: a prompt that is no mapping, or whose token ids are no whole numbers.
        """
        named = _groups(groups)
        body = {"ablations": ablations, "components": components, "groups": named, "metric": metric, **options}
        return self._causal("ablation", eval_data, model, background, body)

    def activation_patching(
        self,
        eval_data: Prompts,
        sweep: str | Sequence[Mapping[str, Any]] | None = None,
        *,
        cells: Sequence[Mapping[str, Any]] | None = None,
        groups: str | Sequence[str | Sequence[str]] | None = None,
        direction: str = "denoising",
        metric: str | None = None,
        model: str | None = None,
        background: bool = False,
        **options: Any,
    ) -> Reply:
        """What activations of the clean run bring back in the corrupted one, place by place.

            pairs = [{"clean": "The capital of France is", "corrupted": "The capital of Italy is",
                      "answer": "Paris", "wrong": "Rome"}]
            found = client.activation_patching(pairs, "layer x head")
            np.array(found["effects"]).shape                     # (4, 4): 1 is all of it, 0 nothing

        Args:
            eval_data: Prompts with `clean`, `corrupted`, `answer` and if wished `wrong`, as in `ablation`.
            sweep: "layer x position", which is the default, "layer x head", "layer x head x position" or "component".
                Or `cells`, which the engine takes here.
            cells: Places of one's own: `{"hook_point": "blocks.2.attn.hook_z", "heads": [1], "positions": [3]}`.
            groups: Names of components, each group patched together, as in `ablation`.
            direction: "denoising" puts the clean run's activations into the corrupted one, "noising" the other way.
            metric: As in `ablation`.
            background: Answer the job at once; `wait_for_job` answers the reply.
            options: Further fields: component (of sweeps over layers: "resid_pre", "z" and so on), components (of the
                sweep "component"), align ("start" or "end", for prompts of several lengths), method ("attribution"
                estimates all places at once by a gradient), batch_size.

        Raises:
            ValueError: cells given twice, a cell that is no mapping, and as `ablation`.
        """
        if sweep is not None and not isinstance(sweep, str):
            if cells is not None:
                raise ValueError("Give cells once: in the place of the sweep, or as cells.")
            cells = list(sweep)
            sweep = None
        places = None if cells is None else [_cell(cell) for cell in cells]
        put = {"sweep": sweep, "cells": places, "groups": _groups(groups)}
        body = {**put, "direction": direction, "metric": metric, **options}
        return self._causal("patching", eval_data, model, background, body)

    def path_patching(
        self,
        eval_data: Prompts,
        receivers: str | Sequence[str | Sequence[str]],
        *,
        senders: str | Sequence[str] | None = None,
        direction: str = "noising",
        metric: str | None = None,
        model: str | None = None,
        background: bool = False,
        **options: Any,
    ) -> Reply:
        """What one part of the model tells another directly: the receiver alone reads the other run's part of a sender.

            found = client.path_patching(pairs, ["L3H0<q>", "L3H0<k>", "L3H0<v>", "logits"])
            np.array(found["effects"])[found["axes"]["sender"].index("L2H1")]      # one per receiver

        Args:
            eval_data: As in `activation_patching`.
            receivers: Inputs ("L3H0<q>", "L1KV0<k>", "L1 mlp", "logits"), or a node for all that it reads: one, or
                several. Of a list in the list all read together.
            senders: "embed", "L0H1", "L0 mlp", one or several; all that are before some receiver by default.
            direction: "noising" tells what is lost, "denoising" what is regained.
            metric: As in `ablation`.
            background: Answer the job at once; `wait_for_job` answers the reply.
            options: Further fields: batch_size.
        """
        named = [receivers] if isinstance(receivers, str) else receivers
        read = [one if isinstance(one, str) else list(one) for one in named]
        write = [senders] if isinstance(senders, str) else senders
        body = {"receivers": read, "senders": write, "direction": direction, "metric": metric, **options}
        return self._causal("path_patching", eval_data, model, background, body)

    def edge_scores(
        self,
        eval_data: Prompts,
        method: str = "eap-ig",
        *,
        metric: str | None = None,
        model: str | None = None,
        background: bool = False,
        **options: Any,
    ) -> Reply:
        """How much each edge of the model's graph matters, by gradients or by exact runs.

            found = client.edge_scores(pairs, top=10)
            [(edge["edge"], edge["score"]) for edge in found["edges"]]      # [("L3H0->logits", -6.4), ...]

        Args:
            eval_data: As in `activation_patching`; `corrupted` is needed only where ablated edges carry it.
            method: "eap", "eap-ig" or "exact", a run per edge.
            metric: As in `ablation`.
            background: Answer the job at once; `wait_for_job` answers the reply.
            options: Further fields: ablation (what an ablated edge carries: "corrupted", "resample", "mean", "zero"),
                steps, rule, mean_over, seed, top (how many edges the reply lists), batch_size.
        """
        return self._causal("edges", eval_data, model, background, {"method": method, "metric": metric, **options})

    def find_circuit(
        self,
        eval_data: Prompts,
        method: str = "eap-ig",
        *,
        size: int | None = None,
        threshold: float | None = None,
        faithfulness: float | None = None,
        metric: str | None = None,
        model: str | None = None,
        background: bool = False,
        **options: Any,
    ) -> Reply:
        """Find the circuit that some prompts need, and judge it.

            found = client.find_circuit(pairs, faithfulness=0.9, formats=["neuroscope-circuit", "graphml"])
            found["nodes"]                                           # ['embed', 'L0H1', ...]
            found["validation"]["faithfulness"]["mean"]
            NeuroScopeActivationBridge().find_causal_circuits(found)

        Args:
            eval_data: As in `edge_scores`.
            method: "eap", "eap-ig" or "exact" scores, or "acdc", which needs `threshold`.
            size, threshold, faithfulness: One of them: as many of the strongest edges, those that score as much, or the
                fewest that reach it; a faithfulness of 0.9 by default.
            metric: As in `ablation`.
            background: Answer the job at once; `wait_for_job` answers the reply.
            options: Further fields: judge_by (other prompts to judge it by), formats ("neuroscope-circuit",
                "neuronpedia", "graphml"), name, random_circuits, and those of `edge_scores`.

        Returns:
            `circuit` as the engine saves and loads it, `nodes`, `validation`, and what `formats` asks for.
        """
        if (judge_by := options.get("judge_by")) is not None:
            options["judge_by"] = [_eval_prompt(one) for one in judge_by]
        limits = {"size": size, "threshold": threshold, "faithfulness": faithfulness}
        body = {"method": method, "metric": metric, **limits, **options}
        return self._causal("circuit", eval_data, model, background, body)

    def _causal(
        self, analysis: str, eval_data: Prompts, model: str | None, background: bool, body: Mapping[str, Any]
    ) -> Reply:
        prompts = [_eval_prompt(one) for one in eval_data]
        asked = {"eval_data": prompts, "model": model, "background": background or None, **body}
        return self._large_json("POST", f"/v1/analysis/{analysis}", asked)

    # -- activations captured during training ----------------------------------------------------

    def interpret_layers(self, model: str | None = None) -> Reply:
        """What was captured while a model trained, in the folder that the server was started with.

            client.interpret_layers()["shapes"]      # {'blocks.2.hook_resid_post': [10000, 128]}

        Returns:
            `layers`, `shapes` (rows, then the axes of a row), `steps`, and `available`: what could be captured of the
            loaded model, or of `model`.
        """
        return self._json("GET", "/interpret/layers", params={"model": model})

    def interpret(
        self,
        analysis_type: str,
        layer_name: str | int | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        model: str | None = None,
        background: bool = False,
    ) -> Reply:
        """Analyse what was captured while a model trained, or, by `circuit` and `causal`, a loaded model.

            found = client.interpret("neuron", "blocks.2.hook_resid_post")
            found["results"]["blocks.2.hook_resid_post"]["mean_activation"]
            job = client.interpret("sae", 2, {"steps": [200]}, background=True)
            client.wait_for_job(job["id"])["results"]

        Args:
            analysis_type: `sae`, `neuron`, `feature`, `circuit`, `causal`, `probe` or `heads`.
            layer_name: A captured layer, by any of its names; all that suit the analysis by default.
            config: Options of the analysis; besides, `eval_data` of `circuit` and `causal` (texts, token ids, or
                prompts with `clean` and `answer`), `labels` of `probe` (one per row, or by token id), `steps`.
            model: The model to run, the one loaded last by default.
            background: Answer the job at once; `wait_for_job` answers the reply.

        Returns:
            `analysis_type`, `layer_name`, `results` (by layer; of `circuit` and `causal`, of the model), `timestamp`.
        """
        body = {
            "analysis_type": analysis_type,
            "layer_name": None if layer_name is None else str(layer_name),
            "config": _config(config),
            "model": model,
            "background": background or None,
        }
        return self._large_json("POST", "/interpret", body)

    def interpret_upload(
        self,
        activations: str | os.PathLike[str] | Mapping[str, Any],
        analysis_type: str,
        layer_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        *,
        model: str | None = None,
        background: bool = False,
    ) -> Reply:
        """Analyse activations that you have.

            client.interpret_upload("activations.npz", "feature")["results"]
            client.interpret_upload({"layer1": values}, "neuron")["results"]["layer1"]

        Args:
            activations: A safetensors or npz file, such as a shard of captured activations, or arrays [row, ...] by
                layer. Among them `tokens`, `sequence` and `position` [row] may say of which tokens the rows are.
            layer_name: One of the layers; all by default.

        The other arguments and the reply are those of `interpret`; the reply has `filename` besides.

        Raises:
            OSError: the file cannot be read.
            PayloadError: an array that safetensors cannot hold.
        """
        fields = {
            "analysis_type": analysis_type,
            "layer_name": layer_name,
            "config": None if config is None else dumps(_config(config)).decode(),
            "model": model,
            "background": "true" if background else None,
        }
        route = "/interpret/upload"
        if isinstance(activations, Mapping):
            return self._form(route, fields, ("activations.safetensors", _safetensors(activations)))
        with Path(activations).open("rb") as file:
            return self._form(route, fields, (Path(activations).name, file))

    # -- jobs ------------------------------------------------------------------------------------

    def list_jobs(self) -> list[Reply]:
        """What the server works on, what waits, and what ended a while ago, the newest first. `job` shows a result."""
        return cast("list[Reply]", self._field("GET", "/v1/jobs", "data", list))

    def job(self, job_id: str) -> Reply:
        """How far a job has come: `status`, `fraction`, `message`, and at the end `result` or `error`."""
        return self._json("GET", f"/v1/jobs/{quote(job_id, safe='')}")

    def cancel_job(self, job_id: str) -> Reply:
        """Cancel a job at its next token; one that has ended stays as it is."""
        return self._json("DELETE", f"/v1/jobs/{quote(job_id, safe='')}")

    def wait_for_job(
        self, job_id: str, interval: float = 0.5, on_progress: Callable[[Reply], object] = lambda job: None
    ) -> Reply:
        """Wait until a job has ended; answers its result.

            job = client.load_model("a-large-one", background=True)
            client.wait_for_job(job["id"], on_progress=lambda job: print(job["message"]))

        Args:
            job_id: The `id` of the reply to what was asked for in the background.
            interval: Seconds between two questions.
            on_progress: Called with the job each time.

        Raises:
            NeuroScopeAPIError: it failed, or was cancelled.
        """
        while True:
            job = self.job(job_id)
            on_progress(job)
            if job.get("finished") is not None:
                break
            time.sleep(interval)
        if job.get("error") is not None:
            raise error_of(job, None, f"job {job_id}")
        return job.get("result") or {}

    def _model_route(self, model_id: str | None) -> str:
        if model_id is None:
            models = self.list_models()
            if not models:
                raise NeuroScopeError(f"No model is loaded at {self.base_url}: call load_model first.")
            model_id = expect(models[-1], "id", str, "GET /v1/models")
        return f"/v1/models/{quote(str(model_id), safe='')}"

    def _generate(self, route: str, body: Reply, stream: bool) -> Reply | EventStream:
        body["stream"] = stream
        if stream:
            return EventStream(self._send("POST", route, body, stream=True), f"POST {route}", self.timeout)
        reply = self._large_json("POST", route, body)
        expect(reply, "choices", list, f"POST {route}")
        return with_arrays(reply, f"POST {route}")


def _vectors(given: Any) -> list[Reply]:
    """As a request has them."""
    listed = [] if isinstance(given, str | Mapping) or not isinstance(given, Iterable) else list(given)
    if not listed or not all(isinstance(one, Mapping) for one in listed):
        odd = next((one for one in listed if not isinstance(one, Mapping)), None)
        kind = f"a list of {type(odd).__name__}" if listed else type(given).__name__
        raise PayloadError(f"vectors is a list of at least one {{'name', 'layer', 'vector'}}, got {kind}.")
    return [{**one, "vector": _vector(one.get("vector"))} for one in listed]


def _vector(value: Any) -> Any:
    """As a request has it; what is a record already stays as it is."""
    return value if value is None or isinstance(value, Mapping) else encode_vector(value)


def _config(given: Mapping[str, Any] | None) -> Reply | None:
    """As JSON has it, whose keys are texts: labels by token id have numbers.

    Raises:
        ValueError: a number that JSON does not have.
    """
    if given is None:
        return None
    for name, value in given.items():
        if isinstance(value, float | np.floating) and not np.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}.")
    config = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in given.items()}
    # Rows of token ids in a list, too.
    if isinstance(rows := config.get("eval_data"), list | tuple):
        config["eval_data"] = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    labels = config.get("labels")
    if isinstance(labels, Mapping):
        config["labels"] = {str(token): label for token, label in labels.items()}
    return config


def _safetensors(arrays: Mapping[str, Any]) -> bytes:
    """A file of the arrays: whole numbers that fit as int32, half precision as it is, all others as float32."""
    plain = {}
    for name, values in arrays.items():
        if str(getattr(values, "dtype", "")).endswith("bfloat16"):
            plain[str(name)] = _bfloat16_bits(values)
            continue
        array = np.asarray(values)
        if array.dtype.kind not in "fiub":
            raise PayloadError(f"Array {name!r} holds {array.dtype}: activations are real numbers.")
        is_index = array.dtype.kind in "iu" and (not array.size or -(2**31) <= array.min() <= array.max() < 2**31)
        kind = np.int32 if is_index else np.float16 if array.dtype == np.float16 else np.float32
        plain[str(name)] = array.astype(kind, copy=False)
    return b"".join(safetensors_buffers(plain, {}))


def _bfloat16_bits(values: Any) -> np.ndarray:
    """Of an array of MLX or another library, whose numbers NumPy does not have: uint16 of the same shape."""
    try:
        return np.frombuffer(memoryview(values).tobytes(), np.uint16).reshape(values.shape)
    except TypeError:
        return np.asarray(values).view(np.uint16)


def _token_ids(tokens: Iterable[Any]) -> list[int]:
    """Python's integers, from numpy's too."""
    ids = []
    for token in tokens:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise ValueError(f"tokens must be whole numbers, got {token!r}.")
        ids.append(operator.index(token))
    return ids


def _optional_ids(numbers: Iterable[Any] | None) -> list[int] | None:
    return None if numbers is None else _token_ids(numbers)


def _eval_prompt(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt whose token ids, in arrays too, are lists of Python's integers; what else it has stays."""

    def plain(name: str, value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        return _token_ids(value) if name in ("clean", "corrupted") else _token_ids([value])[0]

    if not isinstance(prompt, Mapping):
        raise ValueError(f"A prompt is a mapping with clean and answer, got {prompt!r}.")
    return {name: plain(name, value) for name, value in prompt.items()}


def _groups(given: str | Sequence[str | Sequence[str]] | None) -> list[list[str]] | None:
    """Lists of names; a name alone is a list of it."""
    if given is None:
        return None
    listed = [given] if isinstance(given, str) else given
    return [[group] if isinstance(group, str) else list(group) for group in listed]


def _cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell whose ranges of heads and positions are lists."""
    if not isinstance(cell, Mapping):
        raise ValueError(f"A cell is a mapping with hook_point, got {cell!r}.")
    return {name: list(value) if isinstance(value, range) else value for name, value in cell.items()}


def indices(value: Indices, name: str) -> str:
    """As an address has them: `indices(slice(2, None), "heads")` is `2:`."""
    if isinstance(value, str):
        return value
    if isinstance(value, slice) and value.step in (None, 1):
        return ":".join("" if end is None else str(operator.index(end)) for end in (value.start, value.stop))
    try:
        return ",".join(map(str, _token_ids(value if isinstance(value, Iterable) else [value])))
    except ValueError:
        raise ValueError(f"{name} is an index, a list of them or a slice without step, got {value!r}.") from None


def _read_positions(value: ReadPositions) -> Any:
    """As a request has them: `slice(2, None)` is `{"start": 2}`."""
    if isinstance(value, slice):
        if value.step not in (None, 1):
            raise ValueError(f"positions is 'all', an index, a list of them or a slice without step, got {value!r}.")
        ends = {"start": value.start, "stop": value.stop}
        return {name: operator.index(end) for name, end in ends.items() if end is not None} or "all"
    return value if value is None or isinstance(value, str | int) else [operator.index(one) for one in value]


def _directions(value: Any) -> list[Any] | None:
    """Tokens and pairs as plain JSON values; NumPy numbers may be among them."""
    if value is None:
        return None

    def plain(token: Any) -> Any:
        return token if isinstance(token, str) else operator.index(token)

    listed = [value] if isinstance(value, str) else value
    return [[plain(t) for t in one] if isinstance(one, tuple | list) else plain(one) for one in listed]


def _require_one(**given: Any) -> None:
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"Give exactly one of {' and '.join(given)}.")
