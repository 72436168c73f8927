"""Models and tokenizers by name: the bundled one, a folder, or a Hugging Face id, through mlx_lm."""

import json
import re
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .errors import ModelLoadError

BUNDLED = "neuroscope-tiny"

STEPS = 20
LARGEST_STEP = 2**30
"""Bytes of weights that one step of loading reads at most."""
SHOWN_NAMES = 3
"""How many of a list of parameters a message tells."""

PYTORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class LoadProgress:
    """How far loading has come: the fraction of the weights' bytes that are in memory, and a message.

    The first one comes before anything is read: ``nbytes`` says how much there will be.
    """

    fraction: float
    message: str
    nbytes: int


def load(name: str) -> tuple[nn.Module, Any]:
    """The model and tokenizer of a name, through mlx_lm."""
    steps = load_steps(fetch(name), name)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def fetch(name: str) -> Path:
    """The folder of a model: the bundled one, a folder, or a Hugging Face id, which is downloaded if it is not there.

    Raises:
        ModelLoadError: one sentence on what is missing.
    """
    from mlx_lm.utils import _download

    if name == BUNDLED:
        return Path(str(files("mlx_hooks") / "bundled" / BUNDLED))
    path = _model_folder(name)
    try:
        return Path(_download(path))
    except Exception as error:
        raise ModelLoadError(
            f"There is no folder {_short(name)}, and it could not be had as a Hugging Face id ({_reason(error)}). "
            f"Bundled is {BUNDLED!r}."
        ) from error


def is_remote(name: str) -> bool:
    """Whether ``fetch`` may have to download."""
    return name != BUNDLED and _is_hub_id(name) and not Path(name).exists()


def load_steps(folder: Path, name: str | None = None) -> Generator[LoadProgress, None, tuple[nn.Module, Any]]:
    """Load a model step by step; between the steps the caller may do other things, or give up.

    Args:
        folder: in mlx-lm's layout.
        name: what messages call it.

    Returns:
        the model and its tokenizer.

    Raises:
        ModelLoadError: one sentence on what is missing. Nothing of the folder is run as code.
    """
    import mlx_lm

    name = name or folder.name
    try:
        # mlx-lm's newest versions refuse this themselves; older ones run the file.
        config = json.loads((folder / "config.json").read_text())
        if not isinstance(config, dict):
            raise ModelLoadError(f"mlx-lm could not load {_short(name)}: its config.json is no object.")
        if code := config.get("model_file"):
            raise ModelLoadError(f"{_short(name)} brings its own code ({code}), which is never run.")
        model, tokenizer = mlx_lm.load(str(folder), tokenizer_config={"trust_remote_code": False}, lazy=True)[:2]
        arrays = [array for _, array in tree_flatten(model.parameters())]
        total, done = sum(array.nbytes for array in arrays), 0
        yield _progress(done, total)
        waiting: list[mx.array] = []
        pending = 0
        for array in arrays:
            waiting.append(array)
            pending += array.nbytes
            if pending > min(LARGEST_STEP, total // STEPS):
                mx.eval(waiting)
                waiting, done, pending = [], done + pending, 0
                yield _progress(done, total)
        mx.eval(waiting)
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(f"mlx-lm could not load {_short(name)}: {_reason(error)}.") from error
    return model, tokenizer


def _progress(done: int, total: int) -> LoadProgress:
    return LoadProgress(done / max(1, total), f"{done / 1e6:.1f} of {total / 1e6:.1f} MB of weights", total)


def _reason(error: Exception) -> str:
    """The first line of a message, and where a list follows its first names."""
    first, *rest = [line.strip(" ,.") for line in str(error).strip().splitlines()] or [type(error).__name__]
    reason = first
    if first.endswith(":") and rest:
        more = f" and {len(rest) - SHOWN_NAMES} more" if len(rest) > SHOWN_NAMES else ""
        reason = f"{first} {', '.join(rest[:SHOWN_NAMES])}{more}"
    owner = "tokenizer" if _is_about_the_tokenizer(error) else "config.json"
    return f"its {owner} lacks {reason}" if isinstance(error, KeyError) else reason


def _is_about_the_tokenizer(error: Exception) -> bool:
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name == "mlx_lm.tokenizer_utils" or name.startswith("transformers.") for name in modules)


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
        raise ModelLoadError(f"{_short(name)} is not a model folder: it {what}.{_how_to_bring(path)}")
    return str(path)


def _how_to_bring(path: Path) -> str:
    """What to do with a PyTorch checkpoint, or a folder of them; empty for anything else."""
    inside = path.iterdir() if path.is_dir() else [path]
    if not any(file.suffix in PYTORCH_SUFFIXES for file in inside):
        return ""
    return (
        " A PyTorch checkpoint is converted once, to a folder with config.json, model.safetensors and a tokenizer: "
        "examples/convert_checkpoint.py does it for GPT-2-like models, mlx_lm.convert for Hugging Face's."
    )


def _short(name: str) -> str:
    """A name in quotes, cut where repeating it would bury the rest of a sentence."""
    return repr(name if len(name) <= 200 else name[:200] + "...")


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
