"""A PyTorch checkpoint, brought into mlx-lm's layout, computes what its own formulas say."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CONFIG, TORCH, VOCABULARY, formulas, random_state
from documents import ROOT

from mlx_hooks import HookedModel


def run(folder: Path, checkpoint: dict) -> subprocess.CompletedProcess:
    (folder / "torch.py").write_text(TORCH)
    (folder / "your_checkpoint.pt").write_bytes(pickle.dumps(checkpoint))
    (folder / "characters.json").write_text(json.dumps(VOCABULARY))
    command = [sys.executable, str(ROOT / "examples/convert_checkpoint.py"), "your_checkpoint.pt", "your_model"]
    return subprocess.run(
        [*command, "--vocabulary", "characters.json"],
        cwd=folder, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": f"{folder}:{ROOT}"},
    )  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
def test_a_converted_checkpoint_computes_what_its_formulas_say(bias: bool, tmp_path: Path) -> None:
    state = random_state(bias)
    done = run(tmp_path, {"model_state_dict": state, "config": CONFIG})
    assert (done.returncode, done.stdout) == (0, "Written: your_model\n"), done.stderr
    model = HookedModel.from_pretrained(tmp_path / "your_model")
    assert not model.untrusted
    ids = [2, *(VOCABULARY[character] for character in "Hello world\n")]
    assert model.to_tokens("Hello world\n").tolist() == [ids]
    assert model.tokenizer.decode(ids[1:]) == "Hello world\n"
    assert model.to_tokens("?").tolist() == [[2, 3]]
    assert model.tokenizer.eos_token_id == 1
    np.testing.assert_allclose(np.array(model(ids))[0], formulas(state, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"training_result": {"model_type": "symbolic"}},
            "model_type 'vanilla' can be converted, this one is 'symbolic'",
        ),
        ({"config": CONFIG | {"use_sparsemax": True}}, "attention is a sparsemax"),
        ({"config": CONFIG | {"vocab_size": 12}}, "needs the 12 tokens of the checkpoint, .* got 13"),
        ({"config": None}, "has no config: save both"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(change: dict, message: str, tmp_path: Path) -> None:
    checkpoint = {"model_state_dict": random_state(), "config": CONFIG} | change
    done = run(tmp_path, {key: value for key, value in checkpoint.items() if value is not None})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr)
    assert not (tmp_path / "your_model").exists()
