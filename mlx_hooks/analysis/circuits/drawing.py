"""A circuit as a picture: layers upwards, heads side by side, edges as wide as their effects; and as graphviz text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import HookError
from ...storage.files import write_whole, writing
from ..charts import COLOURS, FAINT
from ..pictures import PLAIN, check_matplotlib, png
from .places import EMBED, LOGITS, SIZED, Place, Step, places_of, steps_of
from .wires import Box, Wire, curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .circuit import Circuit

FORMATS = (".png", ".dot")
_POSITIVE, _NEGATIVE = COLOURS[0], COLOURS[1]
_FILLS = {"embed": "#eceff2", "logits": "#eceff2", "mlp": "#fbefd9", "mixer": "#fbefd9", "side": "#fbefd9"}
_HEAD_FILL = "#e3edfb"
_WIDTH, _HEIGHT = 0.78, 0.4
"""Of a node's box."""
_COLUMN = 1.15
_PORTS = {"q": -0.25, "k": 0.0, "v": 0.25}
"""Where on a head's lower edge its inputs are."""
_ROW, _LAYER_GAP = 1.15, 0.35
_BEYOND, _EDGE, _AROUND = 0.6, 0.1, 0.1
"""How much wider than all "embed" and "logits" are, where edges to them end at the latest, and what is left around."""
_THINNEST, _WIDEST = 0.5, 4.0
"""Points: of lines with the score 0 and with the greatest."""


def draw_graph(circuit: "Circuit", title: str | None = None) -> "Figure":
    """The circuit's nodes from "embed", below, to "logits"; blue edges raise the metric, brown ones lower it.

    Grey edges are of scores that have no sign, as ACDC's, or have none at all. An edge ends at the head's q, k or v,
    and goes round what stands between as far as there is a way. Where heads share keys and values, it leads to each of
    them in the circuit.

    Raises:
        HookError: without matplotlib.
    """
    check_matplotlib("write .dot for graphviz")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    places, steps = places_of(circuit), steps_of(circuit)
    boxes = _boxes(list(places.values()))
    whole, lowest = boxes[LOGITS], min(box.y for box in boxes.values())
    width, height = whole.width, whole.y - lowest
    sides = (whole.x - width / 2, whole.x + width / 2)
    made = Figure(figsize=(max(5.0, 1.25 * width + 1.2), max(3.5, 0.72 * height + 1.8)), layout="constrained")
    made.suptitle(title or _title(circuit), fontsize=11, **PLAIN)
    axes = made.add_subplot()
    # The strongest edges lie on top.
    drawn = zip(steps, curves(_wires(steps, boxes), boxes, sides), strict=True)
    for step, curve in sorted(drawn, key=lambda one: abs(one[0].score or 0.0)):
        _draw_step(axes, step, curve, _line_width(step, steps))
    kinds: dict[str, set[str]] = {}
    for step in steps:
        if step.kind is not None:
            kinds.setdefault(step.target, set()).add(step.kind)
    for place in places.values():
        _draw_node(axes, place, boxes[place.name], sorted(kinds.get(place.name, ())))
    axes.set_xlim(sides[0] - _AROUND, sides[1] + _AROUND)
    axes.set_ylim(lowest - 0.5, whole.y + 0.5)
    axes.set_axis_off()
    shown = _meanings(circuit, steps)
    if shown:
        handles = [Line2D([], [], color=colour, linewidth=2, label=meaning) for colour, meaning in shown.items()]
        made.legend(handles=handles, fontsize=8, frameon=False, loc="outside lower center", ncols=len(handles))
    return made


