"""``MechIntConfig``: what is captured while a model trains, where it is stored, and which analyses follow."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..errors import HookError
from ..options import options, options_of, plain_json

ANALYSES = ("sae", "neuron", "feature", "circuit", "causal", "probe", "heads")

AnalysisName = Literal["sae", "neuron", "feature", "circuit", "causal", "probe", "heads"]
Count = Annotated[int, Field(ge=1)]

_BUCKET = re.compile(r"[A-Za-z0-9._:/-]+")
"""A bucket's name, or the address of an access point."""


@options
class MechIntConfig:
    """Settings of capturing during training and of the analyses afterwards.

        config = MechIntConfig(sample_layers=["model.layers.1", "blocks.*.hook_mlp_out"], save_hidden_every_n_steps=100)

    Args:
        sample_layers: blocks ("model.layers.3", "transformer.h.3", "3", 3), which means the residual stream that leaves
            them, or hook points: names, aliases, globs, raw module paths. None: up to four blocks, evenly spaced, the
            last one among them.
        save_hidden_every_n_steps: training steps from one capture to the next; the first step is captured too.
        analyses_to_run: which analyses ``EvalMechIntRunner`` runs, in this order.
        storage_backend: "local", "s3" (the local file goes once the upload is confirmed) or "both".
        storage_path: the local folder; ``~`` is the home folder.
        s3_bucket, s3_prefix: where in S3; the prefix "" is the bucket's root.
        max_activations_per_shard: the most rows, which are tokens, in one file.
        enable_feature_steering: the ``sae`` analysis steers with the strongest features and tells what that did, where
            there are a model and eval data to run it on; a note of its result says where there are none.
        verbose: show progress; what is captured is logged at level INFO by ``mlx_hooks.training``, which
            ``neuroscope train`` shows.
        writing_ranks: in distributed training, "first" (rank 0 captures and writes) or "all" (each rank writes what it
            sees to a folder of its own).
        max_sequences_per_step: capture the first so many sequences of a batch; None is all of them.
        analysis_options: options of analyses by name, plain JSON: ``{"sae": {"architecture": "topk", "k": 16}}``.

    Raises:
        HookError: for an unknown field, and for a value that is not allowed; ``error.field`` names it.
    """

    sample_layers: Sequence[str | int] | None = None
    save_hidden_every_n_steps: Count = 200
    analyses_to_run: Sequence[AnalysisName] = ("sae", "neuron", "feature")
    storage_backend: Literal["local", "s3", "both"] = "local"
    storage_path: str | Path = "./mechint_cache"
    s3_bucket: str | None = None
    s3_prefix: str = "neuroscope/activations"
    max_activations_per_shard: Count = 10_000
    enable_feature_steering: bool = False
    verbose: bool = True
    writing_ranks: Literal["first", "all"] = "first"
    max_sequences_per_step: Count | None = None
    analysis_options: Mapping[AnalysisName, Mapping[str, Any]] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sample_layers is not None and not self.sample_layers:
            raise HookError("sample_layers names at least one layer; None detects them.", field="sample_layers")
        if not str(self.storage_path).strip():
            raise HookError("storage_path names a folder, got ''.", field="storage_path")
        if self.storage_backend != "local" and not self.s3_bucket:
            raise HookError(f"storage_backend {self.storage_backend!r} needs s3_bucket.", field="s3_bucket")
        if self.s3_bucket and not _BUCKET.fullmatch(self.s3_bucket):
            raise HookError(
                f"s3_bucket has letters, digits, dots and hyphens, got {self.s3_bucket!r}.", field="s3_bucket"
            )
        if self.s3_prefix and not all(name and name == name.strip() for name in self.s3_prefix.strip("/").split("/")):
            raise HookError(
                's3_prefix is a folder of the bucket, with no empty names and no blanks around them, or "" for the '
                f"bucket's root, got {self.s3_prefix!r}.",
                field="s3_prefix",
            )
        for name, values in (("sample_layers", self.sample_layers or ()), ("analyses_to_run", self.analyses_to_run)):
            if len(set(values)) < len(values):
                raise HookError(f"{name} names each once, got {list(values)}.", field=name)
        plain_json(self.analysis_options, "analysis_options")
        if str(self.storage_path).startswith("~"):
            # What is read from a file no shell has expanded; frozen values are set so alone.
            object.__setattr__(self, "storage_path", _at_home(self.storage_path))

    @classmethod
    def of(cls, given: "MechIntConfig | Mapping[str, Any] | None") -> "MechIntConfig":
        """A configuration from a mapping with the same names; None is the defaults."""
        return options_of(cls, given)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = asdict(self)
        listed = {name: list(value) for name, value in plain.items() if isinstance(value, tuple)}
        given = {"analysis_options": plain_json(self.analysis_options, "analysis_options")}
        return plain | listed | given | {"storage_path": str(self.storage_path)}


def _at_home(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise HookError(f"storage_path names a folder, got {str(path)!r}: {error}", field="storage_path") from error
