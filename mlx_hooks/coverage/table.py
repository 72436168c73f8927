"""What can be hooked in each architecture: surveyed on tiny models, written as ``docs/architectures.md``."""

import functools
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .. import hook_points
from ..architectures import Architecture
from ..errors import UntrustedHookWarning
from ..model import HookedModel
from ..selftest import Check, SelfTest
from .models import architectures, tiny_model

# Columns of the three tables: heading -> components that stand or fall together.
STREAM: dict[str, tuple[str, ...]] = {
    "embed": ("embed", "embed_in"),
    "pos_embed": ("pos_embed",),
    "resid_pre": ("resid_pre",),
    "ln1": ("ln1", "ln1_in"),
    "ln1_post": ("ln1_post",),
    "attn_out": ("attn_out", "attn_in"),
    "resid_mid": ("resid_mid",),
    "ln2": ("ln2", "ln2_in"),
    "ln2_post": ("ln2_post",),
    "mlp_out": ("mlp_out", "mlp_in"),
    "side_out": ("side_out",),
    "resid_post": ("resid_post",),
    "ln_final": ("ln_final", "ln_final_in"),
    "logits": ("logits",),
}
ATTENTION: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("q", "k", "rot_q", "rot_k", "v", "attn_scores", "pattern", "sink", "z")
}
REST: dict[str, tuple[str, ...]] = {
    "mlp.pre": ("mlp_pre",),
    "mlp.pre_linear": ("mlp_pre_linear",),
    "mlp.post": ("mlp_post",),
    "router_scores": ("router_scores",),
    "expert_indices": ("expert_indices",),
    "expert_weights": ("expert_weights",),
    "expert_out": ("expert_out",),
    "mixer.in, out": ("mixer_in", "mixer_out"),
    "mixer.state": ("mixer_state",),
}

# Projections to or from a latent that keys are made of.
LATENT_KEYS = ("embed_q", "kv_b_proj", "kv_proj")

# Why a hook point is absent by nature.
ABSENT = {
    "a": "no attention in any layer",
    "b": "attention and MLP read the same stream (parallel branches): there is no stream between them",
    "c": "every block has a single sublayer",
    "d": "dense MLPs, no experts",
    "e": "experts in every layer, no dense MLP; their hidden neurons differ from token to token",
    "f": "the norm is a function without weights, or stands inside the sublayer: hook the input of what follows",
    "g": "the MLP has no gate",
    "k": "no attention sinks",
    "l": "keys are made from a latent that all heads share",
    "m": "no MLP in any layer",
    "n": "norms stand before the sublayers only",
    "o": "one norm feeds both branches",
    "p": "norms stand after the sublayers only",
    "r": "positions are rotary, or not embedded",
    "s": "nothing is added besides attention, mixer and MLP",
    "t": "a linear map stands in for attention: it has no state",
    "x": "the MLP reads a learned mixture of sums, not the stream",
    "y": "no state-space, convolution or linear-attention layers",
}


@dataclass(frozen=True)
class Survey:
    """One architecture: the cell of each column, how its blocks add up, and what there is to know besides."""

    name: str
    cells: dict[str, str]
    caches: str
    notes: list[str]
    report: SelfTest | None

    @property
    def passed(self) -> bool:
        return self.report is None or self.report.passed


@functools.cache
def survey(name: str) -> Survey:
    """Build a tiny model of an architecture, run its self-test and say what can be hooked."""
    model = tiny_model(name)
    with warnings.catch_warnings():
        # What a warning says is in the report.
        warnings.simplefilter("ignore", UntrustedHookWarning)
        hooked = HookedModel(model)
    architecture = hooked.architecture
    report: SelfTest | None = hooked.selftest()
    assert report is not None
    notes = list(dict.fromkeys(_notes(hooked, report)))
    if not report.checks[0].passed and "Metal" in report.checks[0].why:
        report, notes = None, ["needs a Metal kernel: it was not run on this platform", *notes]
    cells = {
        heading: _cell(architecture, components, report)
        for columns in (STREAM, ATTENTION, REST)
        for heading, components in columns.items()
    }
    kinds = [type(cache).__name__ for cache in make_prompt_cache(model)]
    return Survey(name, cells, ", ".join(dict.fromkeys(kinds)), notes, report)


