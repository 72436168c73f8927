"""The word-level tokenizer of ``neuroscope-tiny``, as files that ``mlx_lm.load`` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

from neuroscope_tiny.corpus import ASSISTANT, BOS, EOS, PAD, SPECIAL_TOKENS, SYSTEM, UNK, USER, WORDS

# A word with inner hyphens or apostrophes, a number, or one other character that is not a space.
TOKEN_PATTERN = r"[^\W\d_]+(?:[-'][^\W\d_]+)*|\d+|_|[^\w\s]"

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    f" {ASSISTANT} {{{{ message['content'] }}}} {{{{ eos_token }}}}"
    "{% elif message['role'] == 'user' %}"
    f" {USER} {{{{ message['content'] }}}}"
    "{% elif message['role'] in ('system', 'developer') %}"
    f" {SYSTEM} {{{{ message['content'] }}}}"
    "{% else %}"
    "{{ raise_exception('Unknown role ' + message['role'] + ': use system, user or assistant') }}"
    "{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}} {ASSISTANT}{{% endif %}}"
)


def vocabulary() -> dict[str, int]:
    """Number the special tokens, then every word: ``{"<pad>": 0, "<unk>": 1, "<bos>": 2, ...}``."""
    return {word: index for index, word in enumerate((*SPECIAL_TOKENS, *WORDS))}


def build_tokenizer() -> Tokenizer:
    """Make the tokenizer: ``"store, John"`` and ``"store , John"`` both give ``store``, ``,``, ``John``.

    Encoding puts BOS in front, decoding joins with single spaces, a word outside the vocabulary is ``<unk>``.
    """
    ids = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path, max_positions: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, the chat template included, into ``folder``."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": PAD,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
