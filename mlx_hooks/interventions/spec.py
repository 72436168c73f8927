"""What an intervention is: the same keys in Python and in JSON, checked on their own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import numpy as np

from ..activations import ActivationCache, CapturedActivation
from ..errors import HookError
from .reading import Indices, chosen_of, numbers_of

PHASES = ("prefill", "decode")


Numbers = float | Sequence[Any] | np.ndarray | mx.array


Source = ActivationCache | CapturedActivation | Mapping[str, Any] | Sequence[Any] | np.ndarray | mx.array


@dataclass(frozen=True)
class Keys:
    """What a type of intervention takes besides its place: all of ``needs``, one of ``one_of``, any of ``may``."""

    needs: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    may: tuple[str, ...] = ()


TYPES = {
    "zero": Keys(),
    "mean": Keys(one_of=("values", "over")),
    "set": Keys(one_of=("values", "source")),
    "patch": Keys(one_of=("values", "source")),
    "add": Keys(needs=("vector",), may=("coefficient", "norm_match")),
    "scale": Keys(needs=("factor",)),
    "clamp": Keys(may=("min", "max")),
    "noise": Keys(needs=("std",), may=("seed",)),
}


PLACE = ("hook_point", "layer_name", "component", "type", "positions", "heads", "neurons", "keys", "phase", "passes")


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit. The same keys make it in JSON: ``{"hook_point": "blocks.2.attn.hook_z", "type": "zero", "heads": 1}``.

    | type | the selected values become |
    | --- | --- |
    | zero | 0 |
    | mean | ``values``, or the mean activation of the model over all positions of the prompts ``over`` |
    | set, patch | ``values``, or what ``source`` has at the same absolute position |
    | add | h + coefficient * v; with ``norm_match`` h + coefficient * norm(h) * v / norm(v), per position |
    | scale | h * factor |
    | clamp | h, not below ``min``, not above ``max`` |
    | noise | h + std * a normal number, made of seed, hook point, batch row and absolute position (of query and key) |

    At ``mixer.hook_state``, the state that a call of a state-space layer leaves behind, an edit replaces that state: it
    changes what later calls compute (generated tokens, chunks), not the call itself. It can be limited by phase only,
    and a source is the capture of one call's state, whatever its position, or an array of the state's shape.

    Args:
        hook_point: a name, an alias, a glob or a raw module path; or else ``layer_name`` and ``component``.
        type: a key of the table.
        layer_name, component: the place in the REST vocabulary (``"transformer.h.2"``, ``"residual"``).
        positions: absolute ones. None is all. A number, a list, ``{"start": 2, "stop": 5}`` (either may be missing)
            or ``"last"``: the last token of the prompt, and each generated one.
        heads, neurons: indices of the head axis and of the last axis; None is all; spelled like positions.
        keys: absolute positions of the keys, in attention scores and patterns.
        phase: "prefill" (the prompt), "decode" (generated tokens) or None for both.
        passes: for a layer that runs several times in one forward pass, which of these times, from 0; None is all;
            spelled like positions.
        values: a number, or numbers that broadcast to the selection as in NumPy: [..., positions, heads, neurons]. An
            axis over positions must have one row per listed position. At attention scores -inf, or null, masks a key.
        source: an ActivationCache (read at the point that is edited), a CapturedActivation, a record as the server
            returns it with ``data`` decoded, a list of such records, or an array of the whole hook point whose row i
            stands for position i. Each pass takes its own records; a source of one pass needs ``passes`` to be one
            where the layer runs several times, and serves whichever it is.
        over: texts or lists of token ids. At attention scores and patterns, whose rows mean nothing apart from their
            position, the mean is taken position by position, over prompts of one length. Each pass has its own.
        vector: numbers that broadcast to the selection.
        coefficient, norm_match, factor, min, max, std, seed: see the table.

    Raises:
        HookError: for a missing or a foreign key, and for a value that none of the above allows.
    """

    hook_point: str = ""
    type: str = ""
    layer_name: str = ""
    component: str = ""
    positions: Indices | str = None
    heads: Indices = None
    neurons: Indices = None
    keys: Indices = None
    phase: str | None = None
    passes: Indices = None
    values: Numbers | None = None
    source: Source | None = None
    over: Sequence[str | Sequence[int]] | None = None
    vector: Numbers | None = None
    coefficient: float = 1.0
    norm_match: bool = False
    factor: float | None = None
    min: float | None = None
    max: float | None = None
    std: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.type, str) or self.type not in TYPES:
            raise HookError(f"Unknown type of intervention {self.type!r}. There are: {', '.join(TYPES)}.")
        for name in ("hook_point", "layer_name", "component"):
            if not isinstance(getattr(self, name), str):
                raise HookError(f"{name} is a string, got {getattr(self, name)!r}.")
        if bool(self.hook_point) == bool(self.layer_name or self.component) or bool(self.layer_name) != bool(
            self.component
        ):
            raise HookError("An intervention has a hook_point, or else layer_name and component.")
        if self.phase not in (None, *PHASES):
            raise HookError(f"phase is 'prefill', 'decode' or null for both, got {self.phase!r}.")
        self._check_keys()
        if not (isinstance(self.positions, str) and self.positions == "last"):
            object.__setattr__(self, "positions", chosen_of("positions", self.positions, " or 'last'"))
        for name in ("heads", "neurons", "keys", "passes"):
            object.__setattr__(self, name, chosen_of(name, getattr(self, name)))
        self._check_numbers()
        # Who gave them may change them.
        if isinstance(self.source, np.ndarray):
            object.__setattr__(self, "source", self.source.copy())
        elif isinstance(self.source, mx.array):
            object.__setattr__(self, "source", mx.array(self.source))
        if self.over is not None:
            object.__setattr__(self, "over", list(self.over))

    def _check_keys(self) -> None:
        own = TYPES[self.type]
        allowed = [*own.needs, *own.one_of, *own.may]
        given = [f.name for f in fields(self) if f.name not in PLACE and getattr(self, f.name) is not f.default]
        takes = f"{self.type!r} takes {', '.join(allowed)}" if allowed else f"{self.type!r} takes nothing more"
        foreign = [name for name in given if name not in allowed]
        if foreign:
            raise HookError(f"{foreign[0]} does not belong to this type: {takes}.")
        missing = [name for name in own.needs if name not in given]
        if missing:
            raise HookError(f"{missing[0]} is missing: {takes}.")
        if own.one_of and len(set(given) & set(own.one_of)) != 1:
            raise HookError(f"{self.type!r} takes exactly one of {' and '.join(own.one_of)}.")
        if self.type == "clamp" and not given:
            raise HookError("'clamp' takes min, max or both.")

    def _check_numbers(self) -> None:
        for name in ("values", "vector"):
            if getattr(self, name) is not None:
                masks = name == "values" and self.type in ("set", "patch")
                object.__setattr__(self, name, numbers_of(name, getattr(self, name), masks))
        for name in ("coefficient", "factor", "min", "max", "std"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name))
        if not isinstance(self.norm_match, bool):
            raise HookError(f"norm_match is true or false, got {self.norm_match!r}.")
        if self.norm_match and not np.all(np.any(np.atleast_1d(np.asarray(self.vector)) != 0, axis=-1)):
            raise HookError("norm_match divides by the norm of vector, which is 0 here.")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise HookError(f"min is at most max, got {self.min!r} and {self.max!r}.")
        if self.std is not None and self.std < 0:
            raise HookError(f"std is a number from 0 up, got {self.std!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise HookError(f"seed is a whole number from 0 to {2**64 - 1}, got {self.seed!r}.")
        if self.over is not None:
            _check_prompts(self.over)
        if self.source is not None and not _is_source(self.source):
            raise HookError(
                "source is an activation cache, a captured activation, a record with data and positions, a list of "
                f"these, or an array; got {type(self.source).__name__}."
            )

    @classmethod
    def of(cls, spec: "Intervention | Mapping[str, Any]") -> "Intervention":
        """An intervention from a mapping with the same keys; null means that a key is not given.

        Raises:
            HookError: for an unknown key; lists the known ones.
        """
        if isinstance(spec, Intervention):
            return spec
        if not isinstance(spec, Mapping):
            raise HookError(f"An intervention is an Intervention or a mapping, got {type(spec).__name__}.")
        known = [f.name for f in fields(cls)]
        unknown = [str(key) for key in spec if key not in known]
        if unknown:
            raise HookError(f"Unknown key {unknown[0]!r} in an intervention. There are: {', '.join(known)}.")
        return cls(**{key: value for key, value in spec.items() if value is not None})

    def __repr__(self) -> str:
        return f"Intervention({self.type} at {self.where})"

    @property
    def where(self) -> str:
        """The place, as it was asked for."""
        return self.hook_point or f"{self.layer_name} {self.component}"


def _check_number(name: str, given: Any) -> None:
    if isinstance(given, bool) or not isinstance(given, int | float | np.integer | np.floating):
        raise HookError(f"{name} is a number, got {given!r}.")
    with np.errstate(over="ignore"):
        try:
            finite = bool(np.isfinite(np.float32(given)))
        except OverflowError:
            finite = False
    if not finite:
        raise HookError(f"{name} must be finite in float32, got {given!r}.")


def _check_prompts(over: Any) -> None:
    if isinstance(over, str) or not isinstance(over, Sequence) or not over:
        raise HookError(f"over is a list of prompts, each a text or a list of token ids; got {over!r}.")
    for prompt in over:
        if not isinstance(prompt, str | Sequence | np.ndarray | mx.array) or not len(prompt):
            raise HookError(f"a prompt of over is a text or a list of token ids, and not empty; got {prompt!r}.")


def _is_source(source: Any) -> bool:
    one = ActivationCache | CapturedActivation | Mapping
    if isinstance(source, list | tuple):
        return bool(source) and all(isinstance(entry, CapturedActivation | Mapping) for entry in source)
    return isinstance(source, one | mx.array | np.ndarray)


@contextmanager
def blame(i: int, intervention: Any) -> Iterator[None]:
    """Say in an error which intervention it is about, in words and as ``error.intervention``."""
    try:
        yield
    except HookError as error:
        what = f" ({intervention.type} at {intervention.where})" if isinstance(intervention, Intervention) else ""
        blamed = type(error)(f"Intervention {i}{what}: {error}")
        blamed.intervention = i
        raise blamed from error
