"""Other libraries on the same shape, each over the plain forward of the same model in its own framework.

Only those that are installed run. None is needed otherwise: ``pip install transformer-lens nnsight`` beside the engine.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from page import installed_version

NONE, RESIDUAL, TEN, PATTERNS = "none attached", "residual", "ten components", "patterns"
"""The kinds of capture, by which the table finds its rows."""

VOCABULARY = 8192


@dataclass
class Peer:
    """A library that runs: its plain forward, and what it captures."""

    name: str
    plain: Callable[[], object]
    captures: dict[str, Callable[[], object]]


def peers(layers: int, width: int, tokens: np.ndarray) -> tuple[list[Peer], list[str]]:
    """The peers that are installed, ready to run, and one sentence for each that is not.

    Args:
        tokens: ids [1, pos].
    """
    # Nothing is downloaded; set before any Hugging Face library is imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    found: list[Peer] = []
    missing: list[str] = []
    for package, module, make in [
        ("transformer-lens", "transformer_lens", _transformer_lens),
        ("nnsight", "nnsight", _nnsight),
        ("mlxterp", "mlxterp", _mlxterp),
    ]:
        if importlib.util.find_spec(module) is None:
            missing.append(f"{package} is not installed.")
            continue
        name = f"{package} {installed_version(package) or ''}".strip()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                peer = make(name, layers, width, tokens)
                for run in (peer.plain, *peer.captures.values()):
                    run()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            missing.append(f"{name} is installed and does not run as it is used here ({reason}).")
            continue
        found.append(peer)
    return found, missing


def _llama(layers: int, width: int) -> Any:
    """Hugging Face's llama of the shape of the engine's, with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        num_attention_heads=8,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    return LlamaForCausalLM(config).eval()


def _without_gradients(run: Callable[[], object]) -> Callable[[], object]:
    import torch

    return torch.no_grad()(run)


def _transformer_lens(name: str, layers: int, width: int, tokens: np.ndarray) -> Peer:
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    plain, hooked = _llama(layers, width), _llama(layers, width)
    # The bridge wants a tokenizer that lies in a folder; ids are given, so any will do.
    tokenizer = AutoTokenizer.from_pretrained(str(files("mlx_hooks") / "bundled" / "neuroscope-tiny"))
    bridge = TransformerBridge.boot_transformers("random-llama", hf_model=hooked, tokenizer=tokenizer, device="cpu")
    ids = torch.tensor(tokens)

    def names(*places: str) -> list[str]:
        return [f"blocks.{layer}.{place}" for layer in range(layers) for place in places]

    def capture(wanted: list[str]) -> Callable[[], object]:
        def run() -> None:
            _, cache = bridge.run_with_cache(ids, names_filter=wanted)
            missing = set(wanted) - set(cache.keys())
            if missing:
                raise RuntimeError(f"{min(missing)} was not captured")

        return _without_gradients(run)

    ten = ["hook_out", "attn.hook_out", "mlp.hook_out", "ln1.hook_out", "ln2.hook_out", "attn.q.hook_out"]
    ten += ["attn.k.hook_out", "attn.v.hook_out", "attn.hook_attn_scores", "attn.hook_pattern"]
    return Peer(
        name,
        _without_gradients(lambda: plain(ids).logits),
        {
            NONE: _without_gradients(lambda: bridge(ids)),
            RESIDUAL: capture(names("hook_out")),
            TEN: capture(["embed.hook_out", *names(*ten)]),
            PATTERNS: capture(names("attn.hook_pattern")),
        },
    )


def _nnsight(name: str, layers: int, width: int, tokens: np.ndarray) -> Peer:
    import nnsight
    import torch

    plain = _llama(layers, width)
    model = nnsight.NNsight(_llama(layers, width))
    ids = torch.tensor(tokens)

    def residual() -> None:
        with model.trace(ids):
            kept = nnsight.save([layer.output.save() for layer in model.model.layers])
        if len(kept) != layers or tuple(kept[0].shape) != (1, ids.shape[1], width):
            raise RuntimeError("the residual stream was not captured")

    return Peer(name, _without_gradients(lambda: plain(ids).logits), {RESIDUAL: _without_gradients(residual)})


def _mlxterp(name: str, layers: int, width: int, tokens: np.ndarray) -> Peer:
    import mlx.core as mx
    from mlxterp import InterpretableModel
    from random_llama import random_llama

    plain, hooked = random_llama(layers, width), random_llama(layers, width)
    model = InterpretableModel(hooked)
    ids = mx.array(tokens)

    def residual() -> None:
        # Every module's output is recorded in any case; the residual stream alone is evaluated.
        with model.trace(ids) as trace:
            pass
        mx.eval([trace.activations[f"model.model.layers.{layer}"] for layer in range(layers)])
        mx.eval(trace.activations["__model_output__"])

    return Peer(name, lambda: mx.eval(plain(ids)), {RESIDUAL: residual})
