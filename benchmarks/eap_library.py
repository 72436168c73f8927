"""The EAP-IG library (hannamw/EAP-IG, on torch and TransformerLens) on the bundled model, where it is installed.

It is given the very weights, prompts and points on the way, so its scores are to be ours.
"""

import importlib.util
import time
import warnings
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from page import installed_version

NEEDS = "It needs torch, TransformerLens before 4.0 (the last with HookedTransformer) and the library's package eap."


@dataclass
class Measured:
    """What the library gave.

    Args:
        name: with its version.
        scores: by the library's names of edges: of EAP, and of EAP-IG.
        plain_seconds: torch's plain forward pass of the same batch.
        seconds: of EAP, and of EAP-IG.
        steps: points of EAP-IG, those that the rule "left" has.
    """

    name: str
    scores: dict[str, dict[str, float]]
    plain_seconds: float
    seconds: dict[str, float]
    steps: int


def measure(tokens: np.ndarray, corrupted: np.ndarray, answers: np.ndarray, wrong: np.ndarray, steps: int) -> Any:
    """Measured, or a sentence that says why not.

    Args:
        tokens, corrupted: ids [batch, pos].
        answers, wrong: ids [batch].
    """
    for module in ("torch", "transformer_lens", "eap"):
        if importlib.util.find_spec(module) is None:
            return f"The EAP-IG library is not run: {module} is not installed. {NEEDS}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _measure(tokens, corrupted, answers, wrong, steps)
    except Exception as error:
        return f"The EAP-IG library does not run as it is used here ({type(error).__name__}: {error}). {NEEDS}"


def _measure(tokens: np.ndarray, corrupted: np.ndarray, answers: np.ndarray, wrong: np.ndarray, steps: int) -> Measured:
    import eap.attribute as attribute
    import torch
    from eap.graph import Graph

    model = _hooked_transformer()
    clean, other, right, false = (torch.tensor(each) for each in (tokens, corrupted, answers, wrong))
    rows = torch.arange(len(right))

    def metric(logits: Any, clean_logits: Any, lengths: Any, labels: Any) -> Any:
        return (logits[rows, -1, labels[0]] - logits[rows, -1, labels[1]]).sum()

    def tokenize(model: Any, inputs: Any, max_length: Any = None) -> tuple:
        ids = torch.stack(list(inputs))
        return ids, torch.ones_like(ids), torch.full((len(ids),), ids.shape[1]), ids.shape[1]

    # It takes texts, and has its scores on a GPU: here it takes ids, and has them on the CPU.
    attribute.tokenize_plus = tokenize
    attribute.torch = _OnCpu(torch)
    data = [(list(clean), list(other), (right, false))]
    plain = _seconds(lambda: model(clean))
    for switch in (model.set_use_attn_result, model.set_use_split_qkv_input, model.set_use_hook_mlp_in):
        switch(True)
    scores, seconds = {}, {}
    for name, run in (
        ("eap", attribute.get_scores_eap),
        ("eap-ig", lambda *args, **more: attribute.get_scores_eap_ig(*args, steps=steps, **more)),
    ):
        graph = Graph.from_model(model)
        run(model, graph, data, metric, quiet=True)
        started = time.perf_counter()
        found = run(model, graph, data, metric, quiet=True)
        seconds[name] = time.perf_counter() - started
        scores[name] = {
            edge.name: float(
                found[
                    graph.forward_index(edge.parent, attn_slice=False),
                    graph.backward_index(edge.child, qkv=edge.qkv, attn_slice=False),
                ]
            )
            for edge in graph.edges.values()
        }
    return Measured(f"EAP-IG {installed_version('eap') or ''}".strip(), scores, plain, seconds, steps)


class _OnCpu:
    """torch, whose zeros are on the CPU whatever is asked."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def zeros(self, *args: Any, **kwargs: Any) -> Any:
        return self._torch.zeros(*args, **kwargs | {"device": "cpu"})


def _seconds(run: Any, times: int = 10) -> float:
    import torch

    with torch.no_grad():
        run()
        found = []
        for _ in range(times):
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
    return float(np.median(found))


def _hooked_transformer() -> Any:
    """The bundled model as TransformerLens has it."""
    import json

    import torch
    from safetensors.torch import load_file
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    folder = files("mlx_hooks") / "bundled" / "neuroscope-tiny"
    sizes = json.loads((folder / "config.json").read_text())
    weights = {}
    for path in sorted(str(each) for each in folder.iterdir() if each.name.endswith(".safetensors")):
        weights |= {name: value.float() for name, value in load_file(path).items()}
    heads, width, vocabulary = sizes["num_attention_heads"], sizes["hidden_size"], sizes["vocab_size"]
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=sizes["num_hidden_layers"],
            d_model=width,
            n_ctx=sizes["max_position_embeddings"],
            d_head=sizes["head_dim"],
            n_heads=heads,
            d_mlp=sizes["intermediate_size"],
            d_vocab=vocabulary,
            act_fn="silu",
            normalization_type="RMS",
            final_rms=True,
            positional_embedding_type="rotary",
            rotary_dim=sizes["head_dim"],
            gated_mlp=True,
            eps=sizes["rms_norm_eps"],
            device="cpu",
        )
    )
    state = {
        "embed.W_E": weights["model.embed_tokens.weight"],
        "unembed.W_U": weights["lm_head.weight"].T,
        "unembed.b_U": torch.zeros(vocabulary),
        "ln_final.w": weights["model.norm.weight"],
    }
    for layer in range(sizes["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blocks.{layer}"
        for kind in "qkv":
            projection = weights[f"{ours}.self_attn.{kind}_proj.weight"].reshape(heads, -1, width)
            state[f"{theirs}.attn.W_{kind.upper()}"] = projection.transpose(1, 2)
        state[f"{theirs}.attn.W_O"] = weights[f"{ours}.self_attn.o_proj.weight"].T.reshape(heads, -1, width)
        for name, norm in (("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm")):
            state[f"{theirs}.{name}.w"] = weights[f"{ours}.{norm}.weight"]
        for name, projection in (("gate", "gate_proj"), ("in", "up_proj"), ("out", "down_proj")):
            state[f"{theirs}.mlp.W_{name}"] = weights[f"{ours}.mlp.{projection}.weight"].T
    # Its biases begin as 0, as ours are.
    model.load_state_dict({name: value.contiguous() for name, value in state.items()}, strict=False)
    return model
