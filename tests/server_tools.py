"""What the server's tests share: a tiny model with a tokenizer, in memory and as a folder, and a running server."""

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny_models import CONFIGS, make_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from api_server import ModelWorker, Server, ServerConfig, create_app
from mlx_hooks import HookedModel, TraitVector
from mlx_hooks.analysis.identity import ModelIdentity
from mlx_hooks.analysis.traits.prompts import Chat, render
from mlx_hooks.encoding import encode_text
from mlx_hooks.storage.shards import ShardWriter

WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"] + [f"w{i}" for i in range(54)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "w1 w2 w3 w4"}]
PROMPT_LENGTH = 6
"""<user>, four words, <assistant>."""
HOOKS = [
    {"layer_name": "transformer.h.0", "component": "residual", "hook_id": "resid"},
    {"layer_name": "transformer.h.1", "component": "attention_pattern", "hook_id": "pattern"},
    {"layer_name": "transformer.wte", "component": "embedding", "hook_id": "ids", "capture_input": True},
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, without an end token, so that a random model talks until it is stopped."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )


def load_tiny(path: str) -> HookedModel:
    """The worker's loader in tests: any name in ``CONFIGS`` is a random model, anything else goes the real way."""
    if path not in CONFIGS:
        return HookedModel.from_pretrained(path)
    return HookedModel(make_model(path), TokenizerWrapper(make_tokenizer()))


def save_tiny(folder: Path) -> Path:
    """The llama of ``load_tiny`` as a folder that mlx-lm loads."""
    model = make_model("llama")
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    make_tokenizer().save_pretrained(str(folder))
    return folder


def save_experiments(root: Path) -> Path:
    """Experiments as docs/traits.md has them: one trait of the bundled model with one vector, ``mean_diff_layer2``."""
    model = HookedModel.from_pretrained("neuroscope-tiny")

    def end(prompt: str) -> np.ndarray:
        _, cache = model.run_with_cache(render(model, prompt, Chat()), "blocks.2.hook_resid_post")
        return cache.numpy(("resid_post", 2))[0, -1]

    direction = end("How do I make a bomb?") - end("What is the capital of France?")
    vector = TraitVector("refusal", 2, "mean_diff", direction, chat=Chat(), identity=ModelIdentity.of(model))
    vector.save(root / "tiny_cognitive" / "refusal" / "extraction" / "vectors")
    return root


CAPTURED_TEXTS = {0: ["The capital of France is Paris .", "the cat sat on the mat"], 200: ["What is the capital ?"]}
"""What the bundled model had read when it was captured, by training step."""


def save_captured(folder: Path) -> Path:
    """Shards of the bundled model's stream after block 2 and of block 1's pattern, at steps 0 and 200."""
    model = HookedModel.from_pretrained("neuroscope-tiny")
    resid, pattern = "blocks.2.hook_resid_post", "blocks.1.attn.hook_pattern"
    longest = 8
    cfg = model.cfg
    layers: dict[str, dict[str, Any]] = {
        resid: {"axes": ["d_model"], "shape": [cfg.d_model], "dtype": "float32", "asked": "2"},
        pattern: {"axes": ["head", "key"], "shape": [cfg.n_heads, longest], "dtype": "float32", "asked": pattern},
    }
    writer = ShardWriter(folder, layers=layers, description={"model": {"name": "neuroscope-tiny", **cfg.to_dict()}})
    for step, texts in CAPTURED_TEXTS.items():
        found: dict[str, list[Any]] = {resid: [], pattern: [], "tokens": [], "sequence": [], "position": []}
        for row, text in enumerate(texts):
            tokens = encode_text(model, text)
            _, cache = model.run_with_cache(tokens, [resid, pattern])
            found[resid].append(cache.numpy(resid)[0])
            weights = cache.numpy(pattern)[0].transpose(1, 0, 2)
            found[pattern].append(np.pad(weights, [(0, 0), (0, 0), (0, longest - len(tokens))]))
            found["tokens"] += tokens
            found["sequence"] += [row] * len(tokens)
            found["position"] += range(len(tokens))
        arrays = {name: mx.array(np.concatenate(found[name])) for name in layers}
        columns = {name: found[name] for name in ("tokens", "sequence", "position")}
        writer.write(arrays, step=step, **columns)
    writer.close()
    return folder


@contextmanager
def running_server(worker: ModelWorker, config: ServerConfig | None = None, **options: Any) -> Iterator[str]:
    """The URL of a real server on a free port; ``options`` are those of ``Server``."""
    config = config or ServerConfig(port=0)
    server = Server(create_app(worker, config), config, waiting=worker.max_queued, **options)
    thread = server.start()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive(), "the server's thread did not end"


@contextmanager
def server_process(*arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A server process, which a test that fails does not wait for."""
    command, pipe = [sys.executable, "-m", "api_server", *arguments], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | env) as process:
        try:
            yield process
        finally:
            process.kill()


def url_of(process: subprocess.Popen[str]) -> str:
    """The URL in the line that a server process writes when it is ready."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0]
    line = process.stdout.readline()
    assert re.fullmatch(r"NeuroScope server on http://127\.0\.0\.1:\d+\n", line)
    return line.split()[-1]


def paced(worker: ModelWorker, pause: Callable[[], Any]) -> list[int]:
    """Call ``pause`` after each step of the worker's next generations; the list collects the steps' indices."""
    model, done = worker.get().model, []
    plain = type(model).generate_steps

    def generate_steps(*args: Any, **options: Any) -> Iterator[Any]:
        for step in plain(model, *args, **options):
            done.append(step.index)
            yield step
            pause()

    model.generate_steps = generate_steps  # type: ignore[method-assign]
    return done


def until(holds: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
