"""What the query of an address may hold: numbers, truths and ranges, spelled as text."""

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .fields import MAX_ID_LENGTH, MAX_RANGE_LENGTH, FolderName, Name, Request, must


class NoQuery(Request):
    """The query of an address that takes no parameters."""


class ModelQuery(Request):
    """``?model=``"""

    model: Annotated[str, Field(max_length=MAX_ID_LENGTH)] | None = Field(None, description="A loaded model's id.")


class ExperimentQuery(Request):
    """``?experiment=``"""

    experiment: FolderName | None = Field(None, description="One experiment, in the place of all.")


_NUMBER = r"-?[0-9]{1,9}"
_SPAN = rf"({_NUMBER})?:({_NUMBER})?|{_NUMBER}(,{_NUMBER})*"
_WANTED = "'2', '0,2,5' or '2:10', where negative ones count from the end"


def _is_spelled(pattern: str, wanted: str) -> AfterValidator:
    fits = re.compile(pattern).fullmatch
    return AfterValidator(must(lambda text: len(text) <= MAX_RANGE_LENGTH and bool(fits(text)), wanted))


def _pattern(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^({pattern})$", "maxLength": MAX_RANGE_LENGTH})


Range = Annotated[str, _is_spelled(_SPAN, _WANTED), _pattern(_SPAN)]
PositionRange = Annotated[str, _is_spelled(f"last|{_SPAN}", f"'last', {_WANTED}"), _pattern(f"last|{_SPAN}")]


class CapturesQuery(Request):
    """Which part of the list of captures."""

    limit: int = Field(100, ge=1, le=1000, description="The most of them.")
    after: Name | None = Field(None, description="The last capture's id of the part before.")


class RangeQuery(Request):
    """Which part of a capture, and as what."""

    positions: PositionRange | None = Field(
        None, description="Absolute positions. `last` is the prompt's last token and each generated one."
    )
    heads: Range | None = Field(None, description="Query heads; at k and v, the key-value heads that serve them.")
    layers: Range | None = Field(None, description="What belongs to no layer is left out.")
    hook_point: Name | None = Field(
        None,
        description="The arrays of one hook point, or of those that a glob means: `blocks.*.attn.hook_z`. What stands "
        "in an array's name behind the hook id names that array alone.",
    )
    reduce: Literal["mean", "max", "last", "norm"] | None = Field(
        None,
        description="Over positions, after the selection; `norm` is L2 over the last axis. "
        "Computed in float64, rounded to float32, sent as `dtype`.",
    )
    format: Literal["json", "npy", "safetensors"] = Field("json", description="`npy` holds one array.")
    encoding: Literal["json", "base64", "none"] = Field(
        "json", description="Of `format=json`; refused with the others."
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="Of numbers that are no integers.")

    @model_validator(mode="after")
    def _encoding_of_json(self) -> "RangeQuery":
        if "encoding" in self.model_fields_set and self.format != "json":
            raise PydanticCustomError(
                "encoding", "Query parameter 'encoding' belongs to format=json: leave it out", {"param": "encoding"}
            )
        return self
