"""``KnownModel``: a model whose circuit is known by construction, with prompts that it is about."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import mlx.nn as nn
import numpy as np

from ...errors import HookError
from ...model import HookedModel


class KnownModel(ABC):
    """A model whose circuit is known, because its weights were set so.

        known = KNOWN_MODELS["ioi"]()
        model, pairs = known.hooked(), known.pairs(12)
        known.edges()                    # what any method should find with ``known.ablation``

    An edge is true for a kind of ablation if replacing it alone changes the answer's logit difference for some pair.
    So the true edges depend on what is put in: what reads positions alone is never told from the corrupted prompt, but
    has nothing to read where zeros stand.
    """

    name: ClassVar[str]
    """Key in KNOWN_MODELS."""
    description: ClassVar[str]
    """One sentence."""
    notes: ClassVar[str] = ""
    """What should be known when results are read."""
    ablation: ClassVar[str] = "corrupted"
    """The ablation that the construction means."""
    kinds: ClassVar[tuple[str, ...]] = ()
    """The ways in which prompts are corrupted."""

    @property
    @abstractmethod
    def true_edges(self) -> Mapping[str, Mapping[str, Collection[str]]]:
        """True edges by ablation and by kind of prompts."""

    @abstractmethod
    def module(self) -> nn.Module:
        """The model as mlx-lm's are, float32; always the same."""

    @abstractmethod
    def pair(self, rng: np.random.Generator, kind: str) -> dict[str, Any]:
        """One pair of prompts of a kind."""

    def hooked(self) -> HookedModel:
        """The model, wrapped."""
        return HookedModel(self.module())

    def pairs(self, n: int, seed: int = 0, kind: str | None = None) -> list[dict[str, Any]]:
        """Pairs of prompts: ``clean`` and ``corrupted`` ids [pos], the ids of the ``answer`` and of a ``wrong`` one.

        Args:
            n: how many, at least 1.
            seed: gives the same pairs again, from 0.
            kind: one of ``kinds``; None for all of them in turn.

        Raises:
            HookError: for another number or seed, and an unknown kind.
        """
        check_whole("n", n, 1)
        check_whole("seed", seed, 0)
        rng = np.random.default_rng(seed)
        kinds = self._chosen(kind)
        return [self.pair(rng, kinds[i % len(kinds)]) for i in range(n)]

    def edges(self, ablation: str | None = None, kind: str | None = None) -> frozenset[str]:
        """The true edges.

        Args:
            ablation: what is put in the place of an edge: a key of ``true_edges``; None for ``self.ablation``.
            kind: which prompts they are measured on; None for all kinds.

        Raises:
            HookError: for an ablation by which the construction says nothing, and an unknown kind.
        """
        chosen = self.ablation if ablation is None else ablation
        if chosen not in list(self.true_edges):
            raise HookError(
                f"{self.name} has no true edges by {chosen!r}: it is made for {', '.join(self.true_edges)}.",
                field="ablation",
            )
        return frozenset(edge for one in self._chosen(kind) for edge in self.true_edges[chosen][one])

    @property
    def forced(self) -> frozenset[str]:
        """Edges that say nothing about a method, because there is no other way; they are left out of scores."""
        return frozenset()

    def _chosen(self, kind: str | None) -> tuple[str, ...]:
        if kind is None:
            return self.kinds
        if kind not in self.kinds:
            raise HookError(f"{self.name} has no prompts of kind {kind!r}: {', '.join(self.kinds)}.", field="kind")
        return (kind,)


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number of these bounds.

    Raises:
        HookError: says what is allowed.
    """
    if type(value) is not int or value < least or (most is not None and value > most):
        allowed = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise HookError(f"{name} is a whole number {allowed}, got {value!r}.", field=name)


def check_heads(known: Any, *names: str, least: int = 1) -> None:
    """Refuse a number of heads, and places of named heads, that a model cannot have.

    Raises:
        HookError: says what is allowed.
    """
    check_whole("n_heads", known.n_heads, least)
    for name in names:
        check_whole(name, getattr(known, name), 0, known.n_heads - 1)


def distinct(rng: np.random.Generator, among: range, count: int) -> list[int]:
    """Different ids, drawn."""
    return [int(token) for token in rng.choice(among, size=count, replace=False)]


def causal_softmax(scores: np.ndarray) -> np.ndarray:
    """Attention patterns [query, key] of scores."""
    scores = np.where(np.tril(np.ones(scores.shape, dtype=bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
