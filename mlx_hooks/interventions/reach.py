"""Which positions a run comes to, and which of them an intervention is due at."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import HookError
from .reading import as_chosen, first, span, spell
from .spec import Intervention


@dataclass(frozen=True)
class Reach:
    """The positions that a run may come to: prefill is ``start`` to ``prompt_stop``, decode from there to ``stop``."""

    start: int
    prompt_stop: int
    stop: int
    batch: int = 1

    def positions(self, phase: str | None) -> range:
        """All positions that the run may come to in a phase."""
        return range(
            self.prompt_stop if phase == "decode" else self.start,
            self.prompt_stop if phase == "prefill" else self.stop,
        )


def due_positions(asked: Intervention, reach: Reach) -> Sequence[int]:
    """The positions that a run may come to and that are to be edited.

    Raises:
        HookError: when there are none, or some of a list are out of reach.
    """
    everything, within = reach.positions(None), reach.positions(asked.phase)
    if not within:
        raise HookError(
            f"phase {asked.phase!r} never comes in this run: "
            + ("no generated token is fed to the model." if asked.phase == "decode" else "it has no prompt.")
        )
    reached = f"this run comes to positions {span(everything)}"
    keys, positions = as_chosen(asked.keys), asked.positions
    if keys is not None and (keys.start if isinstance(keys, range) else max(keys)) >= reach.stop:
        raise HookError(f"keys are out of reach, got {spell(keys)}: {reached}.")
    if positions == "last":
        prompt = range(reach.prompt_stop - 1, reach.prompt_stop) if asked.phase != "decode" else range(0)
        return [*prompt, *(reach.positions("decode") if asked.phase != "prefill" else ())]
    chosen = as_chosen(positions)
    if isinstance(chosen, tuple):
        outside = [p for p in chosen if p not in everything]
        if outside:
            raise HookError(
                f"position {outside[0]} is out of reach: {reached}. For several calls of one sequence use "
                "'with model.intervening(...)'."
            )
    due: Sequence[int] = within
    if isinstance(chosen, range):
        due = range(max(within.start, chosen.start), min(within.stop, chosen.stop))
    elif chosen is not None:
        due = [p for p in chosen if p in within]
    if keys is not None:
        due = [p for p in due if p >= first(keys)]
    if not due:
        phase = f" and the phase {asked.phase!r} is {span(within)}" if asked.phase else ""
        raise HookError(f"there is nothing to edit: {reached}{phase}.")
    return due
