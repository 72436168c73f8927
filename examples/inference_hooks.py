"""Watch a generation: attention as edges, a hook of your own, the attention graph. The model is bundled.

    python examples/inference_hooks.py --output attention

The guide is docs/inference_hooks.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_hooks import (
    ActivationHook,
    HookedModel,
    HookError,
    InferenceHook,
    create_attention_extraction_hook,
    run_generation,
)

PROMPT = "When Mary and John went to the store , John gave a drink to"


class Confidence(InferenceHook):
    """Keeps how probable the model found its first choice, at each token that it generated."""

    def __init__(self) -> None:
        super().__init__("confidence")

    def on_forward_end(self, logits: mx.array, position: int, state: dict[str, Any]) -> None:
        best = mx.softmax(logits[0, -1].astype(mx.float32)).max().item()
        self.data.append((state["tokens"][-1], best))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("attention"), help="folder for the files")
    try:
        watch(parser.parse_args(argv).output)
    except (HookError, OSError) as error:
        sys.stderr.write(f"example: {error}\n")
        return 1
    return 0


def watch(output: Path) -> None:
    """Generate with three hooks, show what they saw, write the graph to ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    model = HookedModel.from_pretrained("neuroscope-tiny")
    attention, activations, confidence = create_attention_extraction_hook(0.1), ActivationHook(), Confidence()
    _, text = run_generation(
        model, model.tokenizer, PROMPT, max_new_tokens=5, temperature=0, hooks=[attention, activations, confidence]
    )
    print(f"Generated            {text}")
    print(f"Attention            {len(attention.attention_data)} records, {attention.n_edges} edges above 0.1")
    print(f"MLPs                 {len(activations.activations)} records")
    print(f"Sure of the answer   {dict(confidence.data)['to']:.1%}\n")

    print("Most attended, as key: weights of all edges from a token, all layers and heads")
    for position, weight in list(attention.attention_received_as_key().items())[:5]:
        print(f"  {position:3} {attention.tokens[position]:8} {weight:6.1f}")
    answer = attention.prompt_length - 1
    print(f"\nWhat the last token of the prompt ({attention.tokens[answer]!r}, position {answer}) attends to")
    for edge in attention.get_token_attention_summary(position=answer)["given_attention"][:5]:
        print(f"  {edge['to']:8} {edge['weight']:.2f}  layer {edge['layer']}, head {edge['head']}")

    attention.save_json(output / "attention.json")
    attention.save_graphml(output / "attention.graphml")
    graph = attention.to_networkx(by="token")
    print(f"\nThe graph by text: {graph.number_of_nodes()} nodes, {graph.number_of_edges()} edges")
    print(f"Written: {output / 'attention.json'}, {output / 'attention.graphml'}")


if __name__ == "__main__":
    sys.exit(main())
