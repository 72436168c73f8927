"""Observers that tests use, and generation with a prompt in chunks."""

from typing import Any

import numpy as np

from mlx_hooks import HookedModel, InferenceHook
from mlx_hooks.activations import to_numpy
from mlx_hooks.generation import Sampling, generate_steps
from mlx_hooks.observers import Watched

PROMPT = [1, 5, 9, 3, 7]
LONG = list(range(1, 12))
STORY = "When Mary and John went to the store , John gave a drink to"


class Everything(InferenceHook):
    """Writes down every event, its arrays as NumPy's."""

    def __init__(self) -> None:
        super().__init__("everything")
        self.events: list[tuple[Any, ...]] = []
        self.attention: dict[tuple[int, int], list[tuple[np.ndarray, ...]]] = {}
        self.ffn: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.logits: list[np.ndarray] = []
        self.ids: list[int] = []
        self.tokens: list[str] = []
        self.state: dict[str, Any] = {}

    def on_generation_begin(self, prompt_tokens, state):
        self.events.append(("begin", prompt_tokens))
        self.state = dict(state)

    def on_generation_end(self, generated_tokens, state):
        self.events.append(("end", generated_tokens, state["finish_reason"]))

    def on_forward_begin(self, input_ids, position, state):
        self.events.append(("forward", position, state["phase"], state["step"], state["positions"]))
        self.ids += input_ids[0].tolist()
        assert state["token_ids"] == self.ids

    def on_forward_end(self, logits, position, state):
        self.events.append(("logits", position))
        self.logits.append(to_numpy(logits))

    def on_attention_computed(self, layer_idx, head_idx, attention_weights, query, key, value, tokens, position, state):
        self.events.append(("attention", layer_idx, head_idx, position))
        arrays = tuple(to_numpy(array) for array in (attention_weights, query, key, value))
        self.attention.setdefault((layer_idx, head_idx), []).append(arrays)
        assert len(tokens) == attention_weights.shape[-1]
        self.tokens = tokens

    def on_ffn_computed(self, layer_idx, ffn_input, ffn_output, tokens, position, state):
        self.events.append(("ffn", layer_idx, position))
        self.ffn.setdefault(layer_idx, []).append((to_numpy(ffn_input), to_numpy(ffn_output)))


class Passes(InferenceHook):
    """Has no event of attention."""

    def on_forward_begin(self, input_ids, position, state):
        self.data.append(position)


def in_chunks(model: HookedModel, prompt: list[int], hooks: list[InferenceHook], size: int, max_tokens: int) -> list:
    """Generated ids, with the prompt read in chunks of ``size``."""
    options = {"max_tokens": max_tokens, "sampling": Sampling(), "stop": [], "plan": model.resolve_hooks([])}
    watched = Watched(hooks, model.architecture)
    steps = generate_steps(model.instrument, None, prompt, prefill_step_size=size, watched=watched, **options)
    return [step.token for step in steps]