def dot(circuit: "Circuit", title: str | None = None) -> str:
    """The circuit as text for graphviz's ``dot``; edges say which input they lead to, and their score as a hint."""
    places, steps = list(places_of(circuit).values()), steps_of(circuit)
    lines = [
        "digraph circuit {",
        f"  graph [rankdir=BT, label={_quoted(title or _title(circuit))}, labelloc=t, fontname=sans]",
        "  node [shape=box, style=filled, fontname=sans, fontsize=11]",
        "  edge [fontname=sans, fontsize=9, arrowsize=0.6]",
    ]
    for row in sorted({place.row for place in places}):
        own = [place for place in places if place.row == row]
        listed = "; ".join(f"{_quoted(place.name)} [fillcolor={_quoted(_fill(place))}]" for place in own)
        lines.append(f"  {{ rank=same; {listed} }}")
    for step in steps:
        said: dict[str, Any] = {"color": _colour(step), "penwidth": f"{_line_width(step, steps):.2f}"}
        said |= {} if step.kind is None else {"headlabel": step.kind}
        said["tooltip"] = step.edge if step.score is None else f"{step.edge}: {step.score:.4g}"
        told = ", ".join(f"{name}={_quoted(value)}" for name, value in said.items())
        lines.append(f"  {_quoted(step.source)} -> {_quoted(step.target)} [{told}]")
    return "\n".join([*lines, "}"]) + "\n"


def check_drawable(path: Path) -> None:
    """Say before a run that its circuit could not be drawn to a file.

    Raises:
        HookError: for other names, and without matplotlib.
    """
    if path.suffix not in FORMATS:
        raise HookError(f"A circuit is drawn to {' or '.join(FORMATS)}, by the file's name; got {str(path)!r}.")
    if path.suffix == ".png":
        check_matplotlib("write .dot for graphviz")


def save_picture(circuit: "Circuit", path: str | Path, title: str | None = None) -> None:
    """Write the picture (.png) or the text for graphviz (.dot); the file is there whole or not at all.

    Raises:
        HookError: for other names, without matplotlib, and where the file cannot be written.
    """
    path = Path(path).expanduser()
    check_drawable(path)
    content = dot(circuit, title) if path.suffix == ".dot" else png(draw_graph(circuit, title))
    with writing(path):
        write_whole(path, content)


def _meanings(circuit: "Circuit", steps: Sequence[Step]) -> dict[str, str]:
    """What the colours of the lines say, by colour; none for edges without scores."""
    about = circuit.metadata
    metric = str(about.get("metric", "metric")).replace("_", " ")
    moves = f"moves the {metric}, up or down" if about.get("method") in SIZED else "the wider, the larger the score"
    meanings = {_POSITIVE: f"raises the {metric}", _NEGATIVE: f"lowers the {metric}", FAINT: moves}
    drawn = {_colour(step) for step in steps if step.score is not None}
    return {colour: meaning for colour, meaning in meanings.items() if colour in drawn}


def _title(circuit: "Circuit") -> str:
    about = circuit.metadata
    of = about.get("edges_of_model")
    named = [about[name] for name in ("task", "model") if isinstance(about.get(name), str)]
    return ", ".join([*named, f"{len(circuit.edges)} {f'of {of} ' if of else ''}edges"])


def _coordinates(places: Sequence[Place]) -> dict[str, tuple[float, float]]:
    """Where each node's middle is: rows upwards, heads side by side, what stands alone in its row on the right."""
    rows = sorted({place.row for place in places})
    widest = max(sum(place.row == row for place in places) for row in rows)
    found: dict[str, tuple[float, float]] = {}
    y = 0.0
    for i, row in enumerate(rows):
        y += 0.0 if i == 0 else _ROW + (_LAYER_GAP if row[0] != rows[i - 1][0] else 0.0)
        own = sorted((place for place in places if place.row == row), key=lambda place: place.head or 0)
        if own[0].part in ("mlp", "mixer", "side"):
            found[own[0].name] = (_COLUMN * (widest + 1) / 2, y)
            continue
        # Heads of one layer do not stand right above those of the layer before: edges pass between them.
        shift = 0.0 if own[0].layer is None else (0.22 if own[0].layer % 2 else -0.22)
        for column, place in enumerate(own):
            found[place.name] = (_COLUMN * (column - (len(own) - 1) / 2) + shift, y)
    return found


