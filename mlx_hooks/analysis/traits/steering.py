"""Steering by a trait's vector: add it to the stream with several coefficients, and see text and scores move.

1. For each coefficient the model answers the same prompt with the same seed, with ``coefficient * v`` added at a
   layer. Its own words then differ, and so do the scores for that reason too.
2. So the tokens of coefficient 0 are read once more under each coefficient: the shift of their scores is the vector's
   doing alone. At the layer where v is added, if layers run once, it is exactly ``coefficient * |v|`` along v.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np

from ...errors import HookError
from ...interventions import Intervention, InterventionReceipt, Reach
from ...interventions.reach import due_positions
from ...model import HookedModel
from ...sampling import Sampling, whole_number
from ...storage.metadata import plain_interventions
from ..identity import ModelIdentity
from .monitoring import scores_of, text_parts
from .prompts import render
from .vectors import TraitVector, check_vectors
from .watching import TraitStep, room_for, watch_traits

FORMAT = "neuroscope.trait_steering/1"
PARTS = ("prompt", "response")


Scores = dict[str, np.ndarray]
"""By "prompt" and "response": [pos, trait], float64."""


@dataclass(frozen=True)
class Measured:
    """What one trait did in a steered run. Scores are h.v/|v| at the measuring vector's own layer; means are over the
    response's tokens, or over the prompt's where nothing was generated.

    Args:
        trait, method, layer: of the measuring vector.
        scores: of "prompt" and "response", one per token.
        mean_score: their mean.
        shift: ``mean_score`` less that of coefficient 0; of other words, too.
        forced_scores: of "prompt" and "response" of coefficient 0, read under this run's coefficient.
        forced_shift: the mean of ``forced_scores`` less that of coefficient 0: what the vector alone does.
    """

    trait: str
    method: str
    layer: int
    scores: dict[str, list[float]]
    mean_score: float
    shift: float
    forced_scores: dict[str, list[float]]
    forced_shift: float


@dataclass(frozen=True)
class SteeredRun:
    """A prompt answered under one coefficient.

    Args:
        coefficient: of the vector.
        text: the response, without an end token.
        tokens, token_ids: of the response, an end token included.
        finish_reason: "stop" or "length".
        measured: one for each measuring vector, in their order.
        receipts: what the intervention did; none for coefficient 0.
    """

    coefficient: float
    text: str
    tokens: list[str]
    token_ids: list[int]
    finish_reason: str
    measured: list[Measured]
    receipts: tuple[InterventionReceipt, ...]


@dataclass(frozen=True)
class Steering:
    """What :func:`steer` answers: a sequence of runs, and what they have in common.

    Args:
        prompt: text, tokens, token_ids and n_tokens, as the model read it.
        runs: one for each coefficient, as they were asked for; 0 first where it was not.
        metadata: plain JSON values: model, vector, layer, norm, intervention, sampling and so on.
    """

    prompt: dict[str, Any]
    runs: list[SteeredRun]
    metadata: dict[str, Any]

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> SteeredRun:
        return self.runs[index]

    @property
    def baseline(self) -> SteeredRun:
        """The run of coefficient 0."""
        return next(run for run in self.runs if run.coefficient == 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        runs = []
        for run in self.runs:
            receipts = [receipt.to_dict() for receipt in run.receipts]
            runs.append({name: value for name, value in asdict(run).items() if name != "receipts"})
            runs[-1]["receipts"] = receipts
        return {"format": FORMAT, "metadata": self.metadata, "prompt": self.prompt, "runs": runs}


def steer(
    model: HookedModel,
    prompt: str,
    vector: TraitVector,
    coefficients: Sequence[float],
    *,
    layer: int | None = None,
    measured: Sequence[TraitVector] | None = None,
    positions: Any = None,
    phase: str | None = None,
    max_tokens: int = 50,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    other_model: bool = False,
) -> Steering:
    """Answer a prompt under several coefficients of a vector, and measure traits in each.

        vector = Experiment("experiments", "demo").trait("polite").find()
        for run in steer(model, "Write a story", vector, [-4, 0, 4]):
            print(run.coefficient, run.measured[0].forced_shift, run.text)

    Args:
        prompt: a text; it is put to the model as the vector's ``chat`` says.
        coefficients: h becomes h + coefficient * v. 0 is run besides where it is not among them.
        layer: where v is added; by default its own.
        measured: what is measured; by default the vector itself.
        positions, phase: where and when v is added: see :class:`Intervention`; by default at every token.
        max_tokens: most tokens to generate; no more than the model's context holds.
        temperature, top_p, seed: see ``sampling.Sampling``; the same for every coefficient.
        other_model: let a vector of a model of other weights pass, if it fits.

    Raises:
        HookError: for coefficients that are no list of different finite numbers, a vector of another model or width, a
            layer that there is not, a prompt that is empty or too long, positions that the run never comes to.
    """
    asked = _coefficients(coefficients)
    if not isinstance(vector, TraitVector):
        raise HookError(f"vector is a TraitVector, got {type(vector).__name__}.", field="vector")
    if measured is not None:
        check_vectors(measured, "measured")
    measuring = [vector] if measured is None else list(measured)
    whole_number("max_tokens", max_tokens)
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    Sampling(**sampling).check()
    identity = ModelIdentity.of(model)
    for one in [vector, *measuring]:
        one.check(model, other_model=other_model, identity=identity)
    at = _layer(model, vector.layer if layer is None else layer)
    edit = vector.intervention(1.0, layer=at, positions=positions, phase=phase)
    tokens = render(model, prompt, vector.chat)
    length = min(max_tokens, room_for(model, tokens))
    runs = _Runs(model, prompt, tokens, vector, edit, measuring, length, sampling)
    metadata = {
        "model": model.model_name,
        "model_identity": identity.to_dict(),
        "capture_date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "trait": vector.trait,
        "method": vector.method,
        "vector_layer": vector.layer,
        "vector_path": None if vector.path is None else vector.path.as_posix(),
        "norm": vector.norm,
        "layer": at,
        "intervention": plain_interventions([edit])[0],
        "max_tokens": max_tokens,
        **sampling,
        "score": "h.v/|v|",
    }
    return Steering(runs.parts["prompt"], [runs.of(coefficient) for coefficient in asked], metadata)


class _Runs:
    """The runs of one prompt; that of coefficient 0, which the others are compared with, comes first.

    Args:
        edit: where and when the vector is added.
    """

    def __init__(
        self,
        model: HookedModel,
        prompt: str,
        tokens: list[int],
        vector: TraitVector,
        edit: Intervention,
        measuring: list[TraitVector],
        max_tokens: int,
        sampling: dict[str, Any],
    ) -> None:
        self.model, self.prompt, self.tokens = model, prompt, tokens
        self.vector, self.edit, self.measuring = vector, edit, measuring
        # The vectors were checked, once for all runs.
        self.options = {"max_tokens": max_tokens, "other_model": True, **sampling}
        self.still = self._answer(0.0)
        self.parts = text_parts(prompt, self.still)
        self.ids: list[int] = [*tokens, *self.parts["response"]["token_ids"]]
        self.base = self._means(self._own(self.still))
        self.forced = self._forced(0.0)

    def of(self, coefficient: float) -> SteeredRun:
        """The run of one coefficient, measured."""
        steps = self._answer(coefficient) if coefficient else self.still
        own, forced = self._own(steps), self._forced(coefficient) if coefficient else self.forced
        shifts = self._means({part: forced[part] - self.forced[part] for part in PARTS})
        means = self._means(own)
        measured = [
            Measured(
                trait=one.trait,
                method=one.method,
                layer=one.layer,
                scores={part: own[part][:, i].tolist() for part in PARTS},
                mean_score=float(means[i]),
                shift=float(means[i] - self.base[i]),
                forced_scores={part: forced[part][:, i].tolist() for part in PARTS},
                forced_shift=float(shifts[i]),
            )
            for i, one in enumerate(self.measuring)
        ]
        response = text_parts(self.prompt, steps)["response"]
        return SteeredRun(
            coefficient=coefficient,
            text=response["text"],
            tokens=response["tokens"],
            token_ids=response["token_ids"],
            finish_reason=response["finish_reason"],
            measured=measured,
            receipts=steps[-1].interventions,
        )

    def _answer(self, coefficient: float) -> list[TraitStep]:
        edits = [replace(self.edit, coefficient=coefficient)] if coefficient else []
        return list(watch_traits(self.model, self.tokens, self.measuring, interventions=edits, **self.options))

    def _forced(self, coefficient: float) -> Scores:
        """Scores of coefficient 0's tokens, read in one pass under another one."""
        n_prompt, n_tokens = len(self.tokens), len(self.ids)
        # In one pass all is prefill: the positions that generation would have edited are named one by one. It might
        # have gone on for longer than it did.
        reach = Reach.of_generation(n_prompt, self.options["max_tokens"] + 1)
        due = [position for position in due_positions(self.edit, reach) if position < n_tokens] if coefficient else []
        edits = [replace(self.edit, coefficient=coefficient, positions=due, phase=None)] if due else []
        (step,) = watch_traits(
            self.model, self.ids, self.measuring, max_tokens=0, interventions=edits, other_model=True
        )
        scores = step.scores.astype(np.float64)
        return {"prompt": scores[:n_prompt], "response": scores[n_prompt:]}

    def _own(self, steps: Sequence[TraitStep]) -> Scores:
        return {part: scores_of(steps, part, len(self.measuring)).astype(np.float64) for part in PARTS}

    @staticmethod
    def _means(scores: Scores) -> np.ndarray:
        """The mean over the response's tokens, or over the prompt's where nothing was generated: [trait]."""
        mean: np.ndarray = (scores["response"] if len(scores["response"]) else scores["prompt"]).mean(axis=0)
        return mean


def _coefficients(given: Sequence[float]) -> list[float]:
    """Different finite numbers as floats, 0 first where it is not among them."""
    problem = HookError(f"coefficients is a list of different finite numbers, got {given!r}.", field="coefficients")
    is_list = given.ndim == 1 if isinstance(given, np.ndarray) else isinstance(given, Sequence)
    if isinstance(given, str) or not is_list or not len(given):
        raise problem
    if any(isinstance(one, bool) or not isinstance(one, int | float | np.integer | np.floating) for one in given):
        raise problem
    try:
        # -0.0 is 0.
        found = [float(one) + 0.0 for one in given]
    except OverflowError:
        raise problem from None
    if not np.isfinite(found).all() or len(set(found)) < len(found):
        raise problem
    return found if 0.0 in found else [0.0, *found]


def _layer(model: HookedModel, layer: Any) -> int:
    n_layers = model.cfg.n_layers
    if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not 0 <= layer < n_layers:
        raise HookError(f"layer is 0 to {n_layers - 1} on {model.model_name}, got {layer!r}.", field="layer")
    return int(layer)
