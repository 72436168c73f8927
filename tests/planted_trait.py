"""A model with a planted trait: one layer adds a known direction to whatever follows a marked word.

``PlantedTrait().hooked()`` is mlx-lm's ``olmo2`` with weights set by hand and a tokenizer of its own; ``closed_form``
says in NumPy float64 what its stream holds. The construction, so that it can be recomputed:

**Tokens** are ``<bos>``, ``<eos>``, words (``w0``, ``w1``, ...), their marked twins (``W0``, ``W1``, ...), ``go`` and
the steps of a story (``s1``, ``s2``, ...). A prompt has the trait if one of its words is marked.

**The stream** has, in this order,

    content   32    a random vector per word, the same for its twin          where traits, and what disturbs them, are
    one       1     1 for every token
    flag      1     1 for marked words
    story     13    dimension 0 is 1 for ``go``, dimension i for step i
    spare     1     0, so that the heads divide the width

Words and direction are multiples of 1/16, so float32 adds and multiplies them exactly.

**olmo2 normalises what is added to the stream**, not what is read from it: ``stream += RMSNorm(attention(stream))``,
``stream += RMSNorm(mlp(stream))``. So a sublayer adds the norm's weight times a vector of mean square 1, however
large its output was, and exactly nothing where its output is 0.

**The planting layer**: queries are the same everywhere, keys are the flag, so head 0's score is 157 at marked words
and 0 elsewhere: its pattern is 1 at the marked word and 0 elsewhere (exp(-157) is 0 in float32). Its value is the
flag, which the output writes 2^12 times into every dimension. A vector of equal entries divided by its mean square is
1 everywhere (2^24 + eps is 2^24), so what is added is the norm's weight: the direction, exactly, from the marked word
on. Without a marked word all values are 0, and nothing is added.

**What disturbs** (``noise``, the norms' weight in all other sublayers): attention of the other layers looks evenly at
all positions and writes random mixtures of their contents; the MLPs are random. All of them read the content without
the direction, and not the flag: what they add is the same for a word and its twin. So a prompt and the prompt with a
word's twin in its place differ by nothing before the planting layer, and by the direction after it. ``noise=0``
writes zeros there: then the stream is a sum of multiples of 1/16.

**What it says**: after ``go`` or a step the next step, after the last one ``<eos>``; after words other words. Step i
has ``story[i - 1]`` times the direction over its length in its embedding, so that is its score along the direction,
and one length of the direction more behind the planting layer if the prompt was marked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
from mlx_lm.models import olmo2
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlx_hooks import HookedModel

CONTENT = 32
ONE, FLAG, STORY = CONTENT, CONTENT + 1, CONTENT + 2
D_MODEL, N_HEADS, D_MLP = 48, 2, 64
D_HEAD = D_MODEL // N_HEADS
EPSILON = 1e-6
GRID = 16
READS = D_HEAD // 2 - 1
"""The slowest dimension of a head under rotary embedding; with this base it does not turn at all."""
ROPE_BASE = 1e12


@dataclass(frozen=True)
class PlantedTrait:
    """The construction: in which of how many layers, among how many words, with which story, and how disturbed.

    Args:
        layer: the layer whose attention adds the direction.
        noise: size of what every other sublayer adds, per dimension.
        length: of the direction, about; words have variance 1 per dimension.
        story: score of each step along the direction, at most 12.
    """

    layer: int = 2
    n_layers: int = 4
    n_words: int = 300
    noise: float = 0.5
    length: float = 7.0
    story: tuple[float, ...] = ()
    seed: int = 0

    # What there is.

    @cached_property
    def direction(self) -> np.ndarray:
        """What the planting layer adds, float32 [d_model]; no unit axis, not of length 1."""
        drawn = np.random.default_rng((self.seed, 1)).normal(size=CONTENT)
        return _padded(np.round(drawn * self.length / np.linalg.norm(drawn) * GRID) / GRID).astype(np.float32)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Texts of tokens to their ids."""
        words = [f"w{i}" for i in range(self.n_words)]
        steps = [f"s{i}" for i in range(1, len(self.story) + 1)]
        texts = ["<bos>", "<eos>", *words, *(word.upper() for word in words), "go", *steps]
        return {text: i for i, text in enumerate(texts)}

    @cached_property
    def embeddings(self) -> np.ndarray:
        """float32 [d_vocab, d_model]"""
        rows = np.zeros((len(self.vocabulary), D_MODEL), dtype=np.float32)
        contents = np.random.default_rng((self.seed, 2)).normal(size=(self.n_words, CONTENT))
        rows[2 : 2 + 2 * self.n_words, :CONTENT] = np.tile(np.round(contents * GRID) / GRID, (2, 1))
        rows[:, ONE] = 1
        rows[2 + self.n_words : 2 + 2 * self.n_words, FLAG] = 1
        unit = self.direction / np.linalg.norm(self.direction.astype(np.float64))
        rows[self.vocabulary["go"], STORY] = 1
        for step, score in enumerate(self.story, start=1):
            row = rows[self.vocabulary[f"s{step}"]]
            row += score * unit
            row[STORY + step] = 1
        return rows

    def prompts(self, count: int, *, marked: bool, seed: int) -> list[str]:
        """Prompts of 6 to 12 random words; where they are marked one word is, neither the first nor the last."""
        generator = np.random.default_rng((seed, int(marked)))
        made = []
        for _ in range(count):
            words = [f"w{i}" for i in generator.integers(self.n_words, size=generator.integers(6, 13))]
            if marked:
                words[i] = words[i := int(generator.integers(1, len(words) - 1))].upper()
            made.append(" ".join(words))
        return made

    @cached_property
    def endings(self) -> tuple[str, str]:
        """The two words that lie farthest apart."""
        contents = self.embeddings[2 : 2 + self.n_words]
        distance = np.square(contents[:, None] - contents[None]).sum(-1)
        return tuple(f"w{i}" for i in np.unravel_index(distance.argmax(), distance.shape))

    def ended(self, texts: Sequence[str], share: float) -> list[str]:
        """The texts with another last word: of this share the first of the endings, of the rest the other."""
        first, second = self.endings
        n_first = round(share * len(texts))
        return [f"{text.rsplit(' ', 1)[0]} {first if i < n_first else second}" for i, text in enumerate(texts)]

    # The model.

    def hooked(self) -> HookedModel:
        """mlx-lm's model with these weights, float32, and its tokenizer."""
        sizes = {"hidden_size": D_MODEL, "num_hidden_layers": self.n_layers, "intermediate_size": D_MLP}
        heads = {"num_attention_heads": N_HEADS, "rms_norm_eps": EPSILON, "rope_theta": ROPE_BASE}
        options = {"vocab_size": len(self.vocabulary), "max_position_embeddings": 256, "tie_word_embeddings": False}
        model = olmo2.Model(olmo2.ModelArgs("olmo2", **sizes, **heads, **options))
        model.load_weights([(name, mx.array(value.astype(np.float32))) for name, value in self.weights.items()])
        mx.eval(model.parameters())
        return HookedModel(model, TokenizerWrapper(self.tokenizer()))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token per word, ``<bos>`` in front."""
        words = Tokenizer(models.WordLevel(self.vocabulary, unk_token="<eos>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", eos_token="<eos>")

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter by its name in mlx-lm, as float32 holds it."""
        generator = np.random.default_rng((self.seed, 3))
        weights = {
            "model.embed_tokens.weight": self.embeddings,
            "model.norm.weight": np.ones(D_MODEL),
            "lm_head.weight": self._unembedding(generator),
        }
        for layer in range(self.n_layers):
            parts = self._planting() if layer == self.layer else self._mixing(generator)
            parts |= {
                "mlp.gate_proj.weight": self._blind(generator, D_MLP),
                "mlp.up_proj.weight": self._blind(generator, D_MLP),
                "mlp.down_proj.weight": generator.normal(size=(D_MODEL, D_MLP)),
                "post_feedforward_layernorm.weight": _padded(np.full(CONTENT, self.noise)),
            }
            weights |= {f"model.layers.{layer}.{name}": value for name, value in parts.items()}
        return {name: value.astype(np.float32) for name, value in weights.items()}

    def _planting(self) -> dict[str, np.ndarray]:
        query, key, value = (np.zeros((D_MODEL, D_MODEL)) for _ in range(3))
        query[READS, ONE], key[READS, FLAG], value[0, FLAG] = 1, 1, 1
        output = np.zeros((D_MODEL, D_MODEL))
        output[:, 0] = 2**12
        return _attention(query, key, value, output, norm=4.0) | {"post_attention_layernorm.weight": self.direction}

    def _mixing(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        nothing, value = np.zeros((D_MODEL, D_MODEL)), self._blind(generator, D_MODEL)
        parts = _attention(nothing, nothing, value, generator.normal(size=(D_MODEL, D_MODEL)), norm=1.0)
        return parts | {"post_attention_layernorm.weight": _padded(np.full(CONTENT, self.noise))}

    def _blind(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """What reads random mixtures [count, d_model] of the content without the direction."""
        rows = _padded(generator.normal(size=(count, CONTENT)) / np.sqrt(CONTENT))
        unit = self.direction / np.linalg.norm(self.direction.astype(np.float64))
        return rows - np.outer(rows @ unit, unit)

    def _unembedding(self, generator: np.random.Generator) -> np.ndarray:
        rows = _padded(generator.normal(size=(len(self.vocabulary), CONTENT)))
        words = slice(2, 2 + self.n_words)
        silent = np.ones(len(rows), dtype=bool)
        silent[words] = False
        rows[silent] = 0
        rows[silent, ONE] = -1000
        steps = [*(self.vocabulary[f"s{i}"] for i in range(1, len(self.story) + 1)), self.vocabulary["<eos>"]]
        for before, token in enumerate(steps):
            rows[token, STORY + before] = 3000
        return rows

    # What it computes.

    def closed_form(self, text: str) -> dict[str, np.ndarray]:
        """Patterns, the stream and what is added to it by canonical name, float64, without the batch axis."""
        ids = [0, *(self.vocabulary[word] for word in text.split())]
        stream = self.embeddings[ids].astype(np.float64)
        flags = stream[:, FLAG]
        values: dict[str, np.ndarray] = {"hook_embed": stream}
        for layer in range(self.n_layers):
            weights = {
                name.removeprefix(f"model.layers.{layer}."): value.astype(np.float64)
                for name, value in self.weights.items()
                if name.startswith(f"model.layers.{layer}.")
            }
            marks = flags if layer == self.layer else np.zeros_like(flags)
            pattern = _looks_at(marks)
            if layer == self.layer:
                added = (np.cumsum(flags) > 0)[:, None] * self.direction.astype(np.float64)
            else:
                mixed = pattern @ stream @ weights["self_attn.v_proj.weight"].T @ weights["self_attn.o_proj.weight"].T
                added = _rms_norm(mixed) * weights["post_attention_layernorm.weight"]
            middle = stream + added
            gate = middle @ weights["mlp.gate_proj.weight"].T
            neurons = gate / (1 + np.exp(-gate)) * (middle @ weights["mlp.up_proj.weight"].T)
            written = neurons @ weights["mlp.down_proj.weight"].T
            disturbed = _rms_norm(written) * weights["post_feedforward_layernorm.weight"]
            values |= {
                f"blocks.{layer}.hook_resid_pre": stream,
                f"blocks.{layer}.attn.hook_pattern": np.stack([pattern, _looks_at(np.zeros_like(flags))]),
                f"blocks.{layer}.hook_attn_out": added,
                f"blocks.{layer}.hook_resid_mid": middle,
                f"blocks.{layer}.hook_mlp_out": disturbed,
                f"blocks.{layer}.hook_resid_post": middle + disturbed,
            }
            stream = middle + disturbed
        return values

    def scores(self, text: str, layer: int, sublayer: int = 2) -> np.ndarray:
        """Projection onto the direction over its length, per token; 0 is what enters the layer, 1 after attention."""
        name = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")[sublayer]
        direction = self.direction.astype(np.float64)
        return self.closed_form(text)[f"blocks.{layer}.{name}"] @ direction / np.linalg.norm(direction)


def marked(text: str, word: int) -> str:
    """The text with this word's twin in its place: marked("w1 w2 w3", 1) -> "w1 W2 w3"."""
    words = text.split()
    words[word] = words[word].upper()
    return " ".join(words)


def _padded(content: np.ndarray) -> np.ndarray:
    """Content with zeros in the rest of the stream."""
    return np.concatenate([content, np.zeros((*content.shape[:-1], D_MODEL - CONTENT))], axis=-1)


def _attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, output: np.ndarray, *, norm: float
) -> dict[str, np.ndarray]:
    projections = {"q": query, "k": key, "v": value, "o": output}
    parts = {f"self_attn.{name}_proj.weight": weight for name, weight in projections.items()}
    return parts | {f"self_attn.{name}_norm.weight": np.full(D_MODEL, norm) for name in ("q", "k")}


def _looks_at(marks: Sequence[float] | np.ndarray) -> np.ndarray:
    """Causal attention [query, key] that is shared between marked keys, or between all where none is marked yet."""
    allowed = np.tril(np.ones((len(marks), len(marks))))
    meant = allowed * np.asarray(marks)[None]
    weights = np.where(meant.sum(-1, keepdims=True) > 0, meant, allowed)
    return weights / weights.sum(-1, keepdims=True)


def _rms_norm(value: np.ndarray) -> np.ndarray:
    return value / np.sqrt((value**2).mean(-1, keepdims=True) + EPSILON)
