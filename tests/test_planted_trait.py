"""Ground truth of traits: on a model with a planted trait, what is found is what the construction says."""

import numpy as np
import pytest
from planted_trait import FLAG, PlantedTrait, marked

from mlx_hooks import HookedModel, TraitVector, watch_traits

PLANTED = PlantedTrait()
EXACT = PlantedTrait(noise=0)
"""All of its stream is multiples of 1/16."""
LENGTH = float(np.linalg.norm(PLANTED.direction.astype(np.float64)))
PROMPT = "w7 w21 w3 w40 w7 w11 w100 w2"


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return PLANTED.hooked()


@pytest.fixture(scope="module")
def exact() -> HookedModel:
    return EXACT.hooked()


def planted_vector(layer: int = PLANTED.layer, trait: str = "marked") -> TraitVector:
    return TraitVector(trait, layer, "given", PLANTED.direction)


def random_vector(layer: int, seed: int) -> TraitVector:
    return TraitVector("random", layer, "given", np.random.default_rng(seed).normal(size=PLANTED.direction.size))


# The construction itself.


@pytest.mark.parametrize("planted", [PLANTED, EXACT, PlantedTrait(layer=0, n_layers=2, seed=5)], ids=["", "exact", "0"])
def test_every_hook_point_holds_what_the_construction_says(planted: PlantedTrait) -> None:
    model = planted.hooked()
    assert not model.untrusted
    assert (planted.direction != 0).sum() > 25, "the direction is no unit axis"
    for text in [PROMPT, marked(PROMPT, 2), marked(marked(PROMPT, 2), 5), *planted.prompts(3, marked=True, seed=1)]:
        _, cache = model.run_with_cache(text)
        for name, expected in planted.closed_form(text).items():
            np.testing.assert_allclose(cache.numpy(name)[0], expected, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("planted", "rounding"), [(EXACT, 0), (PLANTED, 2e-5)], ids=["exact", "disturbed"])
def test_a_prompt_and_its_marked_twin_differ_by_the_direction_and_nothing_else(
    planted: PlantedTrait, rounding: float
) -> None:
    model = planted.hooked()
    plain, twin = (model.run_with_cache(text)[1] for text in (PROMPT, marked(PROMPT, 3)))
    follows = np.arange(9)[:, None] >= 4  # <bos> is in front
    for layer in range(planted.n_layers):
        for sublayer, point in enumerate(("resid_pre", "resid_mid", "resid_post")):
            difference = twin.numpy((point, layer))[0] - plain.numpy((point, layer))[0]
            assert difference[4, FLAG] == 1
            difference[4, FLAG] = 0
            if (layer, sublayer) < (planted.layer, 1):
                assert not difference.any(), f"{point} of layer {layer} tells the two apart"
            else:
                np.testing.assert_allclose(difference, follows * planted.direction, rtol=0, atol=rounding)


def test_a_story_is_told_to_its_end() -> None:
    story = PlantedTrait(story=(0.5, 1, -2))
    result = story.hooked().generate("w1 W2 go", max_tokens=9, temperature=0)
    assert (result.text.strip(), result.finish_reason) == ("s1 s2 s3", "stop")


# Following a trait, and steering.


def test_the_scores_that_are_followed_are_those_of_the_closed_form(model: HookedModel) -> None:
    text = marked(PROMPT, 2)
    layers = (1, 2, 3)
    steps = list(watch_traits(model, text, [planted_vector(layer) for layer in layers], max_tokens=6, seed=3))
    assert [step.phase for step in steps] == ["prompt"] + 6 * ["response"]
    said = " ".join([text, *(token.strip() for step in steps[1:] for token in step.tokens)])
    scores = np.concatenate([step.scores for step in steps])
    for column, layer in zip(scores.T, layers, strict=True):
        np.testing.assert_allclose(column, PLANTED.scores(said, layer), atol=1e-4)
    # The mark is read in the planting layer, and what follows it keeps the trait to the end of the text.
    assert scores[3:, 1].mean() - scores[:3, 1].mean() == pytest.approx(LENGTH, abs=2.5)


@pytest.mark.parametrize("coefficient", [0.5, -2.0, 3.0])
@pytest.mark.parametrize("layer", range(EXACT.n_layers))
def test_steering_moves_the_projection_by_exactly_the_coefficient_times_the_square(
    exact: HookedModel, layer: int, coefficient: float
) -> None:
    vector = planted_vector(layer)
    watched = [planted_vector(i) for i in range(EXACT.n_layers)]
    square = float((vector.vector.astype(np.float64) ** 2).sum())

    def dots(**options: object) -> np.ndarray:
        steps = watch_traits(exact, marked(PROMPT, 3), watched, max_tokens=0, normalize=False, **options)
        return np.concatenate([step.scores for step in steps])

    moved = dots(interventions=[vector.intervention(coefficient)]) - dots()
    # No layer reads the direction, so every later one has as much of it; no earlier one has any.
    expected = np.broadcast_to(np.arange(EXACT.n_layers) >= layer, moved.shape) * coefficient * square
    np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize("seed", range(4))
def test_steering_by_any_vector_moves_its_projection_within_rounding(model: HookedModel, seed: int) -> None:
    layer, coefficient = seed % PLANTED.n_layers, float(np.random.default_rng(seed).normal())
    vector = random_vector(layer, seed)

    def scores(normalize: bool, **options: object) -> np.ndarray:
        (step,) = watch_traits(model, PROMPT, [vector], max_tokens=0, normalize=normalize, **options)
        return step.scores[:, 0]

    steered = {"interventions": [vector.intervention(coefficient)]}
    dots, along = (scores(normalize, **steered) - scores(normalize) for normalize in (False, True))
    np.testing.assert_allclose(dots, coefficient * vector.norm**2, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(along, coefficient * vector.norm, rtol=1e-5, atol=1e-4)


def test_steering_one_position_moves_that_one(exact: HookedModel) -> None:
    vector = planted_vector()
    steered = [vector.intervention(2.0, positions=4)]
    (plain,) = watch_traits(exact, PROMPT, [vector], max_tokens=0, normalize=False)
    (moved,) = watch_traits(exact, PROMPT, [vector], max_tokens=0, normalize=False, interventions=steered)
    square = float((vector.vector.astype(np.float64) ** 2).sum())
    np.testing.assert_array_equal((moved.scores - plain.scores)[:, 0], 2 * square * (np.arange(9) == 4))
