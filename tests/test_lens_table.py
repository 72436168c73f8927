"""The lens at every position: the terminal's table, the page, the picture, and the command that shows them."""

import builtins
import json
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError, LogitLens, TunedLens
from mlx_hooks.analysis.lens_table import LensTable, visible
from mlx_hooks.analysis.logit_lens import Prediction
from mlx_hooks.cli import main
from mlx_hooks.coverage.models import tiny_model

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def table(tiny: HookedModel) -> LensTable:
    return LensTable.of(LogitLens(tiny), PROMPT)


def test_a_table_has_the_models_own_prediction_in_its_last_row(tiny: HookedModel, table: LensTable) -> None:
    assert table.tokens == ["<bos>", "The", "capital", "of", "France", "is"]
    assert table.rows == ["0", "1", "2", "3"]
    probabilities = np.array(mx.softmax(tiny(PROMPT), axis=-1))[0]
    for position, predictions in enumerate(table.cells[-1]):
        assert [p.token_id for p in predictions] == np.argsort(-probabilities[position])[:5].tolist()
        assert predictions[0].probability == pytest.approx(probabilities[position].max(), rel=1e-4)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_text_fits_the_terminal_and_shows_every_layer(table: LensTable, width: int) -> None:
    lines = table.text(width).splitlines()
    body = lines[2:]
    assert max(map(len, body)) <= max(width, 26)
    blocks = "\n".join(body).split("\n\n")
    per_block = max(1, (width - 12) // 14)
    assert len(blocks) == -(-4 // per_block)
    layers = [name for block in blocks for name in block.splitlines()[0].split("layer")[1:]]
    assert [name.strip() for name in layers] == ["0", "1", "2", "3"]
    last = blocks[-1].splitlines()
    assert [line.split()[0] for line in last[1:]] == table.tokens
    assert f"Paris {table.cells[-1][-1][0].probability:.0%}" in last[-1]


ODD = ["<b>&\"'", " a", "\n\t", "\x1b[31m", "語" * 20, "$\\frac$", "long" * 9]


def odd_table() -> LensTable:
    cells = [[[Prediction(0, token, 0.9), Prediction(1, "</td>", 0.1)] for token in ODD] for _ in range(2)]
    return LensTable("a <title>", ODD, ["0", "1"], cells)


def test_tokens_are_shown_whatever_they_hold() -> None:
    assert [visible(token) for token in ODD[:4]] == ["<b>&\"'", "·a", "\\n\\t", "\\x1b[31m"]
    text = odd_table().text(80)
    assert "\x1b" not in text
    assert "\t" not in text
    lines = text.splitlines()[3:]
    assert len(lines) == len(ODD)
    # A character of these takes two columns: five of them, the dots and a space take twelve.
    assert lines[4].startswith("語" * 5 + "…" + " " + "語")


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.hints: list[str | None] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.hints.append(dict(attrs)["title"])

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_stands_alone_and_escapes_what_tokens_hold() -> None:
    page = odd_table().html()
    cells = Cells()
    cells.feed(page)
    assert cells.tags.count("td") == 2 * len(ODD)
    assert cells.tags.count("b") == 0
    assert cells.hints[0] == "<b>&\"'  90.0%\n</td>  10.0%"
    assert "<b>&\"'" in cells.texts
    assert "a <title>" in cells.texts
    assert not {"script", "link", "img"} & set(cells.tags)
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page


def test_the_last_layer_is_on_top_of_the_page(table: LensTable) -> None:
    page = table.html()
    places = [page.index(f"layer {i}<") for i in range(4)]
    assert places == sorted(places, reverse=True)


def test_the_picture_is_a_png_of_the_tables_size() -> None:
    small, large = (
        LensTable("t", ODD[:n], ["0", "1"], [[[Prediction(0, "$\\frac$", 0.7)]] * n] * 2).png() for n in (2, len(ODD))
    )
    assert small[:8] == large[:8] == b"\x89PNG\r\n\x1a\n"
    widths = [struct.unpack(">I", picture[16:20])[0] for picture in (small, large)]
    assert widths[1] > widths[0] > 200


def test_what_cannot_be_drawn_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HookError, match="A picture shows at most 120 positions, got 121"):
        LensTable("t", ["a"] * 121, ["0"], [[[Prediction(0, "a", 1.0)]] * 121]).png()
    real = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(HookError, match=r"needs matplotlib: pip install 'neuroscope-mlx\[plot\]'"):
        odd_table().png()


def test_models_without_a_tokenizer_and_with_several_passes_have_tables() -> None:
    plain = LensTable.of(LogitLens(HookedModel(make_model("llama"))), [1, 5, 9], component="attn_out", norm="final")
    assert plain.tokens == ["1", "5", "9"]
    assert plain.title == "llama: logit lens on attn_out, frozen norm"
    looped = LensTable.of(LogitLens(HookedModel(tiny_model("iquestloopcoder"))), [1, 5])
    assert looped.rows[0] == "0 (pass 0)"
    assert looped.rows[-1] == "1 (pass 1)"


def test_heads_have_no_table() -> None:
    with pytest.raises(HookError, match="A table has one value per layer"):
        LensTable.of(LogitLens(HookedModel(make_model("llama"))), [1, 5], component="heads")


# The command


def test_the_command_shows_the_table_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, picture = tmp_path / "lens.html", tmp_path / "lens.png"
    asked = ["lens", "neuroscope-tiny", "--prompt", PROMPT]
    assert main([*asked, "--html", str(page), "--png", str(picture), "--top-k", "3"]) == 0
    shown = capsys.readouterr().out
    assert "Paris" in shown.splitlines()[-1]
    assert "layer 3" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*asked, "--json", "--component", "resid_mid", "--norm", "final"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["title"] == "llama: logit lens on resid_mid, frozen norm"
    assert len(table["cells"]) == 4
    assert len(table["cells"][0]) == 6


def test_the_command_reads_a_tuned_lens(tiny: HookedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = TunedLens.identity(tiny).save(tmp_path / "lens.safetensors")
    assert main(["lens", "neuroscope-tiny", "--prompt", PROMPT, "--tuned", str(path)]) == 0
    assert capsys.readouterr().out.startswith("llama: tuned lens on resid_post")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt is a text that is not empty"),
        (["--prompt", "a", "--component", "pattern"], "A lens on llama reads resid_pre"),
        (["--prompt", "a", "--top-k", "0"], "a top_k from 1, got 1 and 0"),
        (["--prompt", "a", "--tuned", "none.safetensors"], "none.safetensors is no tuned lens that can be read"),
        (["--prompt", "a", "--html", "no/such/folder/a.html"], "cannot write no/such/folder/a.html"),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["neuroscope"])
    assert main(["lens", "neuroscope-tiny", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("neuroscope: ")
    assert message in error
    assert error.count("\n") == 1
