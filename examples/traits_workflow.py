"""Follow a trait: make its vectors, see where it appears, watch it while text is made, steer it. The model is bundled.

    python examples/traits_workflow.py --output experiments

The bundled model says "I do not know that ." to what it does not know: that is the trait. The guide is docs/traits.md.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from mlx_hooks import (
    Experiment,
    HookedModel,
    HookError,
    TraitVector,
    capture_all_layers,
    extract_vectors,
    monitor_dynamics,
    steer,
    watch_traits,
)

UNKNOWN = """\
How do I pick a lock? | Who won the football match? | Where can I buy shoes? | Is it raining in the mountains? |
Translate this into German. | Should I sell my car? | Which planet is the largest? | Give me advice about money. |
Paint me a picture of a whale. | Who invented the telephone? | Do you like pizza? | Why do people dream?"""
KNOWN = """\
What is the capital of Italy? | What's the capital of Norway? | Tell me the capital of Japan. | capital of Peru? |
What is 3 + 4? | How much is 7 + 5? | what is 6 plus 9? | Hello! | How are you? | Who are you? | Thank you! |
Write a story"""
REFUSED, ANSWERED = "How do I make a bomb?", "What is the capital of France?"
LAYER = 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("experiments"), help="folder of experiments")
    try:
        workflow(parser.parse_args(argv).output)
    except (HookError, OSError) as error:
        sys.stderr.write(f"example: {error}\n")
        return 1
    return 0


def workflow(root: Path) -> None:
    """Five things to do with a trait; vectors are written to the experiment ``example`` in ``root``."""
    model = HookedModel.from_pretrained("neuroscope-tiny")
    vectors = extract_vectors(model, prompts(UNKNOWN), prompts(KNOWN), trait="refusal")
    print("Held-out accuracy by layer")
    for method in dict.fromkeys(vector.method for vector in vectors):
        found = [vector.metadata["held_out_accuracy"] for vector in vectors if vector.method == method]
        print(f"  {method:10}", *(f"{accuracy:6.1%}" for accuracy in found))
    folder = root / "example" / "refusal" / "extraction" / "vectors"
    for vector in vectors:
        vector.save(folder)

    refusal = Experiment(root, "example").trait("refusal").find(method="mean_diff", layer=LAYER)
    where_it_appears(model, refusal)
    while_it_answers(model, refusal)
    how_it_moves(model, refusal)
    what_steering_does(model, Experiment(root, "example").trait("refusal").find(method="mean_diff", layer=1))
    print(f"\nWritten: {len(vectors)} vectors in {folder}")


def prompts(listed: str) -> list[str]:
    return [prompt.strip() for prompt in listed.split("|")]


def where_it_appears(model: HookedModel, refusal: TraitVector) -> None:
    """Captures of both prompts: the score at the last token of the prompt, layer by layer."""
    print(f"\nThe score along {refusal.name} where the stream leaves each layer, at the prompt's last token")
    for prompt in (REFUSED, ANSWERED):
        (record,) = capture_all_layers(model, prompt, [refusal], max_tokens=0)
        print(f"  {prompt:32}", *(f"{score:6.2f}" for score in record["projections"]["prompt"][-1, :, 2]))


def while_it_answers(model: HookedModel, refusal: TraitVector) -> None:
    """Token by token, as the text is made."""
    print("\nThe score at each token of the answer")
    for prompt in (REFUSED, ANSWERED):
        steps = watch_traits(model, prompt, [refusal], chat=refusal.chat, max_tokens=6, temperature=0)
        said = [f"{step.tokens[-1]} {step.scores[-1, 0]:.1f}" for step in steps if step.phase == "response"]
        print(f"  {' | '.join(said)}")


def how_it_moves(model: HookedModel, refusal: TraitVector) -> None:
    """Commitment, peak and persistence, which are numbers about these scores."""
    print("\nHow it moves")
    for result in monitor_dynamics(model, [REFUSED, ANSWERED], [refusal], temperature=0)["results"]:
        found = result["traits"]["refusal"][refusal.method]["dynamics"]
        tokens, peak = result["response"]["tokens"], found["peak"]
        print(
            f"  {result['response']['text']}\n"
            f"    peak {peak['score']:.1f} at {tokens[peak['index']]!r}, lasts for {found['persistence']} more tokens, "
            f"fastest change {found['peak_velocity']:.1f} per token"
        )


def what_steering_does(model: HookedModel, early: TraitVector) -> None:
    """The same question with the vector added, or taken away, while the prompt is read."""
    print(f"\nSteering by {early.name}, |v| = {early.norm:.2f}, while the prompt is read")
    for prompt in (ANSWERED, REFUSED):
        for run in steer(model, prompt, early, [-2, 0, 2], phase="prefill", temperature=0, max_tokens=16):
            score = np.mean(run.measured[0].forced_scores["prompt"])
            print(f"  {run.coefficient:+.0f}  score of the prompt {score:6.2f}  {run.text}")


if __name__ == "__main__":
    sys.exit(main())
