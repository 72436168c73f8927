"""Which positions a run comes to, and which of them an intervention or a capture is due at."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import HookError
from .reading import Chosen, as_chosen, first, span, spell
from .spec import Intervention


@dataclass(frozen=True)
class Reach:
    """The positions that a run may come to: prefill is ``start`` to ``prompt_stop``, decode from there to ``stop``."""

    start: int
    prompt_stop: int
    stop: int
    batch: int = 1

    @classmethod
    def of_generation(cls, n_prompt: int, max_tokens: int) -> "Reach":
        """A prompt and what may be generated: the last token is handed out but never fed."""
        return cls(0, n_prompt, n_prompt + max(0, max_tokens - 1))

    def positions(self, phase: str | None) -> range:
        """All positions that the run may come to in a phase."""
        return range(
            self.prompt_stop if phase == "decode" else self.start,
            self.prompt_stop if phase == "prefill" else self.stop,
        )


def within_reach(positions: Chosen | str | None, reach: Reach, phase: str | None = None) -> Sequence[int]:
    """The positions of a selection that a run may come to in a phase; "last" is the prompt's and each generated one.

    Raises:
        HookError: when some of a list are out of reach in either phase.
    """
    everything, within = reach.positions(None), reach.positions(phase)
    if isinstance(positions, str):
        return range(max(reach.prompt_stop - 1, within.start), within.stop)
    if isinstance(positions, tuple):
        outside = [p for p in positions if p not in everything]
        if outside:
            raise HookError(
                f"position {outside[0]} is out of reach: this run comes to positions {span(everything)}.",
                field="positions",
            )
        return [p for p in positions if p in within]
    if positions is None:
        return within
    return range(max(within.start, positions.start), min(within.stop, positions.stop))


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
    keys = as_chosen(asked.keys)
    if keys is not None and (keys.start if isinstance(keys, range) else max(keys)) >= reach.stop:
        raise HookError(f"keys are out of reach, got {spell(keys)}: {reached}.")
    positions = asked.positions if isinstance(asked.positions, str) else as_chosen(asked.positions)
    due = within_reach(positions, reach, asked.phase)
    if keys is not None:
        due = [p for p in due if p >= first(keys)]
    if not due:
        phase = f" and the phase {asked.phase!r} is {span(within)}" if asked.phase else ""
        raise HookError(f"there is nothing to edit: {reached}{phase}.")
    return due
