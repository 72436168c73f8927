"""One run with interventions: its hooks, and the account of what they did."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, cast

import mlx.core as mx

from ..errors import HookError
from ..hook_points import HookPoint
from ..hooks import Hook, Run
from .reach import Reach
from .reading import as_chosen, spell
from .spec import PHASES, Intervention, blame


@dataclass(frozen=True)
class InterventionReceipt:
    """What one intervention did in a run.

    Args:
        index: its place in the list of interventions.
        type: as asked.
        hook_points: canonical names, in forward order.
        fired: how many values were edited: one per forward pass, hook point and pass through a layer that runs
            several times.
        positions: the absolute positions that were edited; of a state the last one of its call.
        phases: "prefill", "decode" or both.
        norm_before, norm_after: root of the sum of squares over all edited entries of all calls. Masked scores (-inf)
            are left out. ``norm_before`` is None where the model itself had numbers that are not finite.
    """

    index: int
    type: str
    hook_points: tuple[str, ...]
    fired: int
    positions: tuple[int, ...]
    phases: tuple[str, ...]
    norm_before: float | None
    norm_after: float

    def to_dict(self) -> dict[str, Any]:
        """The receipt as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass
class Firing:
    """One edit of one value; ``before`` and ``after`` are lazy: [unit, sum of squares in units of it]."""

    index: int
    point: str
    pass_index: int
    positions: list[int]
    phase: str
    before: mx.array
    after: mx.array


@dataclass
class InterventionSession:
    """The hooks of one run, and what they did.

    Args:
        asked: each intervention with the hook points that it means.
        run: where the current forward pass stands.
        reach: the positions that the run may come to, None where nobody knows.
    """

    asked: list[tuple[Intervention, list[HookPoint]]]
    run: Run
    reach: Reach | None = None
    hooks: list[Hook] = field(default_factory=list)
    met: bool = False
    """Whether the model ran at all."""
    receipts: tuple[InterventionReceipt, ...] = ()
    """What was done, once the run has ended."""
    _latest: list[Firing] = field(default_factory=list)
    _kept: list[Firing] = field(default_factory=list)

    def add(self, firing: Firing) -> None:
        """Note an edit."""
        place = (firing.index, firing.point, firing.pass_index)
        if any((f.index, f.point, f.pass_index) == place for f in self._latest):
            # What earlier passes left is due by now: their graphs must not pile up.
            mx.async_eval(*self.arrays())
            self.keep(self.take())
        self._latest.append(firing)

    def arrays(self) -> list[mx.array]:
        """What the latest passes' norms need: to be evaluated together with the pass itself."""
        return [array for firing in self._latest for array in (firing.before, firing.after)]

    def take(self) -> list[Firing]:
        """What was done since the last call."""
        taken, self._latest = self._latest, []
        return taken

    def keep(self, firings: Iterable[Firing]) -> None:
        """Enter what was taken into the account."""
        self._kept += firings

    def close(self) -> tuple[InterventionReceipt, ...]:
        """End the run: the receipts, in the order of the interventions.

        Raises:
            HookError: one never fired although the model ran, or left numbers that are not finite.
        """
        self.keep(self.take())
        self.receipts = tuple(self._receipt(i) for i in range(len(self.asked)))
        return self.receipts

    def _receipt(self, i: int) -> InterventionReceipt:
        intervention, points = self.asked[i]
        firings = [firing for firing in self._kept if firing.index == i]
        before, after = (
            math.sqrt(sum(_sum_of_squares(getattr(firing, side)) for firing in firings)) for side in ("before", "after")
        )
        with blame(i, intervention):
            if not firings and self.met:
                phase = f" in the phase {intervention.phase!r}" if intervention.phase else ""
                passes = f" in passes {spell(as_chosen(intervention.passes))}" if intervention.passes else ""
                raise HookError(f"it never fired: the run met none of its positions{phase}{passes}.")
            if not math.isfinite(after):
                raise HookError("it left numbers that are not finite: infinity in the model's type, or a row of nan.")
        return InterventionReceipt(
            index=i,
            type=intervention.type,
            hook_points=tuple(point.name for point in points),
            fired=len(firings),
            positions=tuple(sorted({p for firing in firings for p in firing.positions})),
            phases=tuple(phase for phase in PHASES if any(firing.phase == phase for firing in firings)),
            norm_before=before if math.isfinite(before) else None,
            norm_after=after,
        )


def _sum_of_squares(squares: mx.array) -> float:
    """From [unit, sum of squares in units of it], in Python's float64, which holds all squares of float32."""
    unit, total = cast(list[float], squares.tolist())
    return unit * unit * total
