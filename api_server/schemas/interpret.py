"""What ``/interpret`` takes and gives: analyses of activations that were captured, or come with the request."""

import re
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError, from_json

from mlx_hooks.training.config import AnalysisName

from .fields import MAX_ID_LENGTH, Name, OrNull, Request
from .replies import Reply

_OF_MODEL = "The model that is run, the one loaded last by default; where none is run, it spells tokens."
_BACKGROUND = "Answer 202 and the job at once; its `result` is the reply in the end."
_LAYER = (
    "A captured layer, by any of its names: `blocks.2.hook_resid_post`, `2`. By default all that suit the analysis."
)

Label = str | bool | int | float | None

_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")
_OF_ROWS = [name for name in get_args(AnalysisName) if name not in ("circuit", "causal")]
"""Analyses that read activations."""


def _labels(given: Any) -> Any:
    """As they came; pydantic would tell what each kind of a union lacks."""
    values = given.values() if isinstance(given, dict) else given if isinstance(given, list) else None
    if values is None and given is not None:
        raise PydanticCustomError("unfit", "Input should be a list, one per row, or an object from tokens to labels")
    if not all(isinstance(value, Label) for value in values or ()):
        raise PydanticCustomError("unfit", "Input should have texts, numbers, truth values and null as labels")
    return given


def _eval_data(given: Any) -> Any:
    """As it came, if its items can be data; the engine knows kinds that JSON has not."""
    if isinstance(given, list) and not all(isinstance(item, str | list | dict) for item in given):
        kinds = "texts, lists of token ids, or objects with clean and answer"
        raise PydanticCustomError("unfit", "Input should be a list of {kinds}", {"kinds": kinds})
    return given


def _without_default(schema: dict[str, Any]) -> None:
    """A form has texts, and a default may be none."""
    schema.pop("default", None)


class InterpretConfig(Request):
    """Options of the analysis, by their names, and what it is made of besides what was captured."""

    model_config = ConfigDict(extra="allow")

    eval_data: Annotated[Annotated[list[Any], Field(min_length=1)] | None, BeforeValidator(_eval_data)] = Field(
        None,
        description="What the model is run on by `circuit` and `causal`, and by `sae` to measure what it does to the "
        "model: texts, rows of token ids, or prompts with `clean` and `answer`, and if wished `corrupted` and `wrong`.",
    )
    labels: Annotated[list[Label] | dict[str, Label] | None, BeforeValidator(_labels)] = Field(
        None,
        description="Of `probe`: one per row, null to leave it out; or by token, an id or a text; others are left out.",
    )
    steps: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None, description="The captured training steps whose rows count; all by default."
    )

    @property
    def besides(self) -> dict[str, Any]:
        """What is no option, as ``EvalContext`` takes it."""
        labels: Any = self.labels
        if isinstance(labels, dict):
            # JSON has no other keys than texts.
            labels = {int(key) if _TOKEN_ID.fullmatch(key) else key: label for key, label in labels.items()}
        found = {"eval_data": self.eval_data, "labels": labels, "steps": self.steps and tuple(self.steps)}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def options(self) -> dict[str, Any]:
        """What the analysis itself takes."""
        return dict(self.model_extra or {})


def _none() -> InterpretConfig:
    return InterpretConfig.model_validate({})


class InterpretRequest(Request):
    """``POST /interpret``: one analysis of what was captured."""

    analysis_type: AnalysisName = Field(description="Which analysis.")
    layer_name: Name | None = Field(None, description=_LAYER)
    config: Annotated[InterpretConfig, OrNull()] = Field(
        default_factory=_none, description="Options, and what else the analysis needs."
    )
    model: Name | None = Field(None, description=_OF_MODEL)
    background: Annotated[bool, OrNull()] = Field(False, description=_BACKGROUND)


def _object(text: Any) -> Any:
    """The JSON object that a form's field spells."""
    try:
        found = from_json(text, allow_inf_nan=False)
    except (ValueError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise PydanticCustomError("unfit", "Input should be a JSON object, written as text")
    return found


def _truth(text: Any) -> bool:
    if text not in ("true", "false"):
        raise PydanticCustomError("unfit", "Input should be 'true' or 'false'")
    return bool(text == "true")


class InterpretUploadRequest(Request):
    """``POST /interpret/upload``, a form (``multipart/form-data``): one analysis of the rows in its file."""

    file: Annotated[str, WithJsonSchema({"type": "string", "contentMediaType": "application/octet-stream"})] = Field(
        description="safetensors or npz, never pickles: arrays [row, ...] by layer, of finite numbers; `tokens`, "
        "`sequence` and `position` [row] may say of which tokens the rows are. A shard of captured activations is one."
    )
    analysis_type: Annotated[AnalysisName, WithJsonSchema({"type": "string", "enum": _OF_ROWS})] = Field(
        description="Which analysis; one that reads activations."
    )
    layer_name: Annotated[
        str | None,
        WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}),
    ] = Field(
        None,
        min_length=1,
        max_length=MAX_ID_LENGTH,
        description="One of the file's arrays; all by default.",
        json_schema_extra=_without_default,
    )
    config: Annotated[
        InterpretConfig,
        BeforeValidator(_object),
        WithJsonSchema({"type": "string", "contentMediaType": "application/json"}),
    ] = Field(default_factory=_none, description="As of `POST /interpret`: a JSON object, written as text.")
    model: Annotated[
        str | None,
        WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH}),
    ] = Field(
        None,
        min_length=1,
        max_length=MAX_ID_LENGTH,
        description=_OF_MODEL,
        json_schema_extra=_without_default,
    )
    background: Annotated[
        bool,
        BeforeValidator(_truth),
        WithJsonSchema({"type": "string", "enum": ["true", "false"]}),
    ] = Field(False, description=_BACKGROUND, json_schema_extra=_without_default)


class LayersReply(Reply):
    layers: list[str] = Field(description="What was captured: canonical names of hook points.")
    shapes: dict[str, list[int]] = Field(description="Of each: rows, then the axes of a row.")
    steps: list[int] = Field(description="The training steps at which it was captured.")
    available: list[str] = Field(description="What could be captured of the loaded model.")


class InterpretReply(Reply):
    analysis_type: AnalysisName
    layer_name: str | None = Field(description="As it was asked for.")
    results: dict[str, Any] = Field(description="By layer; of `circuit` and `causal`, of the model.")
    timestamp: float = Field(description="When it was done, in seconds since 1970.")


class InterpretUploadReply(InterpretReply):
    filename: str = Field(description="The file's name, without what a path could be made of.")
