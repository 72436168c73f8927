"""The bytes of single tokens, for the kinds of tokenizers that mlx-lm's models have."""

import pytest
from byte_models import byte_tokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from server_tools import make_tokenizer
from tiny_models import make_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import PreTrainedTokenizerFast

from api_server.inference import token_strings
from mlx_hooks import AttentionExtractionHook, HookedModel, LogitLens
from mlx_hooks.analysis.lens_table import LensTable
from mlx_hooks.token_text import TokenText

PIECES = ["<unk>", "<0xF0>", "<0x9F>", "<0x0A>", "\u2581the", "th", "\u2581", "\u00e9\u2581\u2581"]
SENTENCEPIECE = {
    "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "llama": decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
}


@pytest.mark.parametrize("decoder", SENTENCEPIECE)
def test_pieces_of_sentencepiece_have_their_spaces_and_bytes(decoder: str) -> None:
    words = Tokenizer(BPE({piece: i for i, piece in enumerate(PIECES)}, [], byte_fallback=True, unk_token="<unk>"))
    words.decoder = SENTENCEPIECE[decoder]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|\u00e9\u2581|>"]})
    spelling = TokenText(TokenizerWrapper(tokenizer))
    raw = [spelling.raw(token) for token in range(len(PIECES) + 1)]
    assert raw[1:] == [b"\xf0", b"\x9f", b"\n", b" the", b"th", b" ", "\u00e9  ".encode(), "<|\u00e9\u2581|>".encode()]
    assert [spelling.text(token) for token in (1, 4)] == ["\\xf0", " the"]


def test_every_byte_of_a_byte_level_tokenizer_is_itself() -> None:
    tokenizer = byte_tokenizer()
    spelling = TokenText(TokenizerWrapper(tokenizer))
    assert sorted(spelling.raw(token) for token in range(256)) == [bytes([byte]) for byte in range(256)]
    text = "a \u00e9\U0001f600\u0142\x00 \u4e2d"
    assert b"".join(spelling.raw(token) for token in tokenizer.encode(text)) == text.encode()
    assert spelling.text(256) == "\\xf0\\x9f"


def test_other_tokenizers_are_asked_for_the_text() -> None:
    words = Tokenizer(WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    pieces = TokenText(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))
    assert pieces.raw(1) == b"play"
    plain = TokenText(TokenizerWrapper(make_tokenizer()))
    assert (plain.raw(7), plain.text(7)) == (b"w1", "w1")


def test_an_unknown_id_or_no_tokenizer_has_no_bytes(tiny: HookedModel) -> None:
    assert (TokenText(None).raw(5), TokenText(None).text(5)) == (None, "5")
    assert (TokenText(tiny.tokenizer).raw(10**6), TokenText(tiny.tokenizer).text(10**6)) == (None, "1000000")


def metaspace_model() -> HookedModel:
    """Words with and without a space before them are different tokens."""
    pieces = ["<unk>", "\u2581the", "\u2581cat", "\u2581sat", "sat", "\u2581on"]
    words = Tokenizer(Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    return HookedModel(make_model("llama"), TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=words)))


def test_spaces_are_kept_by_the_lens_and_by_observers() -> None:
    model = metaspace_model()
    ids = [1, 2, 3, 4, 5]
    texts = [" the", " cat", " sat", "sat", " on"]
    assert model.to_str_tokens(ids) == texts
    lens = LogitLens(model)
    assert LensTable.of(lens, ids).tokens == texts
    told = {p.token_id: p.token for row in lens.predictions(ids, top_k=60) for p in row.predictions}
    assert [told[i] for i in ids] == texts
    assert token_strings(model, ids) == texts
    hook = AttentionExtractionHook(threshold=0.0)
    model.generate(ids, max_tokens=0, hooks=[hook])
    assert hook.tokens[:5] == texts
    assert hook.get_token_attention_summary("sat")["positions"] == [2, 3]
    assert hook.get_token_attention_summary(" sat")["positions"] == [2]


def test_a_token_is_spelled_once() -> None:
    asked = []

    class Words:
        def decode(self, ids: list[int]) -> str:
            asked.append(ids)
            return f"w{ids[0]}"

    spelling = TokenText(Words())
    assert [spelling.text(token) for token in (3, 3, 4)] == ["w3", "w3", "w4"]
    assert asked == [[3], [4]]
