"""Ground truth of traits: on a model with a planted trait, what is found is what the construction says."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
from planted_trait import FLAG, PlantedTrait, marked

from mlx_hooks import (
    HookedModel,
    TraitVector,
    capture_all_layers,
    capture_single_layer,
    extract_vectors,
    monitor_dynamics,
    steer,
    watch_traits,
)
from mlx_hooks.analysis.traits.vectors import METHODS

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


def test_a_steered_answer_is_measured_by_the_shift_that_it_has_to_have(exact: HookedModel) -> None:
    vector = planted_vector()
    runs = steer(exact, PROMPT, vector, [-2.0, 0.0, 1.5], measured=[planted_vector(i) for i in range(4)], max_tokens=6)
    for run in runs:
        said = " ".join([PROMPT, *(token.strip() for token in run.tokens)])
        for layer, found in enumerate(run.measured):
            moved = run.coefficient * LENGTH if layer >= EXACT.layer else 0.0
            assert found.forced_shift == pytest.approx(moved, abs=1e-4)
            # What it said is read as the closed form has it, and as much further along as was added.
            own = np.concatenate([found.scores[part] for part in ("prompt", "response")])
            np.testing.assert_allclose(own, EXACT.scores(said, layer) + moved, atol=1e-4)


# Making vectors.


@dataclass(frozen=True)
class Classes:
    """Prompts with and without the trait to make vectors of, and others to judge them by."""

    training: tuple[list[str], list[str]]
    held_out: tuple[list[str], list[str]]
    planted: PlantedTrait = PLANTED

    @cached_property
    def vectors(self) -> dict[tuple[str, int], TraitVector]:
        made = extract_vectors(self.planted.hooked(), *self.training, trait="marked", held_out=self.held_out)
        return {(vector.method, vector.layer): vector for vector in made}

    @cached_property
    def states(self) -> list[np.ndarray]:
        """Of the held-out prompts, [prompt, layer, d_model] in float64, by the closed form."""
        return [self._states(texts) for texts in self.held_out]

    def _states(self, texts: list[str]) -> np.ndarray:
        values = [self.planted.closed_form(text) for text in texts]
        layers = range(self.planted.n_layers)
        return np.array([[each[f"blocks.{i}.hook_resid_post"][-1] for i in layers] for each in values])

    def accuracy(self, vector: TraitVector) -> float:
        """The share of held-out prompts that it puts right."""
        direction = vector.vector.astype(np.float64)
        above, below = (rows[:, vector.layer] @ direction / np.linalg.norm(direction) for rows in self.states)
        return float(np.concatenate([above > vector.threshold, below <= vector.threshold]).mean())


COUNT, HELD_OUT = 150, 200
# What is put right by chance is binomially distributed: four standard deviations.
CHANCE = 4 * np.sqrt(0.25 / (2 * HELD_OUT))


@pytest.fixture(scope="module")
def classes() -> Classes:
    """Prompts with the trait against prompts without it."""
    texts = [[PLANTED.prompts(n, marked=is_marked, seed=n) for is_marked in (True, False)] for n in (COUNT, HELD_OUT)]
    return Classes(*map(tuple, texts))


@pytest.fixture(scope="module")
def shuffled() -> Classes:
    """The control: either class is half marked, half not."""

    def half(n: int, seed: int) -> list[str]:
        return [text for is_marked in (True, False) for text in PLANTED.prompts(n // 2, marked=is_marked, seed=seed)]

    return Classes(*((half(n, n + 1), half(n, n + 2)) for n in (COUNT, HELD_OUT)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", range(PLANTED.layer, PLANTED.n_layers))
def test_every_method_recovers_the_direction_from_the_planting_layer_on(
    classes: Classes, method: str, layer: int
) -> None:
    vector = classes.vectors[method, layer]
    assert vector.score(PLANTED.direction) / LENGTH > 0.95
    assert classes.accuracy(vector) > 0.95
    # The class boundary lies between the classes' scores.
    above, below = (vector.score(rows[:, layer]) for rows in classes.states)
    assert below.mean() + 0.25 * LENGTH < vector.threshold < above.mean() - 0.25 * LENGTH


def test_the_difference_of_the_means_is_as_long_as_the_direction(classes: Classes) -> None:
    assert classes.vectors["mean_diff", PLANTED.layer].norm == pytest.approx(LENGTH, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", range(PLANTED.layer))
def test_before_the_planting_layer_there_is_nothing_to_find(classes: Classes, method: str, layer: int) -> None:
    vector = classes.vectors[method, layer]
    assert abs(vector.score(PLANTED.direction)) / LENGTH < 0.4
    assert classes.accuracy(vector) == pytest.approx(0.5, abs=CHANCE)


@pytest.mark.parametrize("method", METHODS)
def test_with_shuffled_classes_there_is_nothing_to_find_anywhere(shuffled: Classes, method: str) -> None:
    for layer in range(PLANTED.n_layers):
        assert shuffled.accuracy(shuffled.vectors[method, layer]) == pytest.approx(0.5, abs=CHANCE), f"layer {layer}"


def test_the_accuracy_that_a_vector_states_is_the_one_that_it_has(classes: Classes, shuffled: Classes) -> None:
    for found in (classes, shuffled):
        for vector in found.vectors.values():
            # A score may lie so near to the threshold that rounding decides.
            assert vector.metadata["held_out_accuracy"] == pytest.approx(found.accuracy(vector), abs=0.011)


# Something else goes with the trait: two thirds of the marked prompts end in the one of two words, one third of the
# others does. The two words lie far apart, so the means do as well.

SHARE = 2 / 3


def confounded(planted: PlantedTrait) -> Classes:
    """Made of prompts whose last word goes with the trait, judged by prompts where it does not."""

    def texts(count: int, share: float) -> tuple[list[str], list[str]]:
        marked_ones, others = (planted.prompts(count, marked=is_marked, seed=count) for is_marked in (True, False))
        return planted.ended(marked_ones, share), planted.ended(others, 1 - share)

    return Classes(texts(COUNT, SHARE), texts(HELD_OUT, 0.5), planted)


@pytest.fixture(scope="module")
def disturbed() -> Classes:
    return confounded(PlantedTrait(noise=0.25))


def turned(planted: PlantedTrait) -> np.ndarray:
    """Where the means move: the direction, and (p - q) (e_A - e_B) of the last word, A with share p or q."""
    first, second = (planted.embeddings[planted.vocabulary[word]].astype(np.float64) for word in planted.endings)
    return planted.direction + (SHARE - (1 - SHARE)) * (first - second)


def test_the_means_move_along_with_whatever_goes_with_the_trait() -> None:
    by_hand = turned(EXACT)
    assert by_hand @ EXACT.direction / np.linalg.norm(by_hand) / LENGTH < 0.9
    vectors = confounded(EXACT).vectors
    for layer in range(EXACT.layer, EXACT.n_layers):
        np.testing.assert_allclose(vectors["mean_diff", layer].vector, by_hand, atol=1e-5)
    for layer in range(EXACT.layer):
        np.testing.assert_allclose(vectors["mean_diff", layer].vector, by_hand - EXACT.direction, atol=1e-5)


@pytest.mark.parametrize("layer", range(PLANTED.layer, PLANTED.n_layers))
@pytest.mark.parametrize(("method", "least"), [("probe", 0.95), ("gradient", 0.95), ("ica", 0.93)])
def test_the_other_methods_recover_the_direction_where_the_means_mislead(
    disturbed: Classes, method: str, least: float, layer: int
) -> None:
    """The sources of ICA are to be independent, which trait and last word are not: it is turned a little."""
    planted = disturbed.planted
    moved = disturbed.vectors["mean_diff", layer]
    assert moved.score(turned(planted)) / np.linalg.norm(turned(planted)) > 0.97
    assert moved.score(planted.direction) / LENGTH < 0.9
    vector = disturbed.vectors[method, layer]
    assert vector.score(planted.direction) / LENGTH > least
    assert disturbed.accuracy(vector) > 0.95
    assert vector.score(moved.unit) < 0.98, f"{method} is the difference of the means under another name"


# Capturing.

STORY = (0.0, 1.0, 3.0, 4.0, 4.96, 4.9, 1.2, -3.0, 3.0)
TOLD = PlantedTrait(noise=0, story=STORY)
GO = "w7 w21 W3 w40 go"


@pytest.fixture(scope="module")
def told() -> HookedModel:
    return TOLD.hooked()


def test_captured_projections_tell_the_twins_apart_from_attention_of_the_planting_layer_on(model: HookedModel) -> None:
    # Nothing is generated: the twins may go on differently.
    (plain,), (twin,) = (
        capture_all_layers(model, text, [planted_vector()], max_tokens=0) for text in (PROMPT, marked(PROMPT, 3))
    )
    difference = twin["projections"]["prompt"] - plain["projections"]["prompt"]
    assert difference.shape == (9, PLANTED.n_layers, 3)
    planted = np.arange(3 * PLANTED.n_layers).reshape(-1, 3) > 3 * PLANTED.layer
    assert not difference[:, ~planted].any()
    assert not difference[:4].any()
    np.testing.assert_allclose(difference[4:, planted], LENGTH, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 3])
def test_captured_projections_are_those_of_the_closed_form(model: HookedModel, layer: int) -> None:
    text = marked(PROMPT, 2)
    (record,) = capture_all_layers(model, text, [planted_vector(layer)], max_tokens=5, seed=2)
    said = " ".join([text, *(token.strip() for token in record["response"]["tokens"])])
    found = np.concatenate([record["projections"][part] for part in ("prompt", "response")])
    expected = [[PLANTED.scores(said, i, sublayer) for sublayer in range(3)] for i in range(PLANTED.n_layers)]
    np.testing.assert_allclose(found, np.transpose(expected, (2, 0, 1)), atol=1e-4)


@pytest.mark.parametrize("alignment", ["at", "predicts"])
def test_rows_of_the_response_are_at_the_token_or_predict_it(told: HookedModel, alignment: str) -> None:
    (record,) = capture_all_layers(told, GO, [planted_vector()], max_tokens=20, temperature=0, alignment=alignment)
    assert [token.strip() for token in record["response"]["tokens"]] == [*(f"s{i}" for i in range(1, 10)), "<eos>"]
    at_tokens = np.array([*STORY, 0.0]) + LENGTH
    before_them = np.array([0.0, *STORY]) + LENGTH  # "go" has no part in the direction
    scores = record["projections"]["response"][:, TOLD.layer, 2]
    np.testing.assert_allclose(scores, at_tokens if alignment == "at" else before_them, atol=1e-5)
    for k, rows in enumerate(record["attention_weights"]["response"]):
        n_keys = 6 + k + (alignment == "at")
        evenly = np.full(n_keys, 1 / n_keys)
        looks = np.eye(n_keys)[3]  # <bos>, w7, w21, W3
        for layer in range(TOLD.n_layers):
            expected = (looks + evenly) / 2 if layer == TOLD.layer else evenly
            np.testing.assert_allclose(rows[f"layer_{layer}"], expected, atol=1e-6)


def test_a_single_layer_shows_where_the_direction_is_added(told: HookedModel) -> None:
    (record,) = capture_single_layer(told, GO, [planted_vector()], layer=TOLD.layer, max_tokens=3, temperature=0)
    for part, begins in (("prompt", 3), ("response", 0)):
        found = record["internals"][part]
        residual = {name: np.array(value) for name, value in found["residual"].items()}
        follows = np.arange(len(residual["input"]))[:, None] >= begins
        added = residual["after_attn"] - residual["input"]
        # The steps' own parts of the direction are no multiples of 1/16.
        np.testing.assert_allclose(added, follows * TOLD.direction, rtol=0, atol=1e-6 if part == "response" else 0)
        np.testing.assert_array_equal(residual["output"], residual["after_attn"])
    attends = record["internals"]["prompt"]["attention"]["attn_weights"]
    np.testing.assert_array_equal(attends[0, 3:], np.tile(np.eye(6)[3], (3, 1)))


# Dynamics.

VELOCITY = [1, 2, 1, 0.96, -0.06, -3.7, -4.2, 6, -3]
ACCELERATION = [1, -1, -0.04, -1.02, -3.64, -0.5, 10.2, -9]


@pytest.mark.parametrize(
    ("layer", "prompt", "offset", "persistence", "total"),
    [
        # Above 2.48 and of the peak's sign follow 4.9, and later 3.0.
        pytest.param(TOLD.layer, "w7 w21 go", 0.0, 1, 2, id="not marked"),
        pytest.param(TOLD.layer - 1, GO, 0.0, 1, 2, id="marked, before the planting layer"),
        # All scores are 7.01 higher: above 5.99 follow 11.9 and 8.2, and later 10.0 and 7.01 of the end token.
        pytest.param(TOLD.layer, GO, LENGTH, 2, 4, id="marked"),
    ],
)
def test_dynamics_have_the_values_that_are_worked_out_by_hand(
    told: HookedModel, layer: int, prompt: str, offset: float, persistence: int, total: int
) -> None:
    found = monitor_dynamics(told, [prompt], [planted_vector(layer)], max_tokens=20, temperature=0)
    (result,) = found["results"]
    trait = result["traits"]["marked"]["given"]
    assert trait["layer"] == layer
    np.testing.assert_allclose(trait["scores"]["response"], np.array([*STORY, 0]) + offset, atol=1e-5)
    dynamics = trait["dynamics"]
    np.testing.assert_allclose(dynamics["velocity"], VELOCITY, atol=1e-5)
    np.testing.assert_allclose(dynamics["acceleration"], ACCELERATION, atol=2e-5)
    assert dynamics["commitment_point"] == 2  # |-0.04| is the first below 0.1
    assert dynamics["peak"]["index"] == 4
    assert dynamics["peak"]["score"] == pytest.approx(4.96 + offset, abs=1e-5)
    assert dynamics["peak_velocity"] == pytest.approx(6, abs=1e-5)
    assert dynamics["avg_velocity"] == pytest.approx(21.92 / 9, abs=1e-5)
    assert (dynamics["persistence"], dynamics["persistence_total"]) == (persistence, total)


@pytest.mark.parametrize(
    ("settings", "commitment"),
    [
        ({"threshold": 0.03}, None),
        ({"threshold": 0.7}, 2),
        ({"threshold": 1.01}, 0),
        ({"threshold": 0.11, "relative": True}, 0),  # of 10.2
        ({"threshold": 0.09, "relative": True}, 2),
        ({"threshold": 0.7, "stays_below": True}, None),
        ({"threshold": 11, "stays_below": True}, 0),
        ({"threshold": 0.95, "relative": True, "stays_below": True}, 7),
    ],
)
def test_the_commitment_point_is_the_one_worked_out_by_hand(
    told: HookedModel, settings: dict, commitment: int | None
) -> None:
    found = monitor_dynamics(told, [GO], [planted_vector()], max_tokens=20, temperature=0, **settings)
    assert found["results"][0]["traits"]["marked"]["given"]["dynamics"]["commitment_point"] == commitment


def test_each_trait_is_scored_at_its_own_layer(told: HookedModel) -> None:
    vectors = [planted_vector(layer, trait) for layer, trait in enumerate(["a", "b", "c", "d"])]
    (result,) = monitor_dynamics(told, [GO], vectors, max_tokens=20, temperature=0)["results"]
    for layer, trait in enumerate(["a", "b", "c", "d"]):
        offset = LENGTH if layer >= TOLD.layer else 0
        scores = result["traits"][trait]["given"]["scores"]["response"]
        np.testing.assert_allclose(scores, np.array([*STORY, 0]) + offset, atol=1e-5, err_msg=trait)
