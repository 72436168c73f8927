"""Where hook points are met, and what blocks are made of."""

from dataclasses import dataclass, field

import mlx.nn as nn

from .views import View, Whole


@dataclass(frozen=True)
class Location:
    """Where a hook point is met: a module, the place in its call, and how its value lies there.

    Args:
        module: whose call is observed.
        place: "input" or "output" of the call; at an attention module what the kernel gets or makes ("q", "k", "v",
            "scores", "pattern", "sink", "z"); at a block what is added to the stream ("attn", "mixer", "mlp", "side")
            or the stream between the additions ("mid"); "state" of a mixer; "weights" of the experts; "logits" of a
            router that keeps them to itself.
        view: how the value lies in the array that is met there.
        index: which argument, or which item where a tuple is returned.
        turn: the number of the pass, where a block has several sublayers of a kind.
        every, nth: a module that is called several times in a pass is met at the nth of every so many calls.
        why_not: why the value can be read but not replaced; empty where it can.
    """

    module: nn.Module
    place: str
    view: View = field(default_factory=Whole)
    index: int = 0
    turn: int = 0
    every: int = 1
    nth: int = 0
    why_not: str = ""


@dataclass(frozen=True)
class Sublayer:
    """What a block adds to the stream: its kind ("attn", "mixer", "mlp", "side"), module, and the norms around it."""

    kind: str
    module: nn.Module
    before: nn.Module | None = None
    after: nn.Module | None = None
    ends: tuple[nn.Module, nn.Module] | None = None
    """First and last module of a sublayer that is written out in the block, not a module of its own."""

    @property
    def first(self) -> nn.Module:
        return self.ends[0] if self.ends else self.module

    @property
    def last(self) -> nn.Module:
        return self.ends[1] if self.ends else self.module
