"""A model that says one text, in tokens that part its characters, as byte-level tokenizers do."""

from itertools import pairwise

import mlx.core as mx
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, NaiveStreamingDetokenizer, TokenizerWrapper
from tiny_models import make_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mlx_hooks import HookedModel

SAID = [b"h", b"i", b"\xf0\x9f", b"\x98\x80", b"\xc3", b"\xa9", b"x"]
"""What the model says after "?", token by token: two of two bytes make the emoji, two of one the e with its accent."""
TEXT = b"".join(SAID).decode()
DETOKENIZERS = {"naive": NaiveStreamingDetokenizer, "bpe": BPEStreamingDetokenizer}

_CONFIG = {
    "model_type": "llama",
    "hidden_size": 264,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 260,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """All bytes, two pairs of bytes, and an end token: 259 tokens."""
    pairs = [("\u00f0", "\u0141"), ("\u013a", "\u0122")]  # F0 9F and 98 80 in GPT-2's alphabet
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    words = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, pairs))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}?"
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", chat_template=template)


def byte_model(detokenizer: str = "bpe") -> HookedModel:
    """Greedy, it says ``TEXT`` after a prompt that ends in a question mark, and stops."""
    tokenizer = byte_tokenizer()
    ids = {tokenizer.convert_ids_to_tokens(i): i for i in range(len(tokenizer))}
    alphabet = {bytes([b]): tokenizer.encode(bytes([b]).decode("latin-1"))[-1] for b in range(128)}
    halves = {b"\xf0\x9f": ids["\u00f0\u0141"], b"\x98\x80": ids["\u013a\u0122"], b"\xc3": ids["\u00c3"]}
    halves[b"\xa9"] = ids["\u00a9"]
    chain = [alphabet[b"?"], *((halves | alphabet)[piece] for piece in SAID), ids["<end>"]]
    model = make_model(_CONFIG)
    block = model.model.layers[0]
    block.self_attn.o_proj.weight = mx.zeros_like(block.self_attn.o_proj.weight)
    block.mlp.down_proj.weight = mx.zeros_like(block.mlp.down_proj.weight)
    model.model.norm.weight = mx.ones_like(model.model.norm.weight)
    model.model.embed_tokens.weight = mx.eye(260, 264)
    head = mx.zeros((260, 264))
    for token, following in pairwise(chain):
        head[following, token] = 1.0
    model.lm_head.weight = head
    mx.eval(model.parameters())
    return HookedModel(model, TokenizerWrapper(tokenizer, DETOKENIZERS[detokenizer]))
