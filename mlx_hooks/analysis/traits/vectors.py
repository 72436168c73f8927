"""A trait's vector at a layer: what a text's score is measured along, and what is added to steer."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ... import hook_points
from ...activations import to_numpy
from ...errors import HookError
from ...interventions import Intervention
from ...model import HookedModel
from ...storage import files
from ...storage.tensors import TensorFile, write_arrays
from ..identity import ModelIdentity
from .prompts import Chat

FORMAT = "neuroscope.trait_vector/1"
METHODS = ("probe", "mean_diff", "ica", "gradient")
"""In the order in which a vector is looked for."""
GIVEN = "given"
"""The method of a vector that nobody here made."""
KEY = "trait_vector"


@dataclass(frozen=True, eq=False)
class TraitVector:
    """A direction of the residual stream that leaves a layer.

        vector = TraitVector("refusal", 16, "probe", numbers)
        vector.score(cache[vector.hook_point])          # [batch, pos]: h . v / |v|
        model.generate(prompt, interventions=[vector.intervention(4.0)])

    Args:
        trait: its name.
        layer: the block whose output it was made of, from 0.
        method: one of ``METHODS``, or "given".
        vector: [d_model]; kept as float32, in its own length.
        threshold: the score between texts with and without the trait; None where nobody knows.
        chat: how the prompts were put to the model that it was made of.
        metadata: plain JSON values: span, accuracy, held_out_accuracy, n_positive and so on.
        identity: the model that it was made of; None where nobody knows.
        path: the file that it was read from.

    Raises:
        HookError: for an unknown method, a vector that has another shape, is 0 or not finite, and other types.
    """

    trait: str
    layer: int
    method: str
    vector: np.ndarray
    threshold: float | None = None
    chat: Chat | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    identity: ModelIdentity | None = None
    path: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.trait, str) or not self.trait:
            raise HookError(f"A trait has a name, got {self.trait!r}.", field="trait")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int | np.integer) or self.layer < 0:
            raise HookError(f"A layer is a whole number from 0 up, got {self.layer!r}.", field="layer")
        if self.method not in (*METHODS, GIVEN):
            known = ", ".join((*METHODS, GIVEN))
            raise HookError(f"Unknown method {self.method!r}. There are: {known}.", field="method")
        object.__setattr__(self, "layer", int(self.layer))
        object.__setattr__(self, "vector", self._checked_vector())
        if self.threshold is not None and not _is_finite(self.threshold):
            raise HookError(f"A threshold is a finite number, got {self.threshold!r}.", field="threshold")
        if not isinstance(self.metadata, Mapping):
            raise HookError(f"metadata is a mapping, got {self.metadata!r:.60}.", field="metadata")

    def _checked_vector(self) -> np.ndarray:
        given: Any = self.vector
        try:
            numbers = to_numpy(given) if isinstance(given, mx.array) else np.asarray(given)
        except (TypeError, ValueError):
            numbers = np.empty(0)
        if numbers.dtype.kind not in "iuf" or numbers.ndim != 1 or not numbers.size:
            raise HookError(f"The vector of {self.trait} is a list of numbers [d_model].", field="vector")
        with np.errstate(over="ignore"):
            vector: np.ndarray = numbers.astype(np.float32)
        if not np.isfinite(vector).all():
            raise HookError(f"The vector of {self.trait} holds numbers that are not finite.", field="vector")
        if not vector.any():
            raise HookError(f"The vector of {self.trait} is 0 everywhere: it has no direction.", field="vector")
        return vector

    def __repr__(self) -> str:
        return f"TraitVector({self.trait!r}, {self.name}, [{self.vector.size}], norm {self.norm:.4g})"

    @property
    def name(self) -> str:
        """What its file is called: ``probe_layer16``."""
        return f"{self.method}_layer{self.layer}"

    @property
    def hook_point(self) -> str:
        """Where it is measured and added."""
        return hook_points.block_point("resid_post", self.layer).name

    @property
    def norm(self) -> float:
        """Its length |v|."""
        return float(np.linalg.norm(self.vector.astype(np.float64)))

    @property
    def unit(self) -> np.ndarray:
        """v / |v|, [d_model] in float32."""
        return (self.vector.astype(np.float64) / self.norm).astype(np.float32)

    def score(self, values: mx.array | np.ndarray) -> np.ndarray:
        """h . v / |v| of values [..., d_model], in float32: how far they lie along it."""
        return self._numbers(values) @ self.unit

    def dot(self, values: mx.array | np.ndarray) -> np.ndarray:
        """h . v of values [..., d_model], in float64: of large numbers it may be more than float32 holds."""
        return self._numbers(values).astype(np.float64) @ self.vector.astype(np.float64)

    def _numbers(self, values: mx.array | np.ndarray) -> np.ndarray:
        numbers = to_numpy(values) if isinstance(values, mx.array) else np.asarray(values, np.float32)
        if numbers.shape[-1:] != self.vector.shape:
            raise HookError(f"{self!r} measures values that are {self.vector.size} wide, got {numbers.shape}.")
        return numbers

    def intervention(
        self, coefficient: float, *, layer: int | None = None, positions: Any = None, phase: str | None = None
    ) -> Intervention:
        """The edit that adds ``coefficient`` times the vector: ``dot`` moves by coefficient * |v|^2, ``score`` by
        coefficient * |v|.

        Args:
            layer: in the place of its own.
            positions, phase: see :class:`Intervention`.
        """
        point = self.hook_point if layer is None else hook_points.block_point("resid_post", layer).name
        return Intervention(
            hook_point=point,
            type="add",
            vector=self.vector,
            coefficient=coefficient,
            positions=positions,
            phase=phase,
        )

    def check(
        self, model: HookedModel, *, other_model: bool = False, identity: ModelIdentity | None = None
    ) -> "TraitVector":
        """The vector itself, if it belongs to a model.

        Args:
            other_model: let one of other weights pass, if it fits.
            identity: the model's, where the caller knows it: making it reads all weights.

        Raises:
            HookError: for a vector of another width, of a layer that the model does not have, or of another model.
        """
        cfg, who = model.cfg, f"The vector {self.trait}/{self.name}"
        if self.vector.size != cfg.d_model:
            raise HookError(f"{who} is {self.vector.size} wide; the stream of {model.model_name} is {cfg.d_model}.")
        if self.layer >= cfg.n_layers:
            raise HookError(f"{who} is of layer {self.layer}; {model.model_name} has layers 0 to {cfg.n_layers - 1}.")
        if self.identity is not None and not other_model:
            difference = self.identity.difference(identity or ModelIdentity.of(model))
            if difference is not None:
                raise HookError(f"{who} is of another model: {difference}.")
        return self

    # Files

    def save(self, folder: str | Path) -> Path:
        """Write it to ``{method}_layer{N}.safetensors`` in a folder, which is made; answers the file's path.

        Raises:
            HookError: when it cannot be written; what was there stays.
        """
        return save_vectors([self], folder)[0]

    def _header(self) -> dict[str, str]:
        about = {
            "format": FORMAT,
            "trait": self.trait,
            "layer": self.layer,
            "method": self.method,
            "threshold": self.threshold,
            "norm": self.norm,
            "chat": None if self.chat is None else self.chat.to_dict(),
            "identity": None if self.identity is None else self.identity.to_dict(),
            "metadata": dict(self.metadata),
        }
        try:
            return {KEY: json.dumps(about, allow_nan=False, ensure_ascii=False)}
        except (TypeError, ValueError) as error:
            raise HookError(f"metadata of {self.name} are plain JSON values: {error}.", field="metadata") from error

    @classmethod
    def load(cls, path: str | Path) -> "TraitVector":
        """Read a vector that :meth:`save` wrote, bit for bit.

        Raises:
            HookError: for a file that cannot be read, or is no such vector.
        """
        path = Path(path)
        with files.reading(path, "trait vector"):
            file = TensorFile(path)
            about = json.loads(file.notes[KEY])
            if about["format"] != FORMAT:
                raise ValueError(f"it is of the format {about['format']!r}, and this version reads {FORMAT!r}")
            vector = cls(
                trait=about["trait"],
                layer=about["layer"],
                method=about["method"],
                vector=np.array(file.numpy("vector")),
                threshold=about["threshold"],
                chat=None if about["chat"] is None else Chat.from_dict(about["chat"]),
                metadata=dict(about["metadata"]),
                identity=None if about["identity"] is None else ModelIdentity.from_dict(about["identity"]),
                path=path,
            )
            norm = about["norm"]
            if not _is_finite(norm) or not math.isclose(norm, vector.norm, rel_tol=1e-6):
                raise ValueError(f"its norm is told to be {norm!r}, and is {vector.norm:g}")
            return vector


def check_vectors(vectors: Any, name: str = "vectors") -> None:
    """Raises HookError unless it is a list of vectors, at least one; ``name`` is what the argument is called."""
    is_list = isinstance(vectors, Sequence) and not isinstance(vectors, str)
    if not is_list or not vectors or not all(isinstance(vector, TraitVector) for vector in vectors):
        raise HookError(f"{name} is a list of at least one TraitVector.", field=name)


def save_vectors(vectors: Sequence[TraitVector], folder: str | Path) -> list[Path]:
    """Write vectors to a folder, all of them or none; answers their files.

    Raises:
        HookError: for two of one method and layer, and when one cannot be written; what was there stays.
    """
    names = [vector.name for vector in vectors]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise HookError(f"A folder holds one vector of each method and layer, got several {', '.join(twice)}.")
    paths = [Path(folder) / f"{name}.safetensors" for name in names]
    headers = [vector._header() for vector in vectors]
    try:
        # Each is written beside its place first; only when all are on disk do they take their places.
        with ExitStack() as drafts:
            for vector, path, header in zip(vectors, paths, headers, strict=True):
                with files.writing(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    draft = drafts.enter_context(files.whole_file(path))
                    write_arrays(draft, {"vector": partial(getattr, vector, "vector")}, header)
                    files.sync(draft)
    except OSError as error:
        raise HookError(f"cannot write vectors in {folder}: {error.strerror or error}") from error
    return paths


def _is_finite(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
