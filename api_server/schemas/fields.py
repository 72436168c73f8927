"""What single fields of requests may hold: limits, types that word their own faults, and marks on fields."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticUseDefault, core_schema

from mlx_hooks.sampling import LOWEST_TEMPERATURE

MAX_TOKENS = 32768
DEFAULT_MAX_TOKENS = 100
MAX_MESSAGES = 1024
MAX_HOOKS = 2048
MAX_INTERVENTIONS = 256
MAX_PROMPTS = 256
MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
MAX_SEED = 2**63 - 1
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_TEXT_LOGPROBS = 5
MAX_BIASES = 1024
MAX_BIAS = 100
MAX_CONTENT_PARTS = 1024
MAX_COMPONENTS = 16
MAX_DIRECTIONS = 64
MAX_PREDICTIONS = 200_000
"""Tokens that a reply of the logit lens lists, of all layers and positions together."""

MAX_VECTORS = 256
"""Traits that one request watches, given and stored ones together."""
MAX_SCORES = 1_000_000
"""Numbers that a reply about traits may come to: one per token and trait."""
MAX_LAYERS = 10_000
MAX_WIDTH = 65_536
"""Numbers of a vector."""

MAX_TOKEN_ID = 2**31 - 1
MAX_ID_LENGTH = 200
MAX_RANGE_LENGTH = 10_000

ID_RULE = f"1 to {MAX_ID_LENGTH} printable characters, where no part between slashes is empty, '.' or '..'"
MODEL_PARTS = ("hook_points", "selftest")
"""What stands behind a model's id in an address."""
MODEL_ID_RULE = f"{ID_RULE}, neither 'load' nor ending in {' or '.join(repr('/' + part) for part in MODEL_PARTS)}"


def is_hook_id(text: str) -> bool:
    """Whether ``text`` can stand in an address: ``a/b`` can, ``a/../b`` would be another one."""
    return len(text) <= MAX_ID_LENGTH and text.isprintable() and not {"", ".", ".."} & set(text.split("/"))


def is_model_id(text: str) -> bool:
    """The same, and no address of its own: ``load`` is one."""
    return is_hook_id(text) and text != "load" and text.split("/")[-1] not in MODEL_PARTS


def must(fits: Callable[[Any], bool], wanted: str) -> Callable[[Any], Any]:
    """A check that says one sentence."""

    def check(value: Any) -> Any:
        if fits(value):
            return value
        raise PydanticCustomError("unfit", "Input should be {wanted}", {"wanted": wanted})

    return check


@dataclass(frozen=True)
class Inert(AfterValidator):
    """Marks a field that has no effect, and describes it by the values that it takes."""

    values: tuple[Any, ...] = ()

    def __get_pydantic_json_schema__(self, schema: Any, describe: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self.values), "description": "Accepted, without effect."}


class OrNull:
    """Marks a field whose null is the default, which its type does not show."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, describe: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [describe(schema), {"type": "null"}]}

    @staticmethod
    def _check(value: Any) -> Any:
        if value is None:
            raise PydanticUseDefault
        return value


def only(*values: Any) -> Inert:
    """A field that is taken at these values, which ask for nothing, and has no effect."""

    def check(value: Any) -> Any:
        # true is not 1, but 0.0 is 0.
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
            return value
        said = " or ".join(json.dumps(one) for one in values)
        raise PydanticCustomError("only", "only {said} is supported", {"said": said})

    return Inert(check, values)


def supported(model: type[BaseModel]) -> list[str]:
    """The fields of a request that have an effect, in order."""
    fields = model.model_fields.items()
    return [name for name, field in fields if not any(isinstance(mark, Inert) for mark in field.metadata)]


Name = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
"""An id in a question: an unknown one is answered with those that there are."""
ModelId = Annotated[Name, AfterValidator(must(is_model_id, MODEL_ID_RULE))]
HookId = Annotated[Name, AfterValidator(must(is_hook_id, ID_RULE))]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]


MAX_TEMPERATURE = 2
Temperature = Annotated[
    float,
    Field(ge=0, le=MAX_TEMPERATURE),
    AfterValidator(
        must(lambda value: value == 0 or value >= LOWEST_TEMPERATURE, f"0 or at least {LOWEST_TEMPERATURE}")
    ),
    WithJsonSchema(
        {"anyOf": [{"const": 0}, {"type": "number", "minimum": LOWEST_TEMPERATURE, "maximum": MAX_TEMPERATURE}]}
    ),
]


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in value)
    return isinstance(value, str) and bool(value)


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= MAX_STOPS and all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_LENGTH for text in texts)


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)],
    # Before the union's own check, which would say a sentence per member.
    BeforeValidator(
        must(_is_stop, f"a string of 1 to {MAX_STOP_LENGTH} characters or a list of at most {MAX_STOPS} of them")
    ),
]
Prompt = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[list[TokenId], Field(min_length=1)],
    BeforeValidator(must(_is_prompt, "a string or a list of token ids, and not empty")),
]


def _is_bias(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_BIASES
        and all(key.isascii() and key.isdigit() and len(key) < 11 and str(int(key)) == key for key in value)
        and all(type(bias) in (int, float) and -MAX_BIAS <= bias <= MAX_BIAS for bias in value.values())
    )


LogitBias = Annotated[
    dict[str, float],
    BeforeValidator(
        must(
            _is_bias,
            f"an object of at most {MAX_BIASES} token ids, each with a number from -{MAX_BIAS} to {MAX_BIAS}",
        )
    ),
]


class Request(BaseModel):
    """The base of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def _are_indices(value: Any) -> bool:
    """A list of indices, each once."""
    return isinstance(value, list) and all(_is_index(index) for index in value) and 0 < len(value) == len(set(value))


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN_ID


