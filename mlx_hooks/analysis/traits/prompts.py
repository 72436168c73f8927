"""Prompts of traits: read from files, and made into tokens by a chat template."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...encoding import encode_chat, encode_text
from ...errors import HookError
from ...model import HookedModel

SUFFIXES = (".txt", ".json")


@dataclass(frozen=True)
class Chat:
    """How a prompt is put to a model.

    Args:
        use: whether as a user's message, through a chat template. None: if there is one.
        system: a system message before it; only where a template is used.
        template: a chat template (Jinja) in the place of the model's own.

    Raises:
        HookError: for other types, and for a system message or a template that would not be used.
    """

    use: bool | None = None
    system: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        if self.use not in (None, True, False):
            raise HookError(f"chat is true, false or null, got {self.use!r}.", field="chat")
        for name in ("system", "template"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise HookError(f"{name} of a chat is a text, got {value!r}.", field=name)
            if value is not None and self.use is False:
                raise HookError(f"A chat that is not used has no {name}.", field=name)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any] | None) -> "Chat":
        """What :meth:`to_dict` made.

        Raises:
            HookError: for unknown keys and wrong types.
        """
        known = [f.name for f in fields(cls)]
        if plain is not None and (not isinstance(plain, Mapping) or set(plain) - set(known)):
            raise HookError(f"A chat has {', '.join(known)}, got {plain!r}.")
        return cls(**(plain or {}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def is_used(self, model: HookedModel) -> bool:
        """Whether prompts go through a template on this model.

        Raises:
            HookError: when it has to be used and there is none.
        """
        has_one = self.template is not None or bool(getattr(model.tokenizer, "has_chat_template", False))
        if not has_one and (self.use or self.system is not None):
            raise HookError(f"{model.model_name} has no chat template: give the trait one, or leave chat out.")
        return has_one and self.use is not False


def render(model: HookedModel, prompt: str, chat: Chat | None = None) -> list[int]:
    """The tokens that a model reads for a prompt, as :func:`put` has them.

    Raises:
        HookError: also for a prompt that is longer than the model reads.
    """
    tokens = put(model, prompt, chat)
    limit = model.cfg.max_positions
    if limit is not None and len(tokens) > limit:
        raise HookError(f"The prompt has {len(tokens)} tokens; the model reads at most {limit}.", field="prompt")
    return tokens


def put(model: HookedModel, prompt: str, chat: Chat | None = None) -> list[int]:
    """The tokens of a prompt, which may be more than the model reads.

    Args:
        prompt: a text that is not empty.
        chat: how it is put; None for a :class:`Chat` of defaults.

    Raises:
        HookError: for an empty prompt, a model without tokenizer, and a template that refuses the prompt.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise HookError(f"A prompt is a text that is not empty, got {prompt!r}.", field="prompt")
    chat = chat or Chat()
    return _through_template(model, prompt, chat) if chat.is_used(model) else encode_text(model, prompt)


def _through_template(model: HookedModel, prompt: str, chat: Chat) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    if chat.system is not None:
        messages.insert(0, {"role": "system", "content": chat.system})
    try:
        return encode_chat(model, messages, chat.template)
    except Exception as error:
        # A template is a program that came with the model or the trait: it may raise anything.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise HookError(f"The chat template refuses the prompt {prompt[:60]!r}: {reason}", field="prompt") from error


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: ``.txt`` has one per line, empty lines are passed over; ``.json`` is a list of texts.

    Raises:
        HookError: for a file that cannot be read, has none, or is of another kind.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise HookError(f"Prompts are read from {' or '.join(SUFFIXES)}, got {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise HookError(f"There is no file {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise HookError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    prompts = _from_json(path, text) if path.suffix == ".json" else text.splitlines()
    found = [prompt for prompt in prompts if prompt.strip()]
    if not found:
        raise HookError(f"{path} has no prompts: it needs at least one.")
    return found


def _from_json(path: Path, text: str) -> list[str]:
    try:
        prompts = json.loads(text)
    except ValueError as error:
        raise HookError(f"{path} is no JSON: {error}.") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise HookError(f"{path} is to be a list of texts.")
    return prompts
