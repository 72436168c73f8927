"""A PyTorch checkpoint, brought into mlx-lm's layout, computes what its own formulas say."""

import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from documents import ROOT

from mlx_hooks import HookedModel

SPECIAL = {"<PAD>": 0, "<EOS>": 1, "<BOS>": 2, "<UNK>": 3}
VOCABULARY = SPECIAL | {character: 4 + i for i, character in enumerate(" Helowrd\n")}
CONFIG = {"vocab_size": 13, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1}
# A torch that reads what this test wrote: PyTorch itself is not needed to run the tests.
TORCH = """
import pickle

class Tensor:
    def __init__(self, array): self.array = array
    def float(self): return self
    def numpy(self): return self.array

def load(path, map_location=None, weights_only=False):
    assert weights_only
    with open(path, "rb") as file:
        checkpoint = pickle.load(file)
    checkpoint["model_state_dict"] = {k: Tensor(v) for k, v in checkpoint["model_state_dict"].items()}
    return checkpoint
"""


def random_state(bias: bool) -> dict[str, np.ndarray]:
    """A checkpoint's weights, named and shaped as such checkpoints have them."""
    rng = np.random.default_rng(0)
    width, length = CONFIG["n_embd"], CONFIG["block_size"]
    norms, linears = ["ln_f"], {}
    for i in range(CONFIG["n_layer"]):
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
        linears |= {f"h.{i}.attn.c_attn": (3 * width, width), f"h.{i}.attn.c_proj": (width, width)}
        linears |= {f"h.{i}.ffn.c_fc": (4 * width, width), f"h.{i}.ffn.c_proj": (width, 4 * width)}
    shapes = {"wte.weight": (CONFIG["vocab_size"], width), "wpe.weight": (length, width)}
    shapes |= {f"{name}.weight": (width,) for name in norms} | {f"{name}.weight": s for name, s in linears.items()}
    if bias:
        shapes |= {f"{name}.bias": (width,) for name in norms} | {f"{name}.bias": s[:1] for name, s in linears.items()}
    state = {f"transformer.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    state |= {f"transformer.h.{i}.attn.causal_mask": np.tril(np.ones((1, 1, length, length))) for i in range(2)}
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def formulas(state: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits [pos, d_vocab], in float64, of the model whose weights these are."""
    weights = {name.removeprefix("transformer."): value.astype(np.float64) for name, value in state.items()}
    n_heads, n = CONFIG["n_head"], len(ids)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    x = weights["wte.weight"][ids] + weights["wpe.weight"][:n]
    for i in range(CONFIG["n_layer"]):
        q, k, v = (
            part.reshape(n, n_heads, -1).swapaxes(0, 1)
            for part in np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        shares = np.exp(np.where(np.tril(np.ones((n, n))) > 0, scores, -np.inf))
        z = (shares / shares.sum(-1, keepdims=True)) @ v
        x = x + linear(z.swapaxes(0, 1).reshape(n, -1), f"h.{i}.attn.c_proj")
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.ffn.c_fc")
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        x = x + linear(h, f"h.{i}.ffn.c_proj")
    return norm(x, "ln_f") @ weights["lm_head.weight"].T


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
    done = run(tmp_path, {"model_state_dict": state, "config": CONFIG | {"bias": bias}})
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
    checkpoint = {"model_state_dict": random_state(False), "config": CONFIG} | change
    done = run(tmp_path, {key: value for key, value in checkpoint.items() if value is not None})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr)
    assert not (tmp_path / "your_model").exists()
