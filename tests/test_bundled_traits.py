"""Traits of the bundled model tell apart prompts that its training never showed.

In every pair of classes the last token is one and the same, so what the last token's embedding says of the trait is
nothing: a layer that tells the classes apart there has read it from the text. To read it need not take a trained
model: where the classes have other words, any attention carries them to the last token. So the same is asked of a
model of the same weights in random order, which knows nothing, and of the mean of the words' embeddings.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from neuroscope_tiny import corpus
from sklearn.linear_model import LogisticRegression

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


def adding_up_to(parity: int) -> Prompts:
    """Sums, 1 for odd ones: "3 plus 4 is". An operand's own parity says nothing, and so does no word alone."""

    def prompts(split: str, count: int) -> list[str]:
        operands = range(corpus.LARGEST_OPERAND + 1)
        made = [
            template.format(x=x, y=y)
            for template in corpus.SUM_TEMPLATES
            if template.endswith(" is")
            for x in operands
            for y in operands
            if (x + y) % 2 == parity and corpus.is_held_out_sum(x, y) == (split == "held_out")
        ]
        return random.Random(0).sample(made, min(count, len(made)))

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
    """The mean of the embeddings, and what leaves each layer at the last token, [prompt, d_model] each."""
    points = {layer: f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)}
    found: dict[int | str, list[np.ndarray]] = {key: [] for key in ("words", *points)}
    for prompt in prompts:
        _, cache = model.run_with_cache(render(model, prompt, chat), ["hook_embed", *points.values()])
        found["words"].append(cache.numpy("hook_embed")[0].mean(0))
        for layer, point in points.items():
            found[layer].append(cache.numpy(point)[0, -1])
    return {key: np.array(rows, dtype=np.float64) for key, rows in found.items()}


def accuracy_of_words(training: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of held-out rows that a regression puts right, hardly held back."""
    sides = [np.repeat([1, 0], [len(rows) for rows in split]) for split in (training, held_out)]
    regression = LogisticRegression(C=1e3, max_iter=3000).fit(np.concatenate(training), sides[0])
    return float(regression.score(np.concatenate(held_out), sides[1]))


def right(vector: TraitVector, held_out: tuple[np.ndarray, np.ndarray]) -> float:
    """Share of held-out rows that the vector and its threshold put right, in float64."""
    assert vector.threshold is not None
    unit = vector.vector.astype(np.float64) / np.linalg.norm(vector.vector.astype(np.float64))
    above = [rows @ unit > vector.threshold for rows in held_out]
    return float(np.concatenate([above[0], ~above[1]]).mean())


@dataclass(frozen=True)
class Trait:
    """Two classes of prompts; at this layer these methods tell them apart, in a model that was trained."""

    positive: Prompts
    negative: Prompts
    chat: Chat
    count: int
    layer: int
    methods: Sequence[str] = METHODS

    def split(self, name: str) -> tuple[list[str], list[str]]:
        return self.positive(name, self.count), self.negative(name, self.count)

    def vectors(self, model: HookedModel) -> list[TraitVector]:
        held_out = self.split("held_out")
        return extract_vectors(model, *self.split("train"), trait="trait", held_out=held_out, chat=self.chat)

    def words(self, model: HookedModel) -> float:
        """Accuracy on held-out prompts of the mean of the words' embeddings."""
        splits = [[states(model, prompts, self.chat)["words"] for prompts in self.split(s)] for s in corpus.SPLITS]
        return accuracy_of_words(*map(tuple, splits))


OTHER_WORDS = {
    "giving against sums": Trait(giving, adding, Chat(False), 40, layer=0),
    "retrieval against construction": Trait(capital_questions, sum_questions, Chat(True), 28, layer=1),
}
"""The classes have other words: these are found in the model, but say little of what it has learned."""

LEARNED = {
    # Who is named twice gives, the other is to receive: known to the last layer alone, and not to all methods: of
    # held-out prompts mean_diff puts 92% right, ica 61%.
    "a woman or a man": Trait(received_by(True), received_by(False), Chat(False), 160, 3, ("probe", "gradient")),
    # What has to be computed. The sources of ica are numbers rather than classes of them: 80% here.
    "an even or an odd sum": Trait(
        adding_up_to(0), adding_up_to(1), Chat(False), 160, 3, ("probe", "mean_diff", "gradient")
    ),
}
"""The last token knows this in a trained model alone."""


@pytest.fixture(scope="module")
def permuted() -> HookedModel:
    """The bundled model with every tensor's numbers in a random order: it knows nothing."""
    model = HookedModel.from_pretrained("neuroscope-tiny")
    order = np.random.default_rng(0)

    def mixed(weight: mx.array) -> mx.array:
        return mx.array(order.permutation(np.array(weight).reshape(-1)).reshape(weight.shape))

    model.model.update(tree_map(mixed, model.model.parameters()))
    mx.eval(model.model.parameters())
    return model


def each(traits: dict[str, Trait]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trait", [pytest.param(trait, id=name) for name, trait in traits.items()])


@each(OTHER_WORDS | LEARNED)
def test_a_trait_is_told_on_prompts_that_nobody_saw(tiny: HookedModel, trait: Trait) -> None:
    held_out = trait.split("held_out")
    prompts = [*trait.split("train"), *held_out]
    last = {render(tiny, prompt, trait.chat)[-1] for kind in prompts for prompt in kind}
    assert len(last) == 1, "the last token alone would tell the classes apart"
    new = [states(tiny, kind, trait.chat) for kind in held_out]
    for vector in trait.vectors(tiny):
        own = right(vector, tuple(rows[vector.layer] for rows in new))
        assert vector.metadata["held_out_accuracy"] == pytest.approx(own, abs=0.02)
        if vector.layer == trait.layer and vector.method in trait.methods:
            assert own > 0.95, f"{vector.name}: {own}"


@each(LEARNED)
def test_what_was_learned_is_not_told_by_a_model_that_knows_nothing(permuted: HookedModel, trait: Trait) -> None:
    for vector in trait.vectors(permuted):
        assert vector.metadata["held_out_accuracy"] < 0.8, vector.name


@each(OTHER_WORDS)
def test_other_words_are_told_by_a_model_that_knows_nothing(permuted: HookedModel, trait: Trait) -> None:
    assert max(vector.metadata["held_out_accuracy"] for vector in trait.vectors(permuted)) > 0.95


@each(OTHER_WORDS | LEARNED)
def test_words_alone_tell_every_trait_but_what_has_to_be_computed(tiny: HookedModel, trait: Trait) -> None:
    """Even who is to receive: the other is named twice."""
    if trait is LEARNED["an even or an odd sum"]:
        assert trait.words(tiny) < 0.6
    else:
        assert trait.words(tiny) > 0.95
