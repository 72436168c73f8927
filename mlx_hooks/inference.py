"""``run_generation``: a model, a prompt and observers in one call."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from .errors import HookError
from .model import HookedModel
from .observers import InferenceHook

_DEVICES = {"cpu": mx.cpu, "gpu": mx.gpu, "mps": mx.gpu, "cuda": mx.gpu, "metal": mx.gpu}


def run_generation(
    model: HookedModel | nn.Module,
    tokenizer: Any,
    prompt_text: str,
    device: Any = None,
    max_new_tokens: int = 50,
    temperature: float = 1.0,
    top_k: int | None = None,
    hooks: Iterable[InferenceHook] | None = None,
    show_progress: bool | None = None,
    **options: Any,
) -> tuple[list[int], str]:
    """Generate from a prompt, with observers.

        hook = create_attention_extraction_hook(threshold=0.1)
        ids, text = run_generation(model, model.tokenizer, "The capital of France is", max_new_tokens=5, hooks=[hook])

    Args:
        model: a :class:`HookedModel`, or any model loaded by mlx-lm.
        tokenizer: mlx-lm's, or anything with ``encode`` and ``decode``; None for that of a HookedModel.
        prompt_text: must encode to at least one token.
        device: where MLX computes: None (its default), "cpu", "gpu" (also "mps", "cuda"), or an MLX device. Memory is
            shared, so nothing is moved.
        max_new_tokens: most tokens to generate; an end token ends the text before.
        temperature: 1 draws from the model's own distribution, 0 takes the most probable token.
        top_k: draw among this many of the most probable tokens; None for all.
        hooks: see :class:`InferenceHook`.
        show_progress: a bar on standard error; None where that is a terminal.
        options: any other argument of ``HookedModel.generate``: ``seed``, ``stop``, ``interventions``, ``hook_errors``;
            not ``capture``, since activations are not answered.

    Returns:
        All ids, those of the prompt first, and the text that they spell without special tokens.
    """
    _check_options(options)
    hooked = model if isinstance(model, HookedModel) else HookedModel(model)
    tokenizer = _usable(hooked.tokenizer if tokenizer is None else tokenizer)
    if tokenizer is not hooked.tokenizer:
        # The caller's model keeps its own.
        hooked = copy(hooked)
        hooked.tokenizer = tokenizer
    if not isinstance(prompt_text, str):
        raise HookError(f"prompt_text is a text, got {type(prompt_text).__name__}.", field="prompt_text")
    prompt = [int(token) for token in tokenizer.encode(prompt_text)]
    options |= {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": 0 if top_k is None else top_k}
    ids = list(prompt)
    with computing_on(device), tqdm(total=max_new_tokens, unit="token", disable=_hidden(show_progress)) as progress:
        for step in hooked.generate_steps(prompt, hooks=hooks or (), **options):
            if step.token is not None:
                ids.append(step.token)
                progress.update()
    return ids, decoded(tokenizer, ids)


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what would be overwritten, or come to nothing."""
    if "max_tokens" in options:
        raise HookError("run_generation takes max_new_tokens, not max_tokens: give that alone.", field="max_tokens")
    if "capture" in options:
        raise HookError("run_generation answers ids and text only: capture with model.generate.", field="capture")


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """The text of ids, without special tokens where the tokenizer can leave them out."""
    try:
        return tokenizer.decode(ids, skip_special_tokens=True)
    except TypeError:
        return tokenizer.decode(ids)


def _hidden(show_progress: bool | None) -> bool | None:
    # tqdm takes None for "unless it is a terminal".
    return None if show_progress is None else not show_progress


@contextmanager
def computing_on(device: Any) -> Iterator[None]:
    """Compute on a device for the duration of a block.

    Args:
        device: None (MLX's default), "cpu", "gpu" (also "mps", "cuda", "metal"), or an MLX device.

    Raises:
        HookError: for what is no device, and for one that this MLX does not have.
    """
    if device is None:
        yield
        return
    name = str(device).partition(":")[0].lower()
    found = device if isinstance(device, mx.Device | mx.DeviceType) else _DEVICES.get(name)
    if found is None:
        raise HookError(f"device is None, {', '.join(map(repr, _DEVICES))} or an MLX device, got {device!r}.")
    if not mx.is_available(found):
        raise HookError(f"This MLX cannot compute on {device!r}: give 'cpu', or None for its default.", field="device")
    with mx.stream(found):
        yield


def _usable(tokenizer: Any) -> Any:
    """A tokenizer as generation needs it: mlx-lm's own, or another one with the little that it lacks."""
    for needed in ("encode", "decode"):
        if not callable(getattr(tokenizer, needed, None)):
            raise HookError(f"The tokenizer has no {needed}: give one with encode and decode, got {tokenizer!r}.")
    return tokenizer if hasattr(tokenizer, "detokenizer") else _Adapted(tokenizer)


class _Adapted:
    """A tokenizer with ``encode`` and ``decode`` and what mlx-lm's have besides."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        end = getattr(tokenizer, "eos_token_id", None)
        self.eos_token_ids = set() if end is None else {end}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    @property
    def detokenizer(self) -> "_Detokenizer":
        """A new one for each generation."""
        return _Detokenizer(self._tokenizer.decode)


class _Detokenizer:
    """Text that became certain, token by token: what ends in a part of a character waits for the rest of it."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._said = 0
        self._final = False

    def add_token(self, token: int) -> None:
        self._ids.append(token)

    def finalize(self) -> None:
        self._final = True

    @property
    def last_segment(self) -> str:
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and not self._final:
            return ""
        segment, self._said = text[self._said :], len(text)
        return segment
