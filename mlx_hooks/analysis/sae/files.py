"""Autoencoders in SAELens' folders: ``cfg.json``, ``sae_weights.safetensors`` and, where it was measured,
``sparsity.safetensors``.

Written is the configuration of SAELens 6; read are that and the flat one of versions 3 to 5. Whatever would change the
numbers and is not honoured is refused by name.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import HookError
from ...storage import files
from ...storage.tensors import TensorFile, write_arrays
from .autoencoder import NORMALIZATIONS, RESHAPES, SparseAutoencoder

CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SPARSITY = "sparsity.safetensors"
SCALER = "activation_scaler.json"
"""What SAELens writes beside an autoencoder in the middle of its training."""
LAYOUT = "6.0.0"
"""The version of SAELens whose layout is written: without one, SAELens takes a folder for one of before version 6."""
OURS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
"""SAELens' architectures and what they are called here."""
_THEIRS = {ours: theirs for theirs, ours in OURS.items()}
_TYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_FLAT_METADATA = (
    "model_name", "hook_name", "model_class_name", "hook_head_index", "model_from_pretrained_kwargs", "prepend_bos",
    "exclude_special_tokens", "neuronpedia_id", "context_size", "seqpos_slice", "dataset_path", "sae_lens_version",
    "sae_lens_training_version", "hook_name_out", "hook_head_index_out", "hf_hook_name", "hf_hook_name_out",
)  # fmt: skip
"""What SAELens keeps of a flat configuration besides the numbers that it computes with."""