def _boxes(places: Sequence[Place]) -> dict[str, Box]:
    """Those of "embed" and "logits" are wider than all, so that edges to and from them stand apart."""
    at = _coordinates(places)
    xs = [x for x, _ in at.values()]
    widest = max(xs) - min(xs) + _WIDTH + 2 * _BEYOND
    middle = (max(xs) + min(xs)) / 2
    return {
        place.name: Box(middle, at[place.name][1], widest, _HEIGHT)
        if place.layer is None
        else Box(*at[place.name], _WIDTH, _HEIGHT)
        for place in places
    }


def _draw_node(axes: "Axes", place: Place, box: Box, kinds: Sequence[str]) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = box.x, box.y
    corner, size = (x - box.width / 2, y - box.height / 2), (box.width, box.height)
    look: dict[str, Any] = {"facecolor": _fill(place), "edgecolor": FAINT, "linewidth": 0.8, "zorder": 3}
    look["gid"] = place.name
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0,rounding_size=0.06", **look))
    centred: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 4, **PLAIN}
    axes.text(x, y + (0.05 if kinds else 0.0), place.name, fontsize=9, **centred)
    for kind in kinds:
        axes.text(x + _PORTS[kind], y - _HEIGHT / 2 + 0.075, kind, fontsize=6.5, color=FAINT, **centred)


def _draw_step(axes: "Axes", step: Step, curve: np.ndarray, width: float) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    style: dict[str, Any] = {"color": _colour(step), "alpha": 0.75, "zorder": 2, "fill": True, "gid": step.edge}
    arrow = f"-|>,head_length={3 + width / 2},head_width={1.2 + width / 3}"
    path = Curve(curve, [Curve.MOVETO, *3 * [Curve.CURVE4]])
    axes.add_patch(FancyArrowPatch(path=path, arrowstyle=arrow, mutation_scale=1, linewidth=width, **style))


def _wires(steps: Sequence[Step], boxes: Mapping[str, Box]) -> list[Wire]:
    """Where each edge begins and ends: at a head's q, k or v; at its own place where all edges lead to one input."""
    ends = _ends(steps, boxes)
    made = []
    for step, x in zip(steps, ends, strict=True):
        source, target = boxes[step.source], boxes[step.target]
        at, to = source.x, x
        if step.source == EMBED:
            at = to = source.x - source.width / 2 + _EDGE if step.target == LOGITS else x
        elif step.target == LOGITS:
            to = at
        slides = [(box.x - box.width / 2 + _EDGE, box.x + box.width / 2 - _EDGE) for box in (source, target)]
        start, end = (at, source.y + _HEIGHT / 2), (to, target.y - _HEIGHT / 2)
        free = (slides[0] if step.source == EMBED else None, slides[1] if step.target == LOGITS else None)
        made.append(Wire(start, end, step.source, step.target, free))
    return made


def _ends(steps: Sequence[Step], boxes: Mapping[str, Box]) -> list[float]:
    """Where on its target's lower edge each step ends, x; those to one input side by side, as their sources stand."""
    found = [boxes[step.target].x + _PORTS.get(step.kind or "", 0.0) for step in steps]
    alike: dict[str, list[int]] = {}
    for i, step in enumerate(steps):
        if step.kind is None and step.target != LOGITS:
            alike.setdefault(step.target, []).append(i)
    for own in alike.values():
        own.sort(key=lambda i: (boxes[steps[i].source].x, -boxes[steps[i].source].y))
        room = min(0.14, (_WIDTH - 2 * _EDGE) / max(1, len(own) - 1))
        for place, i in enumerate(own):
            found[i] += room * (place - (len(own) - 1) / 2)
    return found


def _line_width(step: Step, steps: Sequence[Step]) -> float:
    """In points."""
    greatest = max(abs(each.score or 0.0) for each in steps)
    share = abs(step.score) / greatest if step.score is not None and greatest > 0 else 0.3
    return _THINNEST + (_WIDEST - _THINNEST) * share


def _colour(step: Step) -> str:
    return FAINT if step.effect is None else _NEGATIVE if step.effect < 0 else _POSITIVE


def _fill(place: Place) -> str:
    return _FILLS.get(place.part, _HEAD_FILL)


def _quoted(text: str) -> str:
    """A text as DOT has it, where backslashes and quotes are escaped as in JSON."""
    return json.dumps(text, ensure_ascii=False)
