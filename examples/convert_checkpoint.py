"""Bring a PyTorch checkpoint (``model_state_dict`` and ``config``) into a folder that mlx-lm loads.

    python examples/convert_checkpoint.py your_checkpoint.pt your_model --vocabulary characters.json
    neuroscope generate your_model --prompt "Hello world"

For checkpoints of a GPT-2-like model: learned positions, LayerNorm before attention and MLP, GELU, and the embedding
as unembedding. mlx-lm's ``gpt_bigcode`` is that model, so the weights need new names only. PyTorch is needed to read
the checkpoint; ``convert`` takes NumPy arrays and needs none.
"""

import argparse
import json
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = {"pad_token": "<PAD>", "eos_token": "<EOS>", "bos_token": "<BOS>", "unk_token": "<UNK>"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument(
        "--vocabulary", type=Path, required=True, help="JSON of a character tokenizer's get_vocab(): {token: id}"
    )
    options = parser.parse_args(argv)
    try:
        state, config = read_checkpoint(options.checkpoint)
        convert(state, config, json.loads(options.vocabulary.read_text(encoding="utf-8")), options.folder)
    except (ImportError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        sys.stderr.write(f"convert_checkpoint: {error}\n")
        return 1
    print(f"Written: {options.folder}")
    return 0


def read_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The weights and the configuration of a checkpoint. Nothing in the file is run as code."""
    import torch

    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if missing := {"model_state_dict", "config"} - set(checkpoint):
        raise ValueError(f"{path} has no {' and no '.join(sorted(missing))}: save both, the configuration as a dict.")
    kind = checkpoint.get("training_result", {}).get("model_type", "vanilla")
    if kind != "vanilla":
        raise ValueError(f"Checkpoints of model_type 'vanilla' can be converted, this one is {kind!r}.")
    state = {name: tensor.float().numpy() for name, tensor in checkpoint["model_state_dict"].items()}
    return state, checkpoint["config"]


def convert(
    state: Mapping[str, np.ndarray], config: Mapping[str, Any], vocabulary: Mapping[str, int], folder: Path
) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer into a new folder.

    Args:
        state: ``model_state_dict`` as arrays.
        config: has ``vocab_size``, ``block_size``, ``n_layer``, ``n_head``, ``n_embd``.
        vocabulary: a character tokenizer's tokens and ids, ``<PAD>``, ``<EOS>``, ``<BOS>`` and ``<UNK>`` included.

    Raises:
        ValueError: for attention that is no softmax, or a vocabulary of another size.
    """
    if config.get("use_sparsemax"):
        raise ValueError("The checkpoint's attention is a sparsemax: mlx-lm's gpt_bigcode has a softmax.")
    if len(vocabulary) != config["vocab_size"] or not set(SPECIAL.values()) <= set(vocabulary):
        raise ValueError(
            f"The vocabulary needs the {config['vocab_size']} tokens of the checkpoint, {', '.join(SPECIAL.values())} "
            f"included, got {len(vocabulary)}."
        )
    weights = {name: mx.array(value) for name, value in renamed(state).items()}
    settings = mlx_config(config, vocabulary, bias=any(name.endswith("c_attn.bias") for name in weights))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    character_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | SPECIAL
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")


def mlx_config(config: Mapping[str, Any], vocabulary: Mapping[str, int], bias: bool) -> dict[str, Any]:
    """What mlx-lm makes the model from; ``bias`` says whether attention and MLPs have biases."""
    return {
        "model_type": "gpt_bigcode",
        "n_embd": config["n_embd"],
        "n_layer": config["n_layer"],
        "n_head": config["n_head"],
        "n_inner": 4 * config["n_embd"],
        "n_positions": config["block_size"],
        "vocab_size": config["vocab_size"],
        "layer_norm_epsilon": 1e-5,
        "multi_query": False,
        "attention_bias": bias,
        "mlp_bias": bias,
        "tie_word_embeddings": True,
        "bos_token_id": vocabulary[SPECIAL["bos_token"]],
        "eos_token_id": vocabulary[SPECIAL["eos_token"]],
    }


def renamed(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights under mlx-lm's names: ``ffn`` is ``mlp``; a LayerNorm without a bias gets one of zeros."""
    weights = {
        name.replace(".ffn.", ".mlp."): np.asarray(value)
        for name, value in state.items()
        # The mask is no weight, and the unembedding is the embedding.
        if not name.endswith("causal_mask") and name != "lm_head.weight"
    }
    norms = [
        name for name in weights if name.rsplit(".", 2)[-2] in ("ln_1", "ln_2", "ln_f") and name.endswith("weight")
    ]
    return {name.removesuffix("weight") + "bias": np.zeros_like(weights[name]) for name in norms} | weights


def character_tokenizer(vocabulary: Mapping[str, int]) -> Tokenizer:
    """A token per character, with ``<BOS>`` in front."""
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token=SPECIAL["unk_token"]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.values()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    start = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, vocabulary[start])]
    )
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
