"""Models and tokenizers by name: the bundled one, a folder, or a Hugging Face id, through mlx_lm."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.nn as nn

from .errors import ModelLoadError

BUNDLED = "neuroscope-tiny"


def load(name: str) -> tuple[nn.Module, Any]:
    """The model and tokenizer of a name, through mlx_lm."""
    import mlx_lm

    path = str(files("mlx_hooks") / "bundled" / BUNDLED) if name == BUNDLED else _model_folder(name)
    try:
        model, tokenizer = mlx_lm.load(path)[:2]
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        if isinstance(error, KeyError):
            reason = f"its config.json lacks {reason}"
        if Path(path).exists():
            raise ModelLoadError(f"mlx-lm could not load {_short(name)}: {reason}.") from error
        raise ModelLoadError(
            f"There is no folder {_short(name)}, and it could not be had as a Hugging Face id ({reason}). "
            f"Bundled is {BUNDLED!r}."
        ) from error
    return model, tokenizer


def _model_folder(name: str) -> str:
    """The folder that a name means, or the name itself where it can only be a Hugging Face id."""
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error.strerror if isinstance(error, OSError) else error).rstrip(".")
        raise ModelLoadError(f"{_short(name)} is no usable path: {reason}.") from error
    if not exists:
        if _is_hub_id(name):
            return name
        raise ModelLoadError(
            f"There is no model at {_short(name)}: give the bundled {BUNDLED!r}, a folder with config.json and "
            "model.safetensors, or a Hugging Face id such as 'owner/name'."
        )
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "is a file"
        raise ModelLoadError(f"{_short(name)} is not a model folder: it {what}.")
    return str(path)


def _short(name: str) -> str:
    """A name in quotes, cut where repeating it would bury the rest of a sentence."""
    return repr(name if len(name) <= 200 else name[:200] + "...")


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
