"""Results as files: JSON for programs, a Markdown page with pictures for people, autoencoders as SAELens has them."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..analysis import pictures
from ..analysis.identity import ModelIdentity
from ..errors import HookError
from ..storage.files import whole_file, write_whole, writing
from . import charts
from .analyses import analysis_of
from .context import MODEL, Analysis, EvalContext
from .curves import Curves
from .findings import findings, table_of

RESULTS = "mechint_results.json"
REPORT = "mechint_report.md"
FORMAT = "neuroscope-mechint-1"
PICTURES = "pictures"
SAES = "sae"
_HEADING = "# What formed while "
_OWN_PICTURE = re.compile(r"[\w.-]+\.png")
_SHOWN_STEPS, _SHOWN_LAYERS = 12, 2
ALL_LAYERS, STEPS = "all layers", "steps"
"""In the place of a layer's name: pictures of all of them, and of all over the steps."""


def write_results(folder: Path, results: Mapping[str, Any], curves: Curves | None, context: EvalContext) -> Path:
    """Write results to a folder; those of an earlier run in it are replaced.

    Args:
        results: ``config`` and ``analyses``.
        context: what they were made of.

    Returns:
        the report's path.

    Raises:
        HookError: the folder cannot be written, or holds other files of these names.
    """
    earlier = _earlier_pictures(folder)
    captured, model = _captured(context), _model(context)
    drawn, why_not = _pictures(results["analyses"], curves)
    page = _Page(results, curves, captured, model, drawn, why_not, _saved_saes(context))
    document = {
        "format": FORMAT,
        "made": page.made,
        "versions": {name: version(name) for name in ("neuroscope-mlx", "mlx", "mlx-lm")},
        **results,
        "captured": captured,
        "model": model,
        "curves": curves,
        "pictures": [picture.path for picture in drawn],
    }
    report = folder / REPORT
    with writing(report):
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        for picture in drawn:
            write_whole(folder / picture.path, picture.png)
        for layer, made in _saved_saes(context).items():
            _copy(made, folder / SAES / layer)
        write_whole(folder / RESULTS, json.dumps(document, indent=1, allow_nan=False))
        write_whole(report, page.text())
        for path in earlier - {picture.path for picture in drawn}:
            (folder / path).unlink(missing_ok=True)
    return report


@dataclass(frozen=True)
class Picture:
    """A drawing and where it belongs: ``analysis`` "" is training, ``layer`` STEPS all layers over the steps."""

    analysis: str
    layer: str
    title: str
    path: str
    png: bytes


def _pictures(analyses: Mapping[str, Any], curves: Curves | None) -> tuple[list[Picture], str]:
    """All drawings, and why there are none."""
    try:
        pictures.check_picture(0, 1)
    except HookError:
        return [], "The pictures are left out: they need matplotlib, pip install 'neuroscope-mlx[plot]'."
    found: list[Picture] = []

    def keep(analysis: str, layer: str, figures: Sequence[tuple[str, Any]]) -> None:
        for title, figure in figures:
            name = _plain("_".join(filter(None, (analysis or "training", layer, str(len(found))))))
            found.append(Picture(analysis, layer, title, f"{PICTURES}/{name}.png", pictures.png(figure, dpi=110)))

    for name, result in analyses.items():
        analysis = analysis_of(name)
        layers = {layer: dict(own) for layer, own in _by_layer(analysis, result).items() if "error" not in own}
        if analysis.draws_together:
            keep(name, ALL_LAYERS, analysis.draw(layers) if layers else [])
            continue
        for layer, own in layers.items():
            keep(name, layer, analysis.draw(own))
    if curves is not None:
        keep("", STEPS, charts.loss_charts(curves["training"]))
        for name, layers in curves["analyses"].items():
            keep(name, STEPS, charts.curve_charts(analysis_of(name), curves["steps"], layers))
    return found, ""


