"""The vectors that a request about traits means: those that it brings, and those that are stored in experiments.

Stored ones are named, never given by path: nothing outside the folder that the server was started with is read, not
even where a link inside leads out of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.traits.experiment import Experiment
from mlx_hooks.analysis.traits.vectors import TraitVector
from neuroscope_bridge import payload

from . import logs
from .errors import ApiError
from .schemas.analysis import TraitsRequest, TraitVectorRequest
from .schemas.fields import MAX_VECTORS


def vectors_of(asked: TraitsRequest, model: HookedModel, experiments: Path | None) -> list[TraitVector]:
    """Given ones first, then stored ones, each under a name of its own.

    Args:
        experiments: the folder with experiments; None where the server has none.

    Raises:
        ApiError: one cannot be read, does not fit the model, or has another's name.
    """
    found = [_given(one, i, model) for i, one in enumerate(asked.vectors or [])]
    names = {vector.trait for vector in found}
    for vector in _stored(asked, experiments):
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


def _stored(asked: TraitsRequest, root: Path | None) -> Iterator[TraitVector]:
    if asked.experiment is None:
        return
    if root is None:
        raise ApiError(
            400,
            "This server was started without stored vectors: start it with --experiments DIR, or send 'vectors'.",
            code="no_experiments",
            param="experiment",
        )
    with _not_found("experiment_not_found", "experiment"):
        experiment = Experiment(root, asked.experiment)
    _check_inside(root, experiment.folder)
    with _not_found("trait_not_found", "experiment"):
        names = asked.traits or [trait.name for trait in experiment.traits()]
    if not names:
        raise ApiError(
            404, f"The experiment {asked.experiment} has no traits.", code="trait_not_found", param="experiment"
        )
    for i, name in enumerate(names):
        param = f"traits[{i}]" if asked.traits else "experiment"
        with _not_found("trait_not_found", param):
            trait = experiment.trait(name)
        for pattern in ("", "*", "extraction/*", "extraction/vectors/*"):
            for path in trait.folder.glob(pattern) if pattern else [trait.folder]:
                _check_inside(root, path)
        with _not_found("vector_not_found", param):
            yield trait.find(method=asked.method, layer=asked.layer)


@contextmanager
def _not_found(code: str, param: str) -> Iterator[None]:
    try:
        yield
    except HookError as error:
        # Where the folder lies is nobody's business.
        raise ApiError(404, logs.scrub(str(error)), code=code, param=param) from error


def _check_inside(root: Path, path: Path) -> None:
    """Links are followed: what they lead to counts."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise ApiError(
            403,
            f"{path.relative_to(root)} leads out of the folder with experiments, by a link: it is not read.",
            code="path_not_allowed",
            param="experiment",
        )