def _cell(architecture: Architecture, components: tuple[str, ...], report: SelfTest | None) -> str:
    names = [p.name for p in architecture.points.values() if p.component in components]
    reasons = [why for name, why in architecture.unsupported.items() if _component(name) in components]
    if report is not None and any(name in report.untrusted for name in names):
        return "**not exact**"
    main = [p.name for p in architecture.points.values() if p.component == components[0]]
    if reasons and not main:
        return "✗"
    if not names:
        return _absence(architecture, components[0])
    if report is None:
        return "?"
    layers = {point.layer for point in architecture.points.values() if point.component in components}
    if None in layers or len(layers) == len(architecture.blocks):
        return "✓"
    return f"✓ {len(layers)}/{len(architecture.blocks)}"


def _component(name: str) -> str:
    """The component of a hook point inside a block."""
    layer = int(name.split(".")[1])
    return next(c for c in hook_points.components() if hook_points.block_point(c, layer).name == name)


def _absence(architecture: Architecture, component: str) -> str:
    """The letter of the reason why no layer has a component.

    Raises:
        LookupError: when there is none: a hole in the table that nothing explains.
    """
    layers = range(len(architecture.blocks))
    everything = [sublayer for sublayers in architecture.sublayers for sublayer in sublayers]
    kinds = {sublayer.kind for sublayer in everything}
    attending = [sublayer.module for sublayer in everything if sublayer.kind == "attn"]
    present = {point.component for point in architecture.points.values()}
    parallel = any(architecture.is_parallel(layer) for layer in layers)
    dense = bool({"mlp_pre", "mlp_post"} & present)
    rules: list[tuple[tuple[str, ...], bool, str]] = [
        (("pos_embed",), True, "r"),
        (("side_out",), True, "s"),
        ((*ATTENTION, "attn_out"), "attn" not in kinds, "a"),
        (("mixer_in", "mixer_state"), "mixer" not in kinds, "y"),
        (("mixer_state",), True, "t"),
        (("sink",), True, "k"),
        (("k",), any(name in module for name in LATENT_KEYS for module in attending), "l"),
        (("ln1", "ln2"), "ln1_post" in present or "ln2_post" in present, "p"),
        (("ln1_post", "ln2_post"), True, "n"),
        (("ln2",), parallel, "o"),
        (("resid_mid",), parallel, "b"),
        (("resid_mid",), all(len(sublayers) < 2 for sublayers in architecture.sublayers), "c"),
        (("resid_mid",), bool(architecture.other_sum(len(architecture.blocks) - 1)), "x"),
        (("mlp_out", "mlp_pre", "mlp_pre_linear", "mlp_post"), "mlp" not in kinds, "m"),
        (("router_scores", "expert_indices", "expert_weights", "expert_out"), True, "d"),
        (("ln2",), "mlp" not in kinds, "m"),
        (("ln1", "ln2", "ln_final"), True, "f"),
        (("mlp_pre_linear",), dense, "g"),
        (("mlp_pre", "mlp_pre_linear", "mlp_post"), "router_scores" in present, "e"),
    ]
    for components, holds, letter in rules:
        if component in components and holds:
            return letter
    raise LookupError(f"{architecture.cfg.model_type} has no {component}, and no rule says why.")


def _passes(hooked: HookedModel) -> int:
    """How often a layer runs in one forward pass, or how many sublayers of a kind it has."""
    _, cache = hooked.run_with_cache([[1]], "blocks.0.*")
    return max(record.pass_index for records in cache.records.values() for record in records) + 1


