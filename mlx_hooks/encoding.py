"""Texts and chats as the token ids that a model reads.

Whoever counts the tokens says that there are too many: the tokenizer's own warning, which speaks of indexing errors, is
kept quiet.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .model import HookedModel


def encode_text(model: HookedModel, text: str) -> list[int]:
    """The ids of a text that is read as it is, with what the tokenizer puts before and after it.

    Raises:
        HookError: the model has no tokenizer.
    """
    return list(model.hf_tokenizer.encode(text, verbose=False))


def encode_chat(model: HookedModel, messages: Sequence[Mapping[str, Any]], template: str | None = None) -> list[int]:
    """The ids of messages, ``[{"role", "content"}]``, and of the beginning of the answer to them.

    Args:
        template: a chat template (Jinja) in the place of the model's own.

    Raises:
        Exception: anything. A template is a program that came with the model or with who asks.
    """
    own = {} if template is None else {"chat_template": template}
    text = model.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **own)
    # A template writes the special tokens itself.
    return list(model.hf_tokenizer.encode(text, add_special_tokens=False, verbose=False))
