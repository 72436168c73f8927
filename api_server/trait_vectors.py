"""The vectors that a request about traits means: those that it brings, and those that are stored in experiments."""

from pathlib import Path

import numpy as np

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.traits.vectors import TraitVector
from neuroscope_bridge import payload

from .errors import ApiError
from .schemas.analysis import TraitsRequest, TraitVectorRequest
from .schemas.fields import MAX_VECTORS
from .stored_traits import StoredTraits


def vectors_of(asked: TraitsRequest, model: HookedModel, experiments: Path | None) -> list[TraitVector]:
    """Given ones first, then stored ones, each under a name of its own.

    Args:
        experiments: the folder with experiments; None where the server has none.

    Raises:
        ApiError: one cannot be read, does not fit the model, or has another's name.
    """
    found = [_given(one, i, model) for i, one in enumerate(asked.vectors or [])]
    names = {vector.trait for vector in found}
    stored = (
        ()
        if asked.experiment is None
        else StoredTraits(experiments).vectors(asked.experiment, asked.traits, asked.method, asked.layer)
    )
    for vector in stored:
        if vector.trait in names:
            raise ApiError(
                400,
                f"{vector.trait!r} is both a vector of the request and a stored one: give the former another name.",
                code="invalid_value",
                param="vectors",
            )
        found.append(vector)
    if len(found) > MAX_VECTORS:
        raise ApiError(
            400,
            f"The request watches {len(found)} traits; at most {MAX_VECTORS} are allowed: name those of interest.",
            code="limit_exceeded",
            param="traits",
        )
    return found


def _given(wanted: TraitVectorRequest, index: int, model: HookedModel) -> TraitVector:
    field = "vector"
    try:
        vector = TraitVector(wanted.name, wanted.at_layer, "given", _numbers(wanted), threshold=wanted.threshold)
        if vector.layer >= model.cfg.n_layers:
            field = "layer" if wanted.hook_point is None else "hook_point"
        return vector.check(model)
    except HookError as error:
        raise ApiError(400, str(error), code="invalid_value", param=f"vectors[{index}].{field}") from error
    except payload.PayloadError as error:
        # What is wrong stands behind whose it is.
        message = f"The vector of {wanted.name}: {str(error).split(': ', 1)[-1]}"
        raise ApiError(400, message, code="invalid_value", param=f"vectors[{index}].{field}") from error


def _numbers(wanted: TraitVectorRequest) -> np.ndarray:
    """[d_model]; a record's other axes are of one entry each."""
    if isinstance(wanted.vector, list):
        return np.array(wanted.vector, np.float64)
    array = payload.decode_activation({"hook_id": wanted.name} | wanted.vector)
    if array.size != max(array.shape, default=0):
        raise HookError(f"The vector of {wanted.name} is to be one row of numbers, got {list(array.shape)}.")
    return array.reshape(-1)