def _is_selection(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and not set(value) - {"start", "stop"} and all(_is_index(end) for end in value.values())
    return _is_index(value) or _are_indices(value)


def _are_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_are_numbers(one) for one in value)
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_source(value: Any) -> bool:
    records = value if isinstance(value, list) else [value]
    return bool(records) and all(isinstance(record, dict) for record in records)


_SELECTION = "an index from 0 up, a list of different ones, or an object with 'start', 'stop' or both"
_HEADS = "an index from 0 up or a list of different ones"

# What these check themselves, and say in one sentence, is told to the description in JSON Schema.
_INDEX: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
_INDICES: dict[str, Any] = {"type": "array", "items": _INDEX, "minItems": 1, "uniqueItems": True}
_INTERVAL: dict[str, Any] = {
    "type": "object",
    "properties": {"start": _INDEX, "stop": _INDEX},
    "additionalProperties": False,
    "minProperties": 1,
}
_NULL: dict[str, Any] = {"type": "null"}


def _lists_of_numbers(depth: int) -> dict[str, Any]:
    """A number, null, or lists of these nested up to ``depth`` deep: as many axes as an activation has."""
    if not depth:
        return {"type": ["number", "null"]}
    inner = _lists_of_numbers(depth - 1)
    return {"anyOf": [{"type": ["number", "null"]}, {"type": "array", "items": inner, "minItems": 1}]}


_RECORD: dict[str, Any] = {
    "type": "object",
    "description": "an activation record, as this server returns it",
    "required": ["hook_point", "axes", "positions", "shape", "dtype", "data"],
}

Selection = Annotated[
    Any,
    BeforeValidator(must(_is_selection, _SELECTION)),
    WithJsonSchema({"anyOf": [_INDEX, _INDICES, _INTERVAL, _NULL], "description": _SELECTION}),
]
Positions = Annotated[
    Any,
    BeforeValidator(must(lambda value: value == "last" or _is_selection(value), f"'last', {_SELECTION}")),
    WithJsonSchema(
        {"anyOf": [{"const": "last"}, _INDEX, _INDICES, _INTERVAL, _NULL], "description": f"'last', {_SELECTION}"}
    ),
]
Heads = Annotated[
    Any,
    BeforeValidator(must(lambda value: _is_index(value) or _are_indices(value), _HEADS)),
    WithJsonSchema({"anyOf": [_INDEX, _INDICES, _NULL], "description": _HEADS}),
]
Numbers = Annotated[
    Any,
    BeforeValidator(must(_are_numbers, "a number, or lists of numbers")),
    WithJsonSchema(_lists_of_numbers(5) | {"description": "a number, or lists of numbers; null is -inf"}),
]
Source = Annotated[
    Any,
    BeforeValidator(must(_is_source, "an activation record or a list of records")),
    WithJsonSchema({"anyOf": [_RECORD, {"type": "array", "items": _RECORD, "minItems": 1}, _NULL]}),
]


def _is_token(value: Any) -> bool:
    return _is_index(value) or (isinstance(value, str) and bool(value))


