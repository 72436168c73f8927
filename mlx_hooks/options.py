"""Options: frozen dataclasses whose values are checked by pydantic, each fault told in one sentence."""

import math
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from .errors import HookError

T = TypeVar("T")

_CONFIG = ConfigDict(
    extra="forbid", strict=True, validate_default=True, allow_inf_nan=False, arbitrary_types_allowed=True
)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """Make a class of annotated fields a frozen dataclass that refuses what it does not know or allow.

        @options
        class ProbeOptions:
            folds: Annotated[int, Field(ge=2)] = 5

        ProbeOptions(folds=1)   # HookError: folds must be greater than or equal to 2, got 1.

    Types are strict: a text is no number, and True is no 1. Values are given by name. ``__post_init__`` may raise a
    HookError of its own.
    """
    made: Any = dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls)
    check = made.__init__

    @wraps(check)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        if args:
            raise HookError(f"The fields of {made.__name__} are given by name: {_fields(made)}.")
        try:
            check(self, **values)
        except ValidationError as error:
            raise _told(error, made) from None

    made.__init__ = __init__
    return made


def options_of(cls: type[T], given: Any) -> T:
    """Options from an instance, a mapping with their names, or None for the defaults.

    Raises:
        HookError: for what is none of these, and for unknown or wrong fields.
    """
    if isinstance(given, cls):
        return given
    if given is None:
        return cls()
    if not isinstance(given, Mapping):
        raise HookError(f"{cls.__name__} is given as such or as a mapping, got {type(given).__name__}.")
    return cls(**{str(name): value for name, value in given.items()})


def plain_json(value: Any, name: str) -> Any:
    """A value as JSON has it: arrays and numbers of MLX and NumPy become lists and Python's numbers, paths texts, and a
    number that is infinite or none (a loss that diverged) becomes None.

    Raises:
        HookError: for anything else; ``name`` says where the value stands.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_json(inner, f"{name}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain_json(value.tolist(), name)
    raise HookError(
        f"{name} is plain JSON: texts, numbers, true, false, null, lists and mappings of these; got "
        f"{type(value).__name__}.",
        field=name.partition("[")[0],
    )


def _told(error: ValidationError, cls: type) -> HookError:
    faults = error.errors(include_url=False)
    fault = faults[0]
    if not fault["loc"]:
        # A check of the class's own.
        return HookError(str(fault.get("ctx", {}).get("error", fault["msg"])))
    field = str(fault["loc"][0])
    if fault["type"] == "unexpected_keyword_argument":
        return HookError(f"{cls.__name__} has no field {field!r}. There are: {_fields(cls)}.", field=field)
    if fault["type"] == "missing":
        return HookError(f"{cls.__name__} needs {field}.", field=field)
    # The branches of a union are told together; behind the field, numbers are places in a list.
    same = [one for one in faults if one["loc"][:1] == fault["loc"][:1] and one["input"] is fault["input"]]
    wanted = " or ".join(dict.fromkeys(map(_wanted, same)))
    place = "".join(f"[{part}]" for part in fault["loc"][1:] if isinstance(part, int))
    return HookError(f"{field}{place} must be {wanted}, got {fault['input']!r:.100}.", field=field)


def _wanted(fault: Any) -> str:
    """What pydantic says that the value should be, as the end of a sentence."""
    if fault["type"] in ("sequence_str", "list_type", "tuple_type"):
        return "a list"
    if fault["type"] == "is_instance_of" and fault["ctx"]["class"] == "Sequence":
        return "a list"
    return str(fault["msg"]).removeprefix("Input should be ")


def _fields(cls: Any) -> str:
    return ", ".join(cls.__dataclass_fields__)
