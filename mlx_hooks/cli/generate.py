"""``neuroscope generate``: text, with what attended to what, and what the MLPs did."""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HookError
from ..observers import ActivationHook, AttentionExtractionHook, InferenceHook
from ..sampling import Sampling, whole_number
from .output import check_writable

if TYPE_CHECKING:
    from ..model import HookedModel

FORMATS = (".json", ".graphml")
SHOWN_TOKENS = 10


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate text, and show and save who attended to whom",
        description="Generate text, and show and save who attended to whom.",
    )
    parser.add_argument("model", help="name or folder in mlx-lm's layout, or neuroscope-tiny")
    parser.add_argument("--prompt", required=True, help="the text to go on from")
    parser.add_argument("--max-tokens", type=int, default=50, help="most tokens to generate (default: 50)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among so many; 0 for all (default: 50)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--attention-threshold", type=float, default=0.1, help="keep weights above it (default: 0.1)")
    parser.add_argument("--save-attention", type=Path, metavar="FILE", help="write the attention: .json or .graphml")
    parser.add_argument("--track-activations", action="store_true", help="show how much each MLP reads and adds")
    parser.add_argument("--no-hooks", action="store_true", help="the text alone")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from .. import HookedModel, run_generation

    _check(options)
    attention = None if options.no_hooks else AttentionExtractionHook(options.attention_threshold)
    activations = ActivationHook() if options.track_activations else None
    model = HookedModel.from_pretrained(options.model)
    if options.save_attention is None and not any(p.component == "pattern" for p in model.hook_points.values()):
        attention = None
    _tell_length(model, options.prompt)
    hooks: list[InferenceHook] = [hook for hook in (attention, activations) if hook is not None]
    try:
        with _without_warnings_of_tokenizers():
            _, text = run_generation(
                model,
                model.tokenizer,
                options.prompt,
                max_new_tokens=options.max_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                seed=options.seed,
                hooks=hooks,
                show_progress=True,
            )
        print(text)
        if attention is not None:
            _show_attention(attention)
        if activations is not None:
            _show_activations(activations)
        if attention is not None and options.save_attention is not None:
            _save(attention, options.save_attention)
    except KeyboardInterrupt:
        sys.stderr.write("neuroscope: interrupted; nothing was written\n")
        return 130
    return 0


def _check(options: argparse.Namespace) -> None:
    """Say before the model is loaded what would fail after it."""
    whole_number("max_tokens", options.max_tokens)
    Sampling(temperature=options.temperature, top_k=options.top_k, seed=options.seed).check()
    target = options.save_attention
    if options.no_hooks and (target is not None or options.track_activations):
        other = "--save-attention" if target is not None else "--track-activations"
        raise HookError(f"--no-hooks and {other} exclude each other: what is not observed cannot be told.")
    if target is None:
        return
    if target.suffix not in FORMATS:
        raise HookError(f"--save-attention writes {' or '.join(FORMATS)}, by the file's name; got {str(target)!r}.")
    check_writable(target)


@contextmanager
def _without_warnings_of_tokenizers() -> Iterator[None]:
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _tell_length(model: "HookedModel", prompt: str) -> None:
    """Say that a prompt is longer than what the model was made for, in the place of the tokenizer's own warning."""
    length, limit = len(model.hf_tokenizer.encode(prompt, verbose=False)), model.cfg.max_positions
    if limit is not None and length > limit:
        sys.stderr.write(
            f"neuroscope: the prompt has {length} tokens; the model was made for at most {limit}, beyond which its "
            "text is not to be relied on\n"
        )


def _show_attention(hook: AttentionExtractionHook) -> None:
    print(f"\n{hook.n_edges} attention weights above {hook.threshold:g}, in {len(hook.attention_data)} records")
    print("\nTokens that received the most attention (as key)")
    for token, total in list(hook.attention_received_as_key("token").items())[:SHOWN_TOKENS]:
        print(f"  {token!r:20} {total:10.2f}")
    print("\nEdges by layer and head")
    for name, stats in hook.layer_head_stats().items():
        count, mean, most = (stats[key] for key in ("edge_count", "avg_weight", "max_weight"))
        print(f"  {name:8} {count:6} edges, mean {mean:.3f}, max {most:.3f}")


def _show_activations(hook: ActivationHook) -> None:
    norms = hook.norms()
    print("\nMLPs: length of what they read and add, mean over positions")
    for layer in np.unique(norms["layer"]).tolist():
        own = norms["layer"] == layer
        print(f"  layer {layer:<4} {norms['input_norm'][own].mean():10.3f} {norms['output_norm'][own].mean():10.3f}")


def _save(hook: AttentionExtractionHook, target: Path) -> None:
    if target.suffix == ".json":
        hook.save_json(target)
    else:
        hook.save_graphml(target)
    print(f"\nWritten: {target}")
