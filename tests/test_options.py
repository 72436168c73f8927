"""Options: faults told in one sentence, with what is allowed."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field

from mlx_hooks.errors import HookError
from mlx_hooks.options import options, options_of
from mlx_hooks.training.config import MechIntConfig


@options
class Some:
    """Of each kind one."""

    folds: Annotated[int, Field(ge=2)] = 5
    kind: Literal["a", "b"] = "a"
    names: Sequence[str | int] | None = None
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.kind == "b" and self.names is None:
            raise ValueError("kind 'b' needs names.")


@pytest.mark.parametrize(
    ("given", "said", "field"),
    [
        ({"folds": 1}, "folds must be greater than or equal to 2, got 1.", "folds"),
        ({"folds": "3"}, "folds must be a valid integer, got '3'.", "folds"),
        ({"folds": True}, "folds must be a valid integer, got True.", "folds"),
        ({"kind": "c"}, "kind must be 'a' or 'b', got 'c'.", "kind"),
        ({"names": "abc"}, "names must be a list, got 'abc'.", "names"),
        ({"names": ["a", 1.5]}, "names[1] must be a valid string or a valid integer, got 1.5.", "names"),
        ({"rate": float("nan")}, "rate must be a finite number, got nan.", "rate"),
        ({"other": 1}, "Some has no field 'other'. There are: folds, kind, names, rate.", "other"),
        ({"kind": "b"}, "kind 'b' needs names.", None),
    ],
)
def test_faults_are_told_in_a_sentence(given: dict[str, Any], said: str, field: str | None) -> None:
    with pytest.raises(HookError) as caught:
        options_of(Some, given)
    assert (str(caught.value), caught.value.field) == (said, field)


def test_options_are_plain_frozen_values() -> None:
    some = options_of(Some, {"names": ["a", 1], "rate": 2})
    assert asdict(some) == {"folds": 5, "kind": "a", "names": ["a", 1], "rate": 2.0}
    assert options_of(Some, some) is some
    assert options_of(Some, None) == Some()
    with pytest.raises(HookError, match="greater than"):
        replace(some, folds=0)
    with pytest.raises(AttributeError):
        some.folds = 3  # type: ignore[misc]
    with pytest.raises(HookError, match="by name: folds"):
        Some(3)  # type: ignore[call-arg]
    with pytest.raises(HookError, match="as a mapping, got list"):
        options_of(Some, [])


GUIDE = {
    "sample_layers": ["blocks.3", "hook_embed"],
    "save_hidden_every_n_steps": 200,
    "analyses_to_run": ["sae", "neuron", "circuit", "feature", "causal"],
    "storage_backend": "both",
    "storage_path": "./mechint_cache",
    "s3_bucket": "a-bucket",
    "s3_prefix": "experiments/one",
    "max_activations_per_shard": 10000,
    "enable_feature_steering": False,
    "verbose": True,
}


def test_the_guides_configuration_is_taken() -> None:
    config = MechIntConfig.of(GUIDE)
    assert config == MechIntConfig(**GUIDE)
    assert {key: config.to_dict()[key] for key in GUIDE} == GUIDE
    default = MechIntConfig()
    assert (default.sample_layers, default.save_hidden_every_n_steps, default.storage_backend) == (None, 200, "local")
    assert list(default.analyses_to_run) == ["sae", "neuron", "feature"]
    assert (default.max_activations_per_shard, str(default.storage_path)) == (10_000, "./mechint_cache")
    assert (default.s3_bucket, default.enable_feature_steering, default.verbose) == (None, False, True)


def test_a_folder_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert MechIntConfig(storage_path="~/captures").storage_path == tmp_path / "captures"
    assert MechIntConfig(storage_path="a~b").storage_path == "a~b"


def test_options_of_analyses_are_kept_as_json() -> None:
    config = MechIntConfig(analysis_options={"sae": {"k": np.int64(3), "layers": (1, 2)}})
    assert json.loads(json.dumps(config.to_dict()))["analysis_options"] == {"sae": {"k": 3, "layers": [1, 2]}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"save_hidden_every_n_steps": 0}, "save_hidden_every_n_steps must be greater than or equal to 1, got 0."),
        ({"analyses_to_run": ["magic"]}, "analyses_to_run[0] must be 'sae', 'neuron', "),
        ({"analyses_to_run": ["sae", "sae"]}, "names each once"),
        ({"storage_backend": "s3"}, "storage_backend 's3' needs s3_bucket."),
        ({"sample_layers": []}, "at least one layer"),
        ({"sample_layer": ["x"]}, "MechIntConfig has no field 'sample_layer'. There are: sample_layers, "),
        ({"storage_path": ""}, "names a folder"),
        ({"analysis_options": {"magic": {}}}, "analysis_options must be"),
        ({"analysis_options": {"sae": {"k": object()}}}, "analysis_options['sae']['k'] is plain JSON: "),
        ({"storage_backend": "s3", "s3_bucket": "  "}, "s3_bucket has letters, digits, dots and hyphens, got '  '."),
        ({"s3_prefix": " "}, "blanks around them, or \"\" for the bucket's root, got ' '."),
        ({"s3_prefix": "/"}, "s3_prefix is a folder of the bucket, with no empty names"),
        ({"s3_prefix": "a/ b"}, "got 'a/ b'."),
        ({"s3_prefix": "a//b"}, "got 'a//b'."),
        ({"storage_path": "~no-such-person/captures"}, "storage_path names a folder, got '~no-such-person/captures'"),
    ],
)
def test_a_wrong_configuration_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(HookError) as caught:
        MechIntConfig.of(given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
