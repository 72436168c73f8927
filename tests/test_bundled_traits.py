"""Traits that the bundled model really has tell apart prompts that its training never showed.

In every pair of classes the last token is one and the same, so what the last token's embedding says of the trait is
nothing: a layer that tells the classes apart there has read it from the text.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from neuroscope_tiny import corpus

from mlx_hooks import HookedModel, TraitVector, extract_vectors
from mlx_hooks.analysis.traits.prompts import Chat, render
from mlx_hooks.analysis.traits.vectors import METHODS

Prompts = Callable[[str, int], list[str]]
"""So many prompts of a split, "train" or "held_out"."""


def giving(split: str, count: int) -> list[str]:
    """Somebody gives something to somebody: "When Mary and John went to ... , John gave a drink to Mary ." """
    return [sample.text for sample in corpus.indirect_object_samples(count, 0, split)]


def adding(split: str, count: int) -> list[str]:
    """Sums: "3 + 4 = 7 ." """
    return [sample.text for sample in random.Random(0).sample(corpus.sum_samples(split), count)]


def received_by(women: bool) -> Prompts:
    """A woman and a man, and one gives something to the other: the class is who is to receive it, and comes next."""

    def prompts(split: str, count: int) -> list[str]:
        generator = random.Random(f"{women} {split}")
        made: list[str] = []
        while len(made) < count:
            woman, man = generator.choice(corpus.WOMEN), generator.choice(corpus.MEN)
            if corpus.is_held_out_pair(woman, man) == (split == "held_out"):
                first, second = generator.sample([woman, man], 2)
                template = corpus.INDIRECT_OBJECT_TEMPLATES[len(made) % len(corpus.INDIRECT_OBJECT_TEMPLATES)]
                place, thing = generator.choice(corpus.PLACES), generator.choice(corpus.OBJECTS)
                giver = man if women else woman
                made.append(template.format(a=first, b=second, s=giver, place=place, object=thing))
        return made

    return prompts


def capital_questions(split: str, count: int) -> list[str]:
    questions = [
        template.format(country=country)
        for country in corpus.COUNTRIES
        for template in corpus.CAPITAL_QUESTIONS
        if corpus.is_held_out_capital(country, template) == (split == "held_out")
    ]
    return random.Random(0).sample(questions, count)


def sum_questions(split: str, count: int) -> list[str]:
    operands = range(corpus.LARGEST_OPERAND + 1)
    pairs = [(x, y) for x in operands for y in operands if corpus.is_held_out_sum(x, y) == (split == "held_out")]
    generator = random.Random(0)
    return [generator.choice(corpus.SUM_QUESTIONS).format(x=x, y=y) for x, y in generator.sample(pairs, count)]


def states(model: HookedModel, prompts: list[str], chat: Chat) -> dict[int | str, np.ndarray]:
    """The last token's embedding, the embeddings' mean, and what leaves each layer there, [prompt, d_model] each."""
    points = {layer: f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)}
    found: dict[int | str, list[np.ndarray]] = {key: [] for key in ("embedding", "words", *points)}
    for prompt in prompts:
        _, cache = model.run_with_cache(render(model, prompt, chat), ["hook_embed", *points.values()])
        embedded = cache.numpy("hook_embed")[0]
        found["embedding"].append(embedded[-1])
        found["words"].append(embedded.mean(0))
        for layer, point in points.items():
            found[layer].append(cache.numpy(point)[0, -1])
    return {key: np.array(rows, dtype=np.float64) for key, rows in found.items()}


def halfway_accuracy(training: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of held-out rows on the right side of the plane halfway between the classes' means; on it is a half."""
    direction = training[0].mean(0) - training[1].mean(0)
    middle = (training[0].mean(0) + training[1].mean(0)) @ direction / 2
    sides = np.concatenate([held_out[0] @ direction - middle, middle - held_out[1] @ direction])
    return float(((sides > 0) + 0.5 * (sides == 0)).mean())


def right(vector: TraitVector, held_out: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of held-out rows that the vector and its threshold put right, in float64."""
    assert vector.threshold is not None
    unit = vector.vector.astype(np.float64) / np.linalg.norm(vector.vector.astype(np.float64))
    above = [rows @ unit > vector.threshold for rows in held_out]
    return float(np.concatenate([above[0], ~above[1]]).mean())


@pytest.mark.parametrize(
    ("positive", "negative", "chat", "count", "layer", "methods"),
    [
        pytest.param(giving, adding, Chat(False), 40, 0, METHODS, id="giving against sums"),
        pytest.param(capital_questions, sum_questions, Chat(True), 28, 1, METHODS, id="retrieval against construction"),
        # Both classes have the same words: the last layer alone knows who is to come next.
        pytest.param(received_by(True), received_by(False), Chat(False), 160, 3, ("probe",), id="a woman or a man"),
    ],
)
def test_a_trait_is_told_on_prompts_that_nobody_saw(
    tiny: HookedModel, positive: Prompts, negative: Prompts, chat: Chat, count: int, layer: int, methods: Sequence[str]
) -> None:
    training, held_out = ([kind(split, count) for kind in (positive, negative)] for split in ("train", "held_out"))
    last = {render(tiny, prompt, chat)[-1] for prompts in (*training, *held_out) for prompt in prompts}
    assert len(last) == 1, "the last token alone would tell the classes apart"
    vectors = extract_vectors(tiny, *training, trait="trait", held_out=held_out, chat=chat)
    seen, new = ([states(tiny, prompts, chat) for prompts in split] for split in (training, held_out))
    bare = halfway_accuracy(tuple(rows["embedding"] for rows in seen), tuple(rows["embedding"] for rows in new))
    assert bare == 0.5
    for vector in vectors:
        own = right(vector, tuple(rows[vector.layer] for rows in new))
        assert vector.metadata["held_out_accuracy"] == pytest.approx(own, abs=0.02)
        if vector.layer == layer and vector.method in methods:
            assert own > 0.95, f"{vector.name}: {own}"