def _are_directions(value: Any) -> bool:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_DIRECTIONS:
        return False
    return all(map(_is_token, value)) or all(
        isinstance(one, list) and len(one) == 2 and all(map(_is_token, one)) for one in value
    )


_DIRECTIONS = f"a list of 1 to {MAX_DIRECTIONS} tokens, or of pairs of tokens, each an id or a text"
_DIRECTION = "a list of one token, or of one pair of tokens, [[a, b]], each an id or a text"
_ALL_POSITIONS = f"'all', {_SELECTION}"
_TOKEN: dict[str, Any] = {"anyOf": [_INDEX, {"type": "string", "minLength": 1}]}
_PAIR: dict[str, Any] = {"type": "array", "items": _TOKEN, "minItems": 2, "maxItems": 2}


def _list_of(item: dict[str, Any], most: int = MAX_DIRECTIONS) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1, "maxItems": most}


Directions = Annotated[
    Any,
    BeforeValidator(must(_are_directions, _DIRECTIONS)),
    WithJsonSchema({"anyOf": [_list_of(_TOKEN), _list_of(_PAIR)], "description": _DIRECTIONS}),
]
Direction = Annotated[
    Any,
    BeforeValidator(must(lambda value: _are_directions(value) and len(value) == 1, _DIRECTION)),
    WithJsonSchema({"anyOf": [_list_of(_TOKEN, 1), _list_of(_PAIR, 1)], "description": _DIRECTION}),
]
PromptPositions = Annotated[
    Any,
    BeforeValidator(must(lambda value: value == "all" or _is_selection(value), _ALL_POSITIONS)),
    WithJsonSchema({"anyOf": [{"const": "all"}, _INDEX, _INDICES, _INTERVAL], "description": _ALL_POSITIONS}),
]


FOLDER_RULE = f"1 to {MAX_ID_LENGTH} printable characters without '/' and '\\', and no '.' at the beginning"


def is_folder_name(text: str) -> bool:
    """Whether ``text`` can name one folder in another, and nothing else."""
    return (
        0 < len(text) <= MAX_ID_LENGTH
        and text.isprintable()
        and not text.startswith(".")
        and not {"/", "\\"} & set(text)
    )


FolderName = Annotated[
    str,
    AfterValidator(must(is_folder_name, FOLDER_RULE)),
    WithJsonSchema({"type": "string", "pattern": r"^[^./\\][^/\\]*$", "maxLength": MAX_ID_LENGTH}),
]

_LARGEST = 3.4028234663852886e38  # of float32


def _is_vector(value: Any) -> bool:
    if isinstance(value, dict):
        return all(name in value for name in _VECTOR_RECORD["required"])
    return isinstance(value, list) and 0 < len(value) <= MAX_WIDTH and _are_float32(value)


def _are_float32(values: list[Any]) -> bool:
    # Not one by one in Python: a body has room for millions, and nobody else is answered meanwhile.
    if not set(map(type, values)) <= {int, float}:
        return False
    try:
        numbers = np.array(values, np.float64)
    except OverflowError:
        return False
    # nan is not below it.
    return bool((np.abs(numbers) <= _LARGEST).all())


_VECTOR_RECORD: dict[str, Any] = {
    "type": "object",
    "description": "an array as this server sends them; other fields of an activation record may be there",
    "required": ["shape", "dtype", "encoding", "data"],
}
_VECTOR = (
    f"a list of at most {MAX_WIDTH} finite numbers that float32 can hold, or an object with shape, dtype, encoding and "
    "data"
)
Vector = Annotated[
    Any,
    BeforeValidator(must(_is_vector, _VECTOR)),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "array",
                    "items": {"type": "number", "minimum": -_LARGEST, "maximum": _LARGEST},
                    "minItems": 1,
                    "maxItems": MAX_WIDTH,
                },
                _VECTOR_RECORD,
            ],
            "description": _VECTOR,
        }
    ),
]


def one_of(*choices: tuple[str, ...]) -> dict[str, Any]:
    """JSON Schema of "exactly one of these groups of fields is given", where null is not given."""
    names = [name for choice in choices for name in choice]

    def given(choice: tuple[str, ...]) -> dict[str, Any]:
        fields = {name: {"not": _NULL} if name in choice else _NULL for name in names}
        return {"required": list(choice), "properties": fields}

    return {"oneOf": [given(choice) for choice in choices]}


def null_is_none(value: Any, check: Callable[[Any], Any]) -> Any:
    """A field that checks itself takes null as not given."""
    return None if value is None else check(value)
