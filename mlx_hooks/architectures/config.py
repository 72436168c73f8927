"""A model's sizes, from its configuration and its modules."""

from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class ModelConfig:
    """A model's sizes, by the field's names. ``quantization`` is None or mlx-lm's ``{"group_size", "bits", ...}``.

    Sizes of heads and MLP are those of the first layer that has them; other layers may differ.
    """

    model_type: str
    n_layers: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    max_positions: int | None
    quantization: dict[str, Any] | None

    @property
    def num_hidden_layers(self) -> int:
        """Hugging Face's name of ``n_layers``."""
        return self.n_layers

    @property
    def hidden_size(self) -> int:
        """Hugging Face's name of ``d_model``."""
        return self.d_model

    @property
    def num_attention_heads(self) -> int:
        """Hugging Face's name of ``n_heads``."""
        return self.n_heads

    @property
    def num_key_value_heads(self) -> int:
        """Hugging Face's name of ``n_key_value_heads``."""
        return self.n_key_value_heads

    @property
    def head_dim(self) -> int:
        """Hugging Face's name of ``d_head``."""
        return self.d_head

    @property
    def vocab_size(self) -> int:
        """Hugging Face's name of ``d_vocab``."""
        return self.d_vocab

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self)


def number(args: Any, names: tuple[str, ...], needed: bool = True) -> Any:
    """A number of the configuration, or of its text part, under whichever name the architecture has for it."""
    for holder in (args, getattr(args, "text_config", None), getattr(args, "text", None)):
        for name in names:
            found = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
            if found is not None:
                return found
    if needed:
        raise UnsupportedModelError(f"The configuration of {args.model_type} has none of {', '.join(names)}.")
    return None


def n_rows(linear: nn.Module) -> int:
    """Width of a projection's output. Quantisation packs columns of a weight; ternary ones pack rows and say how many
    there are; LoRA wraps the projection."""
    if hasattr(linear, "out_features"):
        return linear.out_features
    if "weight" in linear:
        return linear["weight"].shape[0]
    return n_rows(linear["linear"])


def quantization_of(modules: dict[str, nn.Module]) -> dict[str, Any] | None:
    """Bits and group size of the first quantised module, with the count of modules per setting when they differ."""
    kinds: dict[tuple[int, int], int] = {}
    for module in modules.values():
        if hasattr(module, "bits") and hasattr(module, "group_size"):
            key = (module.bits, module.group_size)
            kinds[key] = kinds.get(key, 0) + 1
    if not kinds:
        return None
    (bits, group_size), _ = max(kinds.items(), key=lambda item: item[1])
    mixed = {f"{b} bits, groups of {g}": count for (b, g), count in kinds.items()}
    return {"bits": bits, "group_size": group_size} | ({"mixed": mixed} if len(kinds) > 1 else {})
