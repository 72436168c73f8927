"""The main job in one run: serve the bundled model, capture through the client, show what was found.

    make demo

Everything printed is computed here and now. Files go to demo_output/.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
from local_server import local_server
from tqdm import tqdm

from mlx_hooks.analysis import heads
from neuroscope_bridge import (
    LMStudioNeuroScopeClient,
    NeuroScopeActivationBridge,
    NeuroScopeError,
    generate_neuroscope_smalltalk_interface,
    stack_records,
)

MODEL = "neuroscope-tiny"
PROMPT = "When Mary and John went to the store , John gave a drink to"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the files")
    try:
        demo(parser.parse_args(argv).output)
    except (NeuroScopeError, OSError, RuntimeError) as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    return 0


def demo(output: Path) -> None:
    """Serve, capture, show, write to ``output``."""
    output.mkdir(parents=True, exist_ok=True)

    print(f"Starting a server with {MODEL} ...", flush=True)
    with local_server(MODEL) as url, LMStudioNeuroScopeClient(url) as client:
        info = client.model_info()
        n_layers, n_heads = info["num_layers"], info["num_heads"]
        print(f"{MODEL} at {url}: {n_layers} layers, {n_heads} heads, {info['d_model']} wide\n")
        show_completion(client, n_layers)
        show_lens(client)
        picture = show_heads(client, n_layers, output)
    # For the address of a server that is still there when the file is read: the default one.
    smalltalk = output / "LMStudioRESTClient.st"
    with LMStudioNeuroScopeClient() as default:
        smalltalk.write_text(generate_neuroscope_smalltalk_interface(default), encoding="ascii")
    print("\nThe server is stopped. Written:")
    print(f"  {picture.resolve()}   the attention pattern of that head")
    print(f"  {smalltalk.resolve()}   to file into a Pharo image; it talks to `make serve`")


def show_completion(client: LMStudioNeuroScopeClient, n_layers: int) -> None:
    """Generate while the residual stream and attention of every layer are captured, token by token."""
    hooks = NeuroScopeActivationBridge().create_hook_specs_for_circuit_analysis(n_layers)
    text, count = "", 0
    with (
        tqdm(total=8, desc="Capturing", unit="token") as progress,
        client.complete_with_activations(PROMPT, hooks, max_tokens=8, temperature=0, stop=".", stream=True) as events,
    ):
        for event in events:
            text += event["choices"][0]["text"]
            records = [record for found in event.get("activations", {}).values() for record in found]
            count += sum(record["data"].size for record in records)
            progress.update(1 if records else 0)
        # The sentence may end early; then the bar ends with it.
        progress.total = progress.n
    print(f"\nPrompt      {PROMPT}")
    print(f"Completion  {text.strip()}")
    print(f"Captured    {count:,} numbers at {len(hooks)} hooks, prompt and generated tokens\n")


def show_lens(client: LMStudioNeuroScopeClient) -> None:
    """What the model would say if it stopped after each layer."""
    print("Prediction after each layer (logit lens at the last token)")
    for row in client.logit_lens(PROMPT, top_k=3)["layers"]:
        best = "   ".join(f"{p['token'].strip():>10} {p['probability']:6.1%}" for p in row["predictions"])
        print(f"  layer {row['layer']}  {best}")


def show_heads(client: LMStudioNeuroScopeClient, n_layers: int, output: Path) -> Path:
    """Score every head on a repeated sequence of random words, and draw the strongest induction head."""
    words = PROMPT_WORDS.copy()
    random.Random(0).shuffle(words)
    prompt = " ".join(words + words)
    hooks = [
        {"layer_name": f"blocks.{layer}", "component": "attention_pattern", "hook_id": str(layer)}
        for layer in range(n_layers)
    ]
    reply = client.complete_with_activations(prompt, hooks, max_tokens=0)
    patterns = {int(hook_id): stack_records(records)[0] for hook_id, records in reply["activations"].items()}
    tokens, strings = reply["tokens"]["ids"], reply["tokens"]["strings"]

    induction = heads.ranked({i: heads.induction_scores(p, tokens) for i, p in patterns.items()})
    previous = heads.ranked({i: heads.previous_token_scores(p) for i, p in patterns.items()})
    print(f"\nHeads on a sequence of {len(words)} random words, said twice (share of attention that follows the rule)")
    print(f"  strongest induction heads       {'   '.join(map(str, induction[:3]))}")
    print(f"  strongest previous-token heads  {'   '.join(map(str, previous[:3]))}")

    best = induction[0]
    return draw_pattern(
        patterns[best.layer][best.head],
        strings,
        f"Layer {best.layer}, head {best.head}: induction score {best.score:.2f}",
        output / f"attention_L{best.layer}H{best.head}.png",
    )


# Words that the bundled model knows, in no order that it was taught.
PROMPT_WORDS = ["store", "France", "Mary", "drink", "mat", "Tom", "gave", "capital", "book", "dog", "school", "Berlin"]


def draw_pattern(pattern: np.ndarray, tokens: list[str], title: str, path: Path) -> Path:
    """Draw one attention pattern [query, key] with its tokens as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(pattern, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(tokens)), tokens, rotation=90)
    axes.set_yticks(range(len(tokens)), tokens)
    axes.set_xlabel("key: the token that is looked at")
    axes.set_ylabel("query: the token that looks")
    axes.set_title(title)
    figure.colorbar(image, label="attention", shrink=0.8)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    sys.exit(main())
