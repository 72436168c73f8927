"""A folder that holds no usable model is told apart in one sentence that names what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from server_tools import save_tiny
from tiny_models import CONFIGS

from api_server import ModelWorker, create_app
from mlx_hooks import ModelLoadError
from mlx_hooks.loading import load_steps


def configured(**changed: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIGS["llama"] | changed))


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


LAYERS = CONFIGS["llama"]["num_hidden_layers"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            configured(num_hidden_layers=LAYERS + 1),
            rf"Missing 9 parameters: model\.layers\.{LAYERS}\.[a-z_.]+, [a-z0-9_.]+, [a-z0-9_.]+ and 6 more\.",
        ),
        (
            configured(num_hidden_layers=LAYERS - 1),
            rf"Received 9 parameters not in model: model\.layers\.{LAYERS - 1}\.[a-z_.]+, [a-z0-9_.]+, .* and 6 more\.",
        ),
        (written("config.json", "[]"), r"its config\.json is no object\."),
        (written("config.json", "3"), r"its config\.json is no object\."),
        (written("config.json", "{}"), r"its config\.json lacks 'model_type'\."),
        (written("tokenizer.json", "{}"), r"its tokenizer lacks 'added_tokens'\."),
    ],
)
def test_what_is_wrong_with_a_folder_is_told(tmp_path: Path, spoil: Callable[[Path], object], told: str) -> None:
    folder = save_tiny(tmp_path / "m")
    spoil(folder)
    with pytest.raises(ModelLoadError, match=rf"^mlx-lm could not load 'm': {told}$"):
        list(load_steps(folder))


def test_weights_that_are_a_link_to_nothing_are_a_400(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(ModelLoadError, match="^mlx-lm could not load 'm': .*model.safetensors"):
        list(load_steps(folder))
    with ModelWorker() as worker:
        reply = create_app(worker).test_client().post("/v1/models/load", json={"model_path": str(folder)})
    assert reply.status_code == 400
    assert reply.json["error"]["code"] == "model_not_loadable"
    assert f"Failed to open file {folder}/model.safetensors." in reply.json["error"]["message"]
