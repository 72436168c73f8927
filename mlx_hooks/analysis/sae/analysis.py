"""The ``sae`` analysis: a sparse autoencoder of one layer, trained, measured on rows that it never saw, saved."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ...model import HookedModel
from ...options import options, options_of
from ...storage.rows import Rows
from ..eval_data import eval_data_of
from ..top_rows import check_vectors
from .effects import Spell, check_place, loss_recovered, steering_effects
from .measures import Measures, measure_sae
from .training import FEW_TEXTS, ChosenRows, Progress, SAETraining, TrainedSAE, Whole, as_rows, train_sae

FEW_HELD_OUT = 100
"""With fewer rows held out, what is measured on them says little."""
FEW_TARGETS = 100
"""With fewer tokens to predict, what an autoencoder does to the loss is mostly chance."""


@options
class SAEOptions(SAETraining):
    """How a sparse autoencoder is trained, see :class:`SAETraining`, and what is told of it.

    Args:
        top_features: so many latents are told in full: those that add most to the rows that were held out.
        top_tokens: rows to name for each of them: those on which it fires most.
        save_to: a folder for the autoencoder, in SAELens' layout.
        steering: steer the model with the strongest latents, and tell what that does to its predictions. Without a
            model and ``eval_data`` a note says that it was left out.
        steering_features: how many.
        steering_strength: what is added, in units of the latent's largest activation on the rows that were held out.
        eval_sequences, eval_tokens: of ``eval_data``, no more sequences, and of each no more tokens, are read.
    """

    top_features: Whole = 32
    top_tokens: Annotated[int, Field(ge=0)] = 5
    save_to: str | Path | None = None
    steering: bool = False
    steering_features: Whole = 3
    steering_strength: Annotated[float, Field(gt=0)] = 2.0
    eval_sequences: Whole = 16
    eval_tokens: Whole = 128


def analyse_sae(
    rows: Rows | np.ndarray,
    options: SAEOptions | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    model: HookedModel | None = None,
    spell: Spell | None = None,
    eval_data: Any = None,
) -> dict[str, Any]:
    """Train a sparse autoencoder on a layer's rows and tell how good it is.

    Every number but ``training_stats`` is measured on rows that were held out:

    - ``fvu``: the fraction of variance unexplained; None where those rows do not vary;
    - ``l0``: the mean number of latents that fire on a row; ``l0_fraction`` and ``final_l0`` are that over ``d_sae``;
    - ``dead_fraction``: the fraction of latents that fire on none of these rows; ``n_held_out`` says how many they are;
    - ``final_loss``: the objective, without an auxiliary loss;
    - ``held_out_by``: "text" (a text that was captured at several steps is held out at all of them), "sequence" or
      "row", see :class:`TrainedSAE`; ``notes`` says what that, too few rows or too few predicted tokens mean for the
      numbers, and that steering was left out where there is nothing to steer;
    - ``firing_rates`` [d_sae]; ``features``: the strongest latents, each with firing rate, mean and largest activation
      and ``top_tokens``: what the model read at the rows where it fires most, with activation, position and step.

    ``training_stats`` has one number per pass over the training rows under ``{layer}/loss``, ``/recon_loss`` (the
    fraction of variance unexplained), ``/sparsity_loss`` and ``/l0_sparsity`` (the fraction of latents that fire).

    Args:
        rows: of a layer, or an array [row, feature].
        options: see :class:`SAEOptions`.
        progress: called with what is done and what there is to do.
        model: with ``eval_data``, ``loss_recovered`` is told, see :func:`.effects.loss_recovered`, and with
            ``options.steering`` ``steering``, see :func:`.effects.steering_effects`.
        spell: a token id's text.
        eval_data: what :func:`eval_data_of` takes: texts, rows of token ids, batches, or prompts with an answer.

    Returns:
        plain JSON values.

    Raises:
        HookError: as :func:`train_sae`, and as the two above; for rows that are none of the model's, before training.
    """
    asked, rows = options_of(SAEOptions, options), as_rows(rows)
    check_vectors(rows)
    data = None
    if model is not None and eval_data is not None:
        data = eval_data_of(model, eval_data, max_examples=asked.eval_sequences, max_tokens=asked.eval_tokens)
        check_place(model, rows, data)
    trained = train_sae(
        rows, asked, progress=progress, metadata={} if model is None else {"model_name": model.model_name}
    )
    unseen = ChosenRows(rows, trained.held_out)
    measured = measure_sae(trained.sae, unseen, top=asked.top_tokens)
    sae = trained.sae.with_log_sparsity(measured.firing_rate)
    strongest = [int(i) for i in np.argsort(-measured.mean_activation, kind="stable") if not measured.dead[i]]
    result = _told(rows, trained, measured)
    result["notes"] = _notes(trained, in_model=data is not None)
    if asked.steering and data is None:
        result["notes"].append("Nothing was steered: steering runs the model on data, so give a model and eval_data.")
    shown = strongest[: asked.top_features]
    tops = measured.top.told(unseen, spell, shown) if asked.top_tokens and shown else [[] for _ in shown]
    result["features"] = [
        {
            "feature": i,
            "firing_rate": float(measured.firing_rate[i]),
            "mean_activation": float(measured.mean_activation[i]),
            "max_activation": float(measured.max_activation[i]),
            # A row of the layer, not of those that were held out; where it does not fire it is no top row.
            "top_tokens": [one | {"row": int(trained.held_out[one["row"]])} for one in top if one["activation"] > 0],
        }
        for i, top in zip(shown, tops, strict=True)
    ]
    if asked.save_to is not None:
        result["saved_to"] = sae.save(asked.save_to).as_posix()
    if model is not None and data is not None:
        result["loss_recovered"] = loss_recovered(model, sae, data)
        result["notes"] += _notes_on_loss(result["loss_recovered"])
        if asked.steering:
            pushes = {i: asked.steering_strength * float(measured.max_activation[i]) for i in strongest}
            chosen = {i: pushes[i] for i in strongest[: asked.steering_features]}
            result["steering"] = steering_effects(model, sae, data, chosen, seed=asked.seed, spell=spell)
    return result


def _told(rows: Rows, trained: TrainedSAE, measured: Measures) -> dict[str, Any]:
    sae, objective = trained.sae, trained.objective
    scaled = measured.squared_error * trained.scale**2
    loss = objective.value(scaled, measured.l1 * trained.scale, measured.l0)
    layer = rows.name or "rows"
    asked = asdict(trained.options)
    return {
        "layer": layer,
        "architecture": trained.options.architecture,
        "saved_as": sae.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "options": asked | {"save_to": None if asked.get("save_to") is None else str(asked["save_to"])},
        "n_train": trained.n_train,
        "n_held_out": measured.n_rows,
        "held_out_by": trained.held_out_by,
        "n_steps": trained.n_steps,
        "n_resampled": trained.n_resampled,
        "training_stats": {f"{layer}/{name}": values for name, values in trained.stats.items()},
        "final_loss": loss,
        "final_l0": measured.l0 / sae.d_sae,
        "l0": measured.l0,
        "l0_fraction": measured.l0 / sae.d_sae,
        "fvu": measured.fvu,
        "n_dead": int(measured.dead.sum()),
        "dead_fraction": float(measured.dead.mean()),
        "firing_rates": measured.firing_rate.tolist(),
    }


def _notes(trained: TrainedSAE, in_model: bool) -> list[str]:
    """What the numbers do not say of themselves, as sentences."""
    said, steps, n_held_out = [], trained.steps, len(trained.held_out)
    if n_held_out < FEW_HELD_OUT:
        rows = "1 row was" if n_held_out == 1 else f"{n_held_out} rows were"
        said.append(
            f"Only {rows} held out: what is measured on so few, such as which features never fire, says little."
        )
    if trained.held_out_by == "row":
        said.append(
            f"Single rows were held out, since fewer than {FEW_TEXTS} texts are known: rows of one text are alike, "
            "which flatters what is measured."
        )
    if trained.held_out_by == "sequence" and len(steps) > 1:
        said.append(
            "Whether a text was captured at several steps is not known, since the rows have no tokens: what was held "
            "out may have been trained on at another step, which flatters what is measured."
        )
    if in_model and len(steps) > 1:
        said.append(
            f"The rows are of {len(steps)} steps, {steps[0]} to {steps[-1]}, and what is told of the model is of its "
            "weights now: an autoencoder of the last step alone would fit them better."
        )
    return said


def _notes_on_loss(recovered: Mapping[str, Any]) -> list[str]:
    """The same of what :func:`.effects.loss_recovered` tells."""
    said, count, share = [], recovered["n_targets"], recovered["loss_recovered"]
    if count < FEW_TARGETS:
        tokens = "1 predicted token" if count == 1 else f"{count} predicted tokens"
        said.append(
            f"The loss in the model was measured on {tokens} alone, which says little: give more or longer eval_data, "
            "of which eval_sequences and eval_tokens say how much is read."
        )
    if share is not None and share > 1:
        said.append(
            f"The share of the loss that is recovered is {share:.3f}: above 1, the model predicts these tokens better "
            "with what the autoencoder reads back than with its own activations."
        )
    return said
