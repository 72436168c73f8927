"""What a single token is: its true bytes, which may be part of a character, and how OpenAI spells such a part.

>>> spelling = TokenText(model.tokenizer)
>>> spelling.raw(264), spelling.text(264)
(b'\\xf0\\x9f', '\\\\xf0\\\\x9f')
"""

import json
import re
from collections.abc import Iterator
from typing import Any

# GPT-2's alphabet of bytes: those with a visible character in Latin-1 are that character, the others, in order, those
# from U+0100 on.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(0x100)) - set(_VISIBLE)))
}
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """Spells the tokens of one tokenizer; without one, a token is its number and has no bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = getattr(tokenizer, "added_tokens_decoder", {})
        steps = list(_decoder_steps(tokenizer))
        kinds = {step["type"] for step in steps}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._spaces = [space for step in steps for space in _stands_for_space(step)]
        self._texts: dict[int, str] = {}

    def raw(self, token: int) -> bytes | None:
        """The bytes that the token stands for; None for an id that the tokenizer does not know."""
        if self._tokenizer is None:
            return None
        if token in self._added:
            return str(self._added[token]).encode()
        # A tokenizer of one's own may know no more than how to decode.
        convert = getattr(self._tokenizer, "convert_ids_to_tokens", None)
        if convert is None:
            return str(self._tokenizer.decode([token])).encode()
        piece = convert(token)
        if piece is None:
            return None
        if self._byte_level and all(char in _BYTE_OF for char in piece):
            return bytes(_BYTE_OF[char] for char in piece)
        if self._byte_fallback and (found := _FALLBACK.fullmatch(piece)):
            return bytes([int(found[1], 16)])
        if self._spaces:
            for space in self._spaces:
                piece = piece.replace(space, " ")
            return str(piece).encode()
        return str(self._tokenizer.decode([token])).encode()

    def text(self, token: int) -> str:
        """The token's own text; bytes that are no character by themselves as ``\\xf0``; without bytes, its number."""
        if token not in self._texts:
            raw = self.raw(token)
            self._texts[token] = str(token) if raw is None else raw.decode("utf-8", "backslashreplace")
        return self._texts[token]


def _decoder_steps(tokenizer: Any) -> Iterator[dict[str, Any]]:
    """How the tokenizer makes text of its pieces, as tokenizers' own JSON; nothing if it tells nobody."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return
    state = json.loads(decoder.__getstate__())
    yield from state.get("decoders", [state])


def _stands_for_space(step: dict[str, Any]) -> list[str]:
    if step["type"] == "Metaspace":
        return [step["replacement"]]
    if step["type"] == "Replace" and step["content"] == " " and "String" in step["pattern"]:
        return [step["pattern"]["String"]]
    return []
