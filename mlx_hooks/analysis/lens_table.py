"""What the lens reads at every position after every layer: as a table for the terminal, a web page and a picture."""

import html
from dataclasses import asdict, dataclass
from typing import Any

from ..activations import id_list
from ..errors import HookError
from ..model import Tokens
from ..token_text import TokenText
from . import pages, pictures
from .logit_lens import HEADS, LogitLens, Prediction, component_of
from .spelling import fitted, shortened, visible
from .tuned_lens import TunedLens

MAX_PICTURE = 120
"""Positions that a picture shows at most: more are too many to be read."""
_TOKEN_WIDTH, _CELL_WIDTH = 12, 14


@dataclass(frozen=True)
class LensTable:
    """The most probable next tokens, of each layer (row) at each position of a prompt (column).

        table = LensTable.of(LogitLens(model), "The capital of France is")
        print(table.text(width=100))
        Path("lens.html").write_text(table.html())

    Args:
        title: what was read, for a heading.
        tokens: the prompt's tokens as texts.
        rows: names of the rows: layers, and passes where layers run several times.
        cells: for each row and position the predictions, the most probable first.
    """

    title: str
    tokens: list[str]
    rows: list[str]
    cells: list[list[list[Prediction]]]

    @classmethod
    def of(
        cls,
        lens: LogitLens,
        prompt: Tokens,
        *,
        component: str = "resid_post",
        norm: str = "own",
        top_k: int = 5,
        tuned: TunedLens | None = None,
    ) -> "LensTable":
        """Read a prompt at all of its positions.

        Args:
            component: what is read of each layer; one that is one value per position.
            norm, top_k, tuned: see :meth:`LogitLens.readings`.

        Raises:
            HookError: says what is wrong and what is allowed.
        """
        if component_of(component) == HEADS:
            raise HookError("A table has one value per layer: read heads with LogitLens.readings.", field="component")
        model = lens.model
        ids = model.to_tokens(prompt)
        rows: dict[tuple[int, int], list[list[Prediction]]] = {}
        readings = lens.readings(ids, components=component, positions=None, norm=norm, top_k=top_k, tuned=tuned)
        for reading in readings:
            rows.setdefault((reading.pass_index, reading.layer), []).append(reading.predictions)
        several = any(index for index, _ in rows)
        names = [f"{layer} (pass {index})" if several else str(layer) for index, layer in rows]
        own = "" if norm == "own" else ", frozen norm"
        title = f"{model.model_name}: {'tuned' if tuned is not None else 'logit'} lens on {component}{own}"
        tokens = list(map(TokenText(model.tokenizer).text, id_list(ids[0])))
        return cls(title, tokens, names, list(rows.values()))

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        return asdict(self)

    def text(self, width: int = 80) -> str:
        """The table for a terminal: a line per position, a column per layer, in blocks of as many layers as fit."""
        fitting = max(1, (width - _TOKEN_WIDTH) // _CELL_WIDTH)
        lines = [self.title]
        for start in range(0, len(self.rows), fitting):
            block = range(start, min(start + fitting, len(self.rows)))
            names = "".join(fitted(f"layer {self.rows[i]}", _CELL_WIDTH) for i in block)
            lines += ["", (" " * _TOKEN_WIDTH + names).rstrip()]
            for position, token in enumerate(self.tokens):
                cells = "".join(self._cell(self.cells[i][position][0]) for i in block)
                lines.append((fitted(visible(token), _TOKEN_WIDTH) + cells).rstrip())
        return "\n".join(lines)

    @staticmethod
    def _cell(best: Prediction) -> str:
        share = f"{best.probability:.0%}"
        return fitted(f"{fitted(visible(best.token), _CELL_WIDTH - 5).rstrip()} {share}", _CELL_WIDTH)

    def html(self) -> str:
        """A page of its own: a line per layer, the last on top, a column per position; a cell shows the most probable
        token and, while it is pointed at, those that follow."""
        heads = "".join(f'<th scope="col">{html.escape(visible(token))}</th>' for token in self.tokens)
        lines = []
        for name, row in zip(reversed(self.rows), reversed(self.cells), strict=True):
            cells = "".join(_html_cell(predictions) for predictions in row)
            lines.append(f'<tr><th scope="row">layer {html.escape(name)}</th>{cells}</tr>')
        return pages.page(self.title, _BODY.format(heads=heads, lines="\n".join(lines)), _STYLE)

    def png(self) -> bytes:
        """A picture of the same, as a PNG file's bytes.

        Raises:
            HookError: without matplotlib, and for more positions than can be read.
        """
        check_picture(len(self.tokens))
        from matplotlib.figure import Figure

        shares = [[predictions[0].probability for predictions in row] for row in self.cells]
        size = (1.6 + 0.95 * len(self.tokens), 1.4 + 0.42 * len(self.rows))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
        plain = pictures.PLAIN
        axes.set_xticks(range(len(self.tokens)), [shortened(token) for token in self.tokens], **plain)
        axes.set_yticks(range(len(self.rows)), self.rows, **plain)
        axes.set_ylabel("layer")
        axes.set_title(self.title, fontsize=10, loc="left", **plain)
        for i, row in enumerate(self.cells):
            for j, (best, *_) in enumerate(row):
                colour = "white" if best.probability > 0.55 else "black"
                label = f"{shortened(best.token)}\n{best.probability:.0%}"
                axes.text(j, i, label, ha="center", va="center", fontsize=7, color=colour, linespacing=1.1, **plain)
        bar = figure.colorbar(shown, ax=axes, pad=0.01)
        bar.set_label("probability of the likeliest token", fontsize=8)
        return pictures.png(figure)


def check_picture(n_positions: int) -> None:
    """Say before the run that its table cannot be drawn: see :func:`pictures.check_picture`."""
    pictures.check_picture(n_positions, MAX_PICTURE)


def _html_cell(predictions: list[Prediction]) -> str:
    best = predictions[0]
    listed = "\n".join(f"{visible(p.token)}  {p.probability:.1%}" for p in predictions)
    return (
        f'<td style="--share: {best.probability:.3f}" title="{pages.hint(listed)}">{html.escape(visible(best.token))}'
        f"<small>{best.probability:.0%}</small></td>"
    )


_STYLE = """table { border-collapse: separate; border-spacing: 2px; }
th { font-weight: 500; color: var(--faint); padding: 4px 8px; white-space: nowrap; text-align: right; }
thead th { text-align: center; }
tr > th:first-child { position: sticky; left: 0; background: var(--paper); }
td {
  background: rgb(var(--tint) / calc(var(--share) * 0.6)); border-radius: 3px;
  padding: 4px 8px; min-width: 4rem; max-width: 9rem; overflow: hidden; text-overflow: ellipsis;
  text-align: center; white-space: nowrap;
}
td small { display: block; color: inherit; opacity: 0.85; }
td:hover { outline: 2px solid var(--ink); }
"""
_BODY = """<p>Each cell: the likeliest next token after a layer, and its probability.
Point at a cell to see those that follow.</p>
<div><table>
<thead><tr><th></th>{heads}</tr></thead>
<tbody>
{lines}
</tbody>
</table></div>"""