def save_sae(sae: SparseAutoencoder, folder: str | Path) -> Path:
    """Write an autoencoder to a folder, which is made; answers the folder. What was there is replaced.

    Raises:
        HookError: when it cannot be written, or its metadata are no JSON; what was there stays.
    """
    folder = Path(folder)
    try:
        config = json.dumps(config_of(sae), indent=2, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise HookError(f"metadata of an autoencoder are plain JSON values: {error}.", field="metadata") from error
    names = ["W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if sae.threshold is not None else [])]
    contents = {WEIGHTS: {name: partial(getattr, sae, name) for name in names}}
    if sae.log_sparsity is not None:
        contents[SPARSITY] = {"sparsity": partial(getattr, sae, "log_sparsity")}
    with files.writing(folder / CONFIG):
        folder.mkdir(parents=True, exist_ok=True)
        # Each is written beside its place first; only when all are on disk do they take their places.
        with ExitStack() as drafts:
            draft = drafts.enter_context(files.whole_file(folder / CONFIG))
            draft.write_text(config + "\n", encoding="utf-8")
            for name, arrays in contents.items():
                write_arrays(drafts.enter_context(files.whole_file(folder / name)), arrays, {"format": "pt"})
        if sae.log_sparsity is None:
            # That of another autoencoder, which was here before.
            (folder / SPARSITY).unlink(missing_ok=True)
    return folder


def config_of(sae: SparseAutoencoder) -> dict[str, Any]:
    """What ``cfg.json`` says of an autoencoder, in the layout of SAELens 6."""
    metadata = {"sae_lens_version": LAYOUT, "sae_lens_training_version": None, **sae.metadata}
    if _major(metadata["sae_lens_version"]) < 6:
        metadata["sae_lens_version"] = LAYOUT
    config = {
        "architecture": _THEIRS[sae.architecture],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.dtype).removeprefix("mlx.core."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": sae.normalize_activations,
        "reshape_activations": sae.reshape_activations,
        "metadata": metadata,
    }
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": sae.rescale_acts_by_decoder_norm}
    return config


def load_sae(folder: str | Path, *, norm_scaling_factor: float | None = None) -> SparseAutoencoder:
    """Read an autoencoder from a folder of SAELens' layout.

    Args:
        norm_scaling_factor: what rows are multiplied with before an autoencoder of ``expected_average_only_in`` reads
            them; by default what the configuration or ``activation_scaler.json`` says. It is folded into the weights,
            as SAELens folds it.

    Raises:
        HookError: for what cannot be read or is no autoencoder, and for a configuration that would change the numbers
            in a way that is not honoured; it is named.
    """
    folder = Path(folder)
    with files.reading(folder, "autoencoder", CONFIG):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds no mapping")
        told = _told(config if _major(_version(config)) >= 6 else _flat(config))
        scale = norm_scaling_factor
        if told["normalize_activations"] == "expected_average_only_in":
            told["normalize_activations"] = "none"
            scale = _scale(folder, config) if scale is None else scale
        elif scale is not None:
            raise ValueError(f"normalize_activations is {told['normalize_activations']!r}, which takes no factor")
        weights = _weights(folder / WEIGHTS, told.pop("dtype"), told["architecture"])
        sizes = (told.pop("d_in"), told.pop("d_sae"))
        if weights["W_enc"].shape != sizes:
            raise ValueError(f"W_enc is {weights['W_enc'].shape}, and {CONFIG} says {sizes}")
        arrays: dict[str, Any] = {**weights, **told}
        sae = SparseAutoencoder(**arrays, log_sparsity=_sparsity(folder / SPARSITY))
        return sae if scale is None else sae.with_scale(scale)


def _version(config: Mapping[str, Any]) -> Any:
    return config.get("sae_lens_version") or (config.get("metadata") or {}).get("sae_lens_version")


def _major(version: Any) -> int:
    """The first number of a version; 0 without one."""
    first = str(version or "").split(".")[0]
    return int(first) if first.isdecimal() else 0


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of before version 6 as version 6 has it."""
    old = dict(config)
    old.setdefault("hook_name", old.pop("hook_point", None))
    old.setdefault("hook_head_index", old.pop("hook_point_head_index", None))
    architecture = old.setdefault("architecture", "standard")
    function = old.get("activation_fn") or old.get("activation_fn_str") or "relu"
    if function not in ("relu", "topk"):
        raise ValueError(f"its activation_fn is {function!r}, and relu and topk are what is honoured")
    if function == "topk" and architecture not in ("standard", "topk"):
        raise ValueError(f"its architecture is {architecture!r} with activation_fn 'topk', which is not honoured")
    if "topk" in (function, architecture):
        old["architecture"] = "topk"
        old.setdefault("k", None)
        old["k"] = (old.get("activation_fn_kwargs") or {}).get("k", old["k"])
    if old.get("finetuning_scaling_factor"):
        raise ValueError("finetuning_scaling_factor is not honoured")
    normalize = old.get("normalize_activations")
    old["normalize_activations"] = {True: "expected_average_only_in", False: "none", None: "none"}.get(
        normalize, normalize
    )
    old.setdefault("reshape_activations", "hook_z" if "hook_z" in (old["hook_name"] or "") else "none")
    # Its directions are chosen by pre-activations: the norms of the decoder came with version 6.
    old["rescale_acts_by_decoder_norm"] = False
    return old | {"metadata": {name: old[name] for name in _FLAT_METADATA if old.get(name) is not None}}


def _told(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration of version 6 says, as the autoencoder and its weights take it."""
    architecture = config["architecture"]
    if architecture not in OURS:
        hint = " (SAELens saves what BatchTopK trained as jumprelu)" if architecture == "batchtopk" else ""
        raise ValueError(f"its architecture is {architecture!r}, and {', '.join(OURS)} are what is honoured{hint}")
    dtype = str(config.get("dtype", "float32")).removeprefix("torch.")
    if dtype not in _TYPES:
        raise ValueError(f"its dtype is {dtype!r}, and {', '.join(_TYPES)} are what is honoured")
    normalizations = (*NORMALIZATIONS, "expected_average_only_in")
    for name, allowed in (("normalize_activations", normalizations), ("reshape_activations", RESHAPES)):
        if config.get(name, "none") not in allowed:
            raise ValueError(f"its {name} is {config[name]!r}, and {', '.join(allowed)} are what is honoured")
    told: dict[str, Any] = {
        "architecture": OURS[architecture],
        "d_in": _typed(config, "d_in", int),
        "d_sae": _typed(config, "d_sae", int),
        "dtype": _TYPES[dtype],
        "apply_b_dec_to_input": _typed({"apply_b_dec_to_input": True} | config, "apply_b_dec_to_input", bool),
        "normalize_activations": config.get("normalize_activations", "none"),
        "reshape_activations": config.get("reshape_activations", "none"),
        "metadata": dict(config.get("metadata") or {}),
    }
    if architecture == "topk":
        rescale = "rescale_acts_by_decoder_norm"
        told |= {"k": _typed(config, "k", int), rescale: _typed({rescale: False} | config, rescale, bool)}
    _check_one_place(told["metadata"], told["d_in"], config.get("d_out"))
    return told


def _typed(config: dict[str, Any], name: str, kind: type) -> Any:
    """A field that has to be a truth value or a whole number."""
    value = config[name]
    if type(value) is not kind:
        raise ValueError(
            f"its {name} is {value!r}, and {'true or false' if kind is bool else 'a whole number'} is expected"
        )
    return value


def _check_one_place(metadata: Mapping[str, Any], d_in: int, d_out: Any) -> None:
    """Refuse what reads one place and writes another."""
    for name in ("hook_name", "hook_head_index"):
        there = metadata.get(f"{name}_out")
        if there is not None and there != metadata.get(name):
            raise ValueError(
                f"its {name}_out is {there!r} and its {name} {metadata.get(name)!r}: what reads one place and writes "
                "another is not honoured"
            )
    if d_out is not None and d_out != d_in:
        raise ValueError(
            f"its d_out is {d_out!r} and its d_in {d_in}: what writes other rows than it reads is not honoured"
        )


def _scale(folder: Path, config: Mapping[str, Any]) -> float:
    """What rows are multiplied with, from wherever it is told."""
    found = config.get("norm_scaling_factor")
    if found is None and (folder / SCALER).exists():
        found = json.loads((folder / SCALER).read_text(encoding="utf-8")).get("scaling_factor")
    if found is None:
        raise ValueError(
            "its normalize_activations is 'expected_average_only_in' and no factor is told: give norm_scaling_factor, "
            "which is sqrt(d_in) over the mean length of the rows that it was trained on"
        )
    return float(found)


def _weights(path: Path, dtype: mx.Dtype, architecture: str) -> dict[str, mx.array]:
    """The arrays of an architecture, in its type."""
    file = TensorFile(path)
    weights = {name: file.read(name) for name in file}
    # Both come from versions that trained with them; SAELens drops them where they change nothing.
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in weights and not mx.allclose(weights.pop(name), mx.array(1.0)).item():
            raise ValueError(f"{name} is not honoured")
    if "log_threshold" in weights and architecture == "jumprelu":
        weights["threshold"] = mx.exp(weights.pop("log_threshold").astype(mx.float32))
    expected = {"W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if architecture == "jumprelu" else [])}
    if set(weights) != expected:
        raise ValueError(f"{path.name} holds {', '.join(sorted(weights))}; expected {', '.join(sorted(expected))}")
    return {name: weight.astype(dtype) for name, weight in weights.items()}


def _sparsity(path: Path) -> mx.array | None:
    if not path.exists():
        return None
    return TensorFile(path).read("sparsity").astype(mx.float32)
