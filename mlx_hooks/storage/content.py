"""What a run holds: an activation cache, an array or arrays by name, in one file, restored as it was given."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ..activations import ActivationCache, CapturedActivation, labels
from ..errors import HookError
from ..hook_points import HookPoint
from ..interventions import InterventionReceipt
from .metadata import MADE_WITH
from .tensors import Array, TensorFile, check_storable, type_name, write_arrays

_CONTENT = "content"


class SavedActivation(CapturedActivation):
    """A record whose value lies in a run's file and is read from it at each access."""

    def __init__(self, fields_but_value: dict[str, Any], file: TensorFile, key: str) -> None:
        # The class is frozen, and ``value`` is a property here.
        self.__dict__.update(fields_but_value, _file=file, _key=key)

    @property
    def value(self) -> mx.array:
        """The value, read from the file."""
        return cast(TensorFile, self.__dict__["_file"]).read(self.__dict__["_key"])

    @property
    def nbytes(self) -> int:
        return cast(TensorFile, self.__dict__["_file"]).nbytes(self.__dict__["_key"])

    def __repr__(self) -> str:
        return f"SavedActivation({self.hook_point.name}, positions {self.positions}, {self.__dict__['_file'].path})"


class SavedArrays(Mapping[str, Array]):
    """Arrays by name that lie in a run's file and are read from it at each access."""

    def __init__(self, file: TensorFile, libraries: dict[str, str]) -> None:
        self._file = file
        self._libraries = libraries

    def __getitem__(self, name: str) -> Array:
        return self._file.read(name) if self._libraries[name] == "mlx" else self._file.numpy(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._libraries)

    def __len__(self) -> int:
        return len(self._libraries)

    def __repr__(self) -> str:
        return f"SavedArrays({', '.join(self)})"


class Content:
    """What is to be saved, checked.

    Args:
        activations: an activation cache, an array, or arrays by name.

    Raises:
        HookError: it is none of these, or has a type of numbers that cannot be saved.
    """

    def __init__(self, activations: Any) -> None:
        self.arrays: dict[str, Callable[[], Array]] = {}
        """What answers each array of the file."""
        self.keys: dict[str, Any] = {}
        """What metadata.json tells of each."""
        self._described: dict[str, Any]
        """How what was given is made of the arrays."""
        if isinstance(activations, ActivationCache):
            self._describe_cache(activations)
        elif isinstance(activations, Mapping):
            self._describe_arrays(activations, "arrays")
        else:
            self._describe_arrays({"value": activations}, "array")

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            OSError: it cannot be written.
        """
        write_arrays(path, self.arrays, {"format": "mlx", _CONTENT: json.dumps(self._described)})

    def _describe_arrays(self, given: Mapping[Any, Any], kind: str) -> None:
        libraries = {}
        for name, value in given.items():
            if not isinstance(name, str) or name == "__metadata__":
                raise HookError(f"Arrays are saved by name, a text other than '__metadata__'; got {name!r}.")
            array = _array(value, f" as {name!r}" if kind == "arrays" else "")
            _check(name, array)
            self.arrays[name] = lambda array=array: array  # type: ignore[misc]
            self.keys[name] = {"shape": list(array.shape), "dtype": type_name(array)}
            libraries[name] = "mlx" if isinstance(array, mx.array) else "numpy"
        self._described = {"kind": kind, "libraries": libraries}

    def _describe_cache(self, cache: ActivationCache) -> None:
        described = []
        for name, records in cache.records.items():
            for i, record in enumerate(records):
                key = name if not i else f"{name}@{i}"
                self.arrays[key] = lambda record=record: record.value  # type: ignore[misc]
                described.append({"key": key, **_plain_labels(record)})
            first = records[0].value
            _check(name, first)
            self.keys[name] = {
                "axes": list(records[0].hook_point.axes),
                "dtype": type_name(first),
                "shapes": [list(record.value.shape) for record in records],
            }
        self._described = {
            "kind": "cache",
            "records": described,
            "mapping_index": [[label, entries] for label, entries in cache.mapping_index.items()],
            "token_positions": [_plain_ids(row) for row in cache.token_positions],
            "row_lengths": cache.row_lengths,
            "receipts": [receipt.to_dict() for receipt in cache.interventions],
        }


def _array(value: Any, where: str) -> Array:
    if isinstance(value, np.ma.MaskedArray):
        raise HookError(f"A masked array{where} would lose its mask: give its data and its mask as two arrays.")
    if isinstance(value, mx.array | np.ndarray):
        return value
    if hasattr(value, "__array__"):
        return np.asarray(value)
    raise HookError(
        f"What can be saved is an activation cache, an array or arrays by name; got {type(value).__name__}{where}."
    )


def _check(name: str, array: Array) -> None:
    try:
        check_storable(name, array)
    except TypeError as error:
        raise HookError(f"{error}.") from error


def _plain_labels(record: CapturedActivation) -> dict[str, Any]:
    point = record.hook_point
    described = labels(record)
    described["hook_point"] = {f.name: getattr(point, f.name) for f in fields(HookPoint)}
    described["position_ids"] = _plain_ids(record.position_ids)
    return described


def _plain_ids(ids: Sequence[int]) -> Any:
    """Positions as JSON: an interval by its ends, so that the header of a long text's activations stays short."""
    if len(ids) > 2 and list(ids) == list(range(ids[0], ids[-1] + 1)):
        return {"start": ids[0], "stop": ids[-1] + 1}
    return list(ids)


def _ids(plain: Any) -> Sequence[int]:
    return range(plain["start"], plain["stop"]) if isinstance(plain, dict) else plain


def read_content(path: Path, metadata: Mapping[str, Any]) -> Any:
    """What was saved, of values that are read when they are asked for.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file of a run's; one clause says why.
    """
    file = TensorFile(path)
    if _CONTENT not in file.notes:
        raise ValueError("it is no run's file")
    try:
        return _restored(file, json.loads(file.notes[_CONTENT]), metadata)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("its description is damaged") from error


def _restored(file: TensorFile, content: dict[str, Any], metadata: Mapping[str, Any]) -> Any:
    if content["kind"] == "arrays":
        return SavedArrays(file, content["libraries"])
    if content["kind"] == "array":
        return SavedArrays(file, content["libraries"])["value"]
    cache = ActivationCache()
    for described in content["records"]:
        key = described.pop("key")
        # Here, rather than when the value is asked for, a lack is noticed.
        file.nbytes(key)
        cache.add(SavedActivation(_labels(described), file, key))
    cache.mapping_index = {tuple(w) if isinstance(w, list) else w: entries for w, entries in content["mapping_index"]}
    cache.token_positions = [list(_ids(row)) for row in content["token_positions"]]
    cache.row_lengths = content["row_lengths"]
    cache.interventions = tuple(InterventionReceipt(**_with_tuples(receipt)) for receipt in content["receipts"])
    cache.metadata = {key: metadata.get(key) for key in MADE_WITH}
    return cache


def _labels(described: dict[str, Any]) -> dict[str, Any]:
    return described | {
        "hook_point": HookPoint(**_with_tuples(described["hook_point"])),
        "position_ids": _ids(described["position_ids"]),
        "heads": None if described["heads"] is None else tuple(described["heads"]),
    }


def _with_tuples(plain: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
