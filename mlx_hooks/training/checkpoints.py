"""Weights that training saved, put into a model: whole models, weights files, adapters with their numbered files."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import HookError, ModelLoadError
from ..loading import PYTORCH_SUFFIXES, SHOWN_NAMES, load

ADAPTERS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_NUMBERED = re.compile(r"(\d+)_adapters\.safetensors")


def load_checkpoint(model: nn.Module, path: str | Path) -> bool:
    """Put the weights of a checkpoint into a model.

    Args:
        path: a weights file with all of the model's parameters; the folder of a whole model; or what mlx-lm's training
            writes, ``adapters.safetensors``, ``0000100_adapters.safetensors`` or their folder, which names what was
            trained: the other parameters stay. Adapters that the model does not have yet are put into it as the
            ``adapter_config.json`` beside them says.

    The model's parameters keep their types: float32 weights become bfloat16 in a model that computes in it.

    Returns:
        whether modules of the model were replaced, so that it must be wrapped anew.

    Raises:
        ModelLoadError: there is no such checkpoint, it cannot be read, or its weights are not this model's; the model
            is then as it was.
    """
    path = Path(path)
    weights, is_part = _weights_of(path)
    modules = dict(model.named_modules())
    config = _adapter_config(path if path.is_dir() else path.parent)
    missing = set(weights) - set(_parameters(model))
    if missing and config is not None:
        _add_adapters(model, config, path)
    try:
        _check_fit(weights, _parameters(model), path, is_part=is_part)
    except ModelLoadError:
        _put_back(model, modules)
        raise
    model.update(tree_unflatten(list(_typed(weights, _parameters(model)).items())))
    mx.eval(model.parameters())
    return any(module is not modules.get(name) for name, module in model.named_modules())


def checkpoints_by_step(given: Mapping[int, str | Path] | str | Path) -> dict[int, Path]:
    """Checkpoints by the step after which they were saved, ascending.

    Args:
        given: paths by step, or the folder where ``mlx_lm.lora`` saved ``0000100_adapters.safetensors``, ...

    Raises:
        HookError: there are none.
    """
    if isinstance(given, Mapping):
        if not given or not all(isinstance(step, int) and not isinstance(step, bool) and step >= 0 for step in given):
            raise HookError("checkpoints are paths by step, at least one, as {100: 'after_100.safetensors'}.")
        return {step: Path(given[step]) for step in sorted(given)}
    folder = Path(given)
    found = {int(match[1]): file for file in folder.glob("*") if (match := _NUMBERED.fullmatch(file.name))}
    if not found:
        raise HookError(
            f"There is no numbered checkpoint in {folder}, such as 0000100_{ADAPTERS}: train with save_every."
        )
    return dict(sorted(found.items()))


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """A block after which the model has the modules and weights again that it had before."""
    modules = dict(model.named_modules())
    weights = tree_flatten(model.parameters())
    try:
        yield
    finally:
        _put_back(model, modules)
        model.update(tree_unflatten(weights))


def _put_back(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    now = dict(model.named_modules())
    replaced = [(name, module) for name, module in modules.items() if now.get(name) is not module]
    if replaced:
        model.update_modules(tree_unflatten(replaced))


def _typed(weights: Mapping[str, mx.array], parameters: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Weights in the types of the parameters that they are for; packed ones, which are whole numbers, stay."""
    return {
        name: weight.astype(parameters[name].dtype) if mx.issubdtype(weight.dtype, mx.floating) else weight
        for name, weight in weights.items()
    }


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def _weights_of(path: Path) -> tuple[dict[str, mx.array], bool]:
    """The weights, and whether they may be a part of a model's."""
    if not path.exists():
        raise ModelLoadError(f"There is no checkpoint at {path}.")
    if path.is_dir():
        if (path / ADAPTERS).is_file():
            return _read(path / ADAPTERS), True
        if (path / "config.json").is_file():
            return _parameters(load(str(path))[0]), False
        raise ModelLoadError(
            f"{path} is no checkpoint: it has neither {ADAPTERS} nor config.json with model.safetensors."
        )
    if path.suffix in PYTORCH_SUFFIXES:
        raise ModelLoadError(f"{path.name} is a PyTorch checkpoint: convert it with mlx_lm.convert, to safetensors.")
    if path.suffix != ".safetensors":
        raise ModelLoadError(f"A checkpoint is a .safetensors file or a folder, got {path.name}.")
    return _read(path), path.name.endswith(ADAPTERS)


def _read(path: Path) -> dict[str, mx.array]:
    try:
        weights: Any = mx.load(str(path))
        mx.eval(weights)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: it is no whole safetensors file.") from error
    return dict(sorted(weights.items()))


def _adapter_config(folder: Path) -> dict[str, Any] | None:
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
        return config if config.get("fine_tune_type", "lora") != "full" else None
    except (OSError, ValueError, AttributeError) as error:
        raise ModelLoadError(f"cannot read {path}: it is no JSON object.") from error


def _add_adapters(model: nn.Module, config: Mapping[str, Any], path: Path) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    modules = dict(model.named_modules())
    try:
        use_dora = config.get("fine_tune_type") == "dora"
        linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"], use_dora=use_dora)
    except (LookupError, TypeError, ValueError) as error:
        _put_back(model, modules)
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ModelLoadError(f"The adapters of {path} cannot be put into this model: {reason}.") from error


def _check_fit(
    weights: Mapping[str, mx.array], parameters: Mapping[str, mx.array], path: Path, *, is_part: bool
) -> None:
    if not weights:
        raise ModelLoadError(f"{path} holds no weights.")
    unknown = [name for name in weights if name not in parameters]
    if unknown:
        raise ModelLoadError(f"{path} is of another model: this one has no {_listed(unknown)}.")
    lacking = [] if is_part else [name for name in parameters if name not in weights]
    if lacking:
        raise ModelLoadError(f"{path} is of another model, or a part of one: it lacks {_listed(lacking)}.")
    wrong = [
        f"{name} ({list(weight.shape)}, here {list(parameters[name].shape)})"
        for name, weight in weights.items()
        if weight.shape != parameters[name].shape
    ]
    if wrong:
        raise ModelLoadError(f"{path} is of another model: of another shape are {_listed(wrong)}.")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