def _notes(hooked: HookedModel, report: SelfTest) -> Iterator[str]:
    architecture = hooked.architecture
    for layer in range(len(architecture.blocks)):
        if architecture.other_sum(layer):
            yield f"`resid_post` is not `resid_pre` plus what is added: {architecture.other_sum(layer)}"
        if architecture.is_parallel(layer):
            yield "parallel attention and MLP"
        if architecture.stream_scale(layer) is not None:
            yield "the stream is multiplied at the end of each block"
    if report.passed and _passes(hooked) > 1:
        yield "several sublayers of a kind in one block, or several passes through it: records say which pass"
    read_only = {p.component: places[0].why_not for p, places in architecture.locations.items() if places[0].why_not}
    for why in dict.fromkeys(read_only.values()):
        components = ", ".join(f"`{component}`" for component, reason in read_only.items() if reason == why)
        yield f"{components} can be read but not replaced: {why}"
    for why in dict.fromkeys(architecture.unsupported.values()):
        refused = dict.fromkeys(_component(name) for name, reason in architecture.unsupported.items() if reason == why)
        yield f"✗ {', '.join(f'`{component}`' for component in refused)}: {why}"
    for check in report.checks:
        if check.tolerance == float("inf"):
            yield f"{check.name}: {_without_figures(check)}"


def _without_figures(check: Check) -> str:
    """The reason of a check, without numbers that differ from machine to machine."""
    return re.sub(r" by [0-9.e+-]+", "", check.why)


def rows(names: Iterable[str] | None = None) -> Iterator[Survey]:
    """The surveys of all architectures, or of some, in order."""
    for name in names if names is not None else architectures():
        yield survey(name)


def table_row(found: Survey, columns: dict[str, tuple[str, ...]]) -> str:
    """One line of a table."""
    return " | ".join([f"| `{found.name}`", *(found.cells[heading] for heading in columns)]) + " |"


def note_row(found: Survey) -> str:
    """One line of the list of caches and notes."""
    return f"| `{found.name}` | {found.caches} | {'; '.join(found.notes)} |"


def document(surveys: Iterable[Survey]) -> str:
    """The whole of ``docs/architectures.md``."""
    surveys = list(surveys)
    exact = sum(found.report is not None and found.passed for found in surveys)
    parts = [
        "# What can be hooked in each architecture",
        "",
        f"Written by `neuroscope coverage -o docs/architectures.md` with mlx-lm {version('mlx-lm')} "
        f"on {_platform()}; a test fails when it is out of date. Each architecture was built as a "
        "tiny random model that has every kind of its layers, and had to pass the self-test (`model.selftest()`): "
        f"{exact} of {len(surveys)} do, the others need a Metal kernel and were not run on this platform.",
        "",
        "- **✓** there and exact; **✓ 1/3** in one of the tiny model's three layers, the others are of another kind",
        "- **?** there, not run on this platform",
        "- **✗** not supported; the notes at the end say why",
        *(f"- **{letter}** absent by nature: {why}" for letter, why in ABSENT.items() if _used(letter, surveys)),
        "",
        "Names are short: `resid_pre` stands for `blocks.{i}.hook_resid_pre`, and the inputs of norms and sublayers "
        "(`hook_in`) stand or fall with their outputs. `print(model)` shows the full names.",
    ]
    for title, columns in (("Stream and norms", STREAM), ("Attention", ATTENTION), ("MLP, experts, mixers", REST)):
        parts += ["", f"## {title}", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        parts += [table_row(found, columns) for found in surveys]
    parts += ["", "## KV caches and notes", "", "| | caches | notes |", "|---|---|---|"]
    return "\n".join([*parts, *(note_row(found) for found in surveys)]) + "\n"


def _used(letter: str, surveys: list[Survey]) -> bool:
    return any(letter in found.cells.values() for found in surveys)


def _platform() -> str:
    return "macOS, Metal" if mx.metal.is_available() else "MLX's CPU build"