@dataclass
class _Page:
    """The report as Markdown."""

    results: Mapping[str, Any]
    curves: Curves | None
    captured: Mapping[str, Any] | None
    model: Mapping[str, Any] | None
    drawn: Sequence[Picture]
    why_not: str
    saes: Mapping[str, Path]
    made: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def text(self) -> str:
        """All of it."""
        return "\n".join([*self._top(), *self._analyses(), *self._over_steps(), *self._files()])

    @property
    def _name(self) -> str:
        """What the model is called: a model without a name of its own is called as its type."""
        described = [about for about in (self.model, (self.captured or {}).get("model")) if about]
        names = [about["name"] for about in described if about.get("name") not in (None, about.get("model_type"))]
        return str([*names, *(about.get("model_type") for about in described), "a model"][0])

    def _top(self) -> Iterator[str]:
        yield f"{_HEADING}{_cell(self._name)} was trained"
        yield ""
        yield f"Made {self.made} by NeuroScope for MLX {version('neuroscope-mlx')}."
        yield ""
        failed = list(self._failed())
        seen = [line for name, result in self.results["analyses"].items() for line in self._findings(name, result)]
        seen += self._courses()
        if seen:
            yield from ["## In short", "", *(f"- {line}" for line in seen), ""]
        if failed:
            yield from ["## What failed", "", *(f"- {line}" for line in failed), ""]
        if self.why_not:
            yield from [self.why_not, ""]
        yield from self._captured_part()

    def _findings(self, name: str, result: Mapping[str, Any]) -> Iterator[str]:
        """The first sentence on each layer; of many layers on the last, the others are told further down."""
        layers = {layer: own for layer, own in _by_layer(analysis_of(name), result).items() if "error" not in own}
        for layer, own in list(layers.items())[-1 if len(layers) > _SHOWN_LAYERS else 0 :]:
            where = "" if layer == MODEL else f" at `{layer}`"
            yield f"**{analysis_of(name).title}**{where}: {_cell(findings(name, own)[0])}"

    def _courses(self) -> Iterator[str]:
        """How the loss and the first number of each analysis went, where that changed most."""
        curves = self.curves or {"steps": [], "analyses": {}, "training": []}
        losses = [report["train_loss"] for report in curves["training"] if report.get("train_loss") is not None]
        if len(losses) > 1:
            yield f"**Training**: the loss went from {_number(losses[0])} to {_number(losses[-1])} nats per token."
        for name, layers in curves["analyses"].items():
            metric = analysis_of(name).metrics[0]
            courses = {layer: _range(own[metric.key])[:2] for layer, own in layers.items() if metric.key in own}
            if courses:
                layer = max(courses, key=lambda layer: abs((courses[layer][1] or 0) - (courses[layer][0] or 0)))
                first, last = map(_number, courses[layer])
                where = "" if layer == MODEL else f" at `{layer}`"
                yield f"**{analysis_of(name).title}**{where}, while training: {metric.label} from {first} to {last}."

    def _failed(self) -> Iterator[str]:
        for name, result in self.results["analyses"].items():
            for layer, own in _by_layer(analysis_of(name), result).items():
                if "error" in own:
                    where = "" if layer == MODEL else f" of `{layer}`"
                    yield f"`{name}`{where}: {_cell(own['error'])}"
        for name, layers in (self.curves or {"analyses": {}})["analyses"].items():
            for layer, own in layers.items():
                if "error" in own:
                    yield f"`{name}` of `{layer}`, over the steps: {_cell(own['error'])}"

    def _captured_part(self) -> Iterator[str]:
        if self.captured is None:
            return
        steps = self.captured["steps"]
        yield from ["## What was captured", ""]
        if steps:
            yield f"Steps {_listed(steps)}: {len(steps)} of them, each the number of batches trained on until then."
            analysed = self.captured["analysed_steps"]
            yield f"What follows is of the rows of {_which(analysed)}."
            yield ""
        yield from _table(
            ["layer", "rows (tokens)", "axes of a row", "numbers in a row", "type"],
            [
                [f"`{name}`", f"{layer['rows']:,}", ", ".join(layer["axes"]), layer["width"], layer["dtype"] or ""]
                for name, layer in self.captured["layers"].items()
            ],
        )

    def _analyses(self) -> Iterator[str]:
        for name, result in self.results["analyses"].items():
            analysis = analysis_of(name)
            yield from [f"## {analysis.title}", "", analysis.about, ""]
            layers = {layer: own for layer, own in _by_layer(analysis, result).items() if "error" not in own}
            yield from self._numbers(analysis, layers)
            yield from _shown([p for p in self.drawn if (p.analysis, p.layer) == (name, ALL_LAYERS)])
            for layer, own in layers.items():
                yield from self._layer(analysis, layer, own)
            if not layers:
                yield from ["It failed: see above.", ""]

    def _numbers(self, analysis: Analysis, layers: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
        numbers = {layer: analysis.scalars(own) for layer, own in layers.items()}
        metrics = [metric for metric in analysis.metrics if any(metric.key in row for row in numbers.values())]
        if metrics and list(layers) == [MODEL]:
            rows = [[metric.label, _number(numbers[MODEL].get(metric.key))] for metric in metrics]
            yield from _table(["", "value"], rows)
        elif metrics:
            yield from _table(
                ["layer", *(metric.label for metric in metrics)],
                [[f"`{layer}`", *(_number(row.get(m.key)) for m in metrics)] for layer, row in numbers.items()],
            )

    def _layer(self, analysis: Analysis, layer: str, result: Mapping[str, Any]) -> Iterator[str]:
        first, *more = map(_cell, findings(analysis.name, result))
        drawn = [picture for picture in self.drawn if (picture.analysis, picture.layer) == (analysis.name, layer)]
        table = table_of(analysis.name, result)
        if layer != MODEL:
            yield from [f"### `{layer}`", ""]
        for line in (first[:1].upper() + first[1:], *more):
            yield from [line, ""]
        if table is not None:
            yield from [table.title, ""]
            yield from _table(table.heads, [[_cell(str(cell)) for cell in row] for row in table.rows])
        yield from _shown(drawn)

    def _over_steps(self) -> Iterator[str]:
        if self.curves is None:
            return
        yield from ["## While it was trained", ""]
        yield f"The same analyses at each of the steps {_listed(self.curves['steps'])}."
        yield ""
        yield from _shown([picture for picture in self.drawn if picture.analysis == ""])
        for name, layers in self.curves["analyses"].items():
            analysis = analysis_of(name)
            yield from [f"### {analysis.title}, step by step", ""]
            labels = {metric.key: metric.label for metric in analysis.metrics}
            yield from _table(
                ["layer", "number", "first", "last", "lowest", "highest"],
                [
                    [f"`{layer}`", labels.get(key, key), *(_number(n) for n in _range(values))]
                    for layer, own in layers.items()
                    if "error" not in own
                    for key, values in own.items()
                ],
            )
            yield from _shown([p for p in self.drawn if (p.analysis, p.layer) == (name, STEPS)])

    def _files(self) -> Iterator[str]:
        yield from ["## Files", "", f"- `{RESULTS}`: all numbers, with the configuration."]
        for layer in self.saes:
            yield f"- `{SAES}/{layer}/`: the sparse autoencoder of this layer, as SAELens reads it."
        yield ""


# Parts of a page


def _shown(drawn: Sequence[Picture]) -> Iterator[str]:
    for picture in drawn:
        # Square brackets would end the text early.
        title = re.sub(r"[\[\]]", "", picture.title)
        yield from [f"![{title}]({picture.path})", ""]


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    if not rows:
        return
    for row in (heads, ["---"] * len(heads), *rows):
        yield f"| {' | '.join(str(cell) for cell in row)} |"
    yield ""


def _cell(text: str) -> str:
    """Text that is no Markdown, in one cell of a table."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", text.replace("\r", " ").replace("\n", "⏎"))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def _range(values: Sequence[float | None]) -> list[float | None]:
    there = [value for value in values if value is not None]
    return [there[0], there[-1], min(there), max(there)] if there else [None] * 4


def _which(steps: Sequence[int] | None) -> str:
    """Training steps whose rows were analysed, in words."""
    if steps is None:
        return "all of them together"
    return f"step {steps[0]:,}" if len(steps) == 1 else f"steps {_listed(steps)} together"


def _listed(steps: Sequence[int]) -> str:
    shown = [f"{step:,}" for step in steps]
    return ", ".join(shown if len(shown) <= _SHOWN_STEPS else [*shown[:6], "...", *shown[-3:]])


# What results were made of


def _by_layer(analysis: Analysis, result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {MODEL: result} if analysis.needs == MODEL or "error" in result else dict(result)


def _captured(context: EvalContext) -> dict[str, Any] | None:
    if not context.has_captured:
        return None
    layers = {}
    for name in [*context.layers("rows"), *context.layers("patterns")]:
        rows = context.rows_of(name)
        dtype = context.reader.layers[name].get("dtype") if context.reader is not None else None
        layers[name] = {"rows": len(rows), "axes": list(rows.axes), "width": rows.width, "dtype": dtype}
    described = context.reader.description if context.reader is not None else {}
    return {
        "folder": None if context.reader is None else str(context.reader.folder),
        "steps": [] if context.reader is None else context.reader.steps,
        "analysed_steps": None if context.steps is None else list(context.steps),
        "model": described.get("model"),
        "layers": layers,
    }


def _model(context: EvalContext) -> dict[str, Any] | None:
    if context.model is None:
        return None
    return {"name": context.model.model_name, **ModelIdentity.of(context.model).to_dict()}


def _saved_saes(context: EvalContext) -> dict[str, Path]:
    if context.sae_folder is None or not context.sae_folder.is_dir():
        return {}
    return {path.name: path for path in sorted(context.sae_folder.iterdir())}


# Files


def _earlier_pictures(folder: Path) -> set[str]:
    """The pictures of an earlier report in the folder.

    Raises:
        HookError: there are files in the way that are none of a report.
    """
    results, report = folder / RESULTS, folder / REPORT
    try:
        if report.exists() and not report.read_text(encoding="utf-8").startswith(_HEADING):
            raise HookError(f"{report} is no report of ours and stays: name another folder.")
        if not results.exists():
            return set()
        document = json.loads(results.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise HookError(f"{results} is of another format and stays: name another folder.")
        names = [str(path).removeprefix(f"{PICTURES}/") for path in document["pictures"]]
    except OSError as error:
        raise HookError(f"cannot write to {folder}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise HookError(f"{results} holds no results of ours and stays: name another folder.") from error
    return {f"{PICTURES}/{name}" for name in names if _OWN_PICTURE.fullmatch(name)}


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        with whole_file(target / file.name) as draft:
            shutil.copyfile(file, draft)


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)
