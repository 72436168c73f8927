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
from matplotlib.axes import Axes
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError, LogitLens, TunedLens
from mlx_hooks.analysis.lens_table import LensTable
from mlx_hooks.analysis.logit_lens import Prediction
from mlx_hooks.analysis.spelling import visible
from mlx_hooks.cli import main
from mlx_hooks.cli.output import write_whole
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.storage import files

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


def test_a_table_of_a_tuned_lens_reads_what_compute_reads() -> None:
    model = HookedModel(make_model("llama"))
    mx.random.seed(1)
    tuned = TunedLens(model, mx.random.normal((2, 32, 32)), mx.random.normal((2, 32)))
    lens, tokens = LogitLens(model), [1, 5, 9]
    table = LensTable.of(lens, tokens, tuned=tuned)
    assert table.title == "llama: tuned lens on resid_post"
    _, cache = model.run_with_cache(tokens, "blocks.*.hook_resid_post")
    read = lens.compute(cache, "resid_out_{i}", apply_softmax=True, tuned=tuned)
    shares = np.stack([np.array(one)[0].max(-1) for one in read.values()])
    found = [[predictions[0].probability for predictions in row] for row in table.cells]
    np.testing.assert_allclose(found, shares, rtol=1e-4)


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
        self.shares: list[str | None] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.hints.append(dict(attrs)["title"])
            self.shares.append(dict(attrs)["style"])

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


SHARES = [[0.1, 0.25], [0.5, 0.875]]


def table_of_shares() -> LensTable:
    cells = [[[Prediction(0, "a", share), Prediction(1, "b", 0.01)] for share in row] for row in SHARES]
    return LensTable("t", ["x", "y"], ["0", "1"], cells)


def test_each_cell_of_the_page_has_its_share() -> None:
    cells = Cells()
    cells.feed(table_of_shares().html())
    assert cells.shares == [f"--share: {share:.3f}" for row in reversed(SHARES) for share in row]


def test_the_picture_shows_the_likeliest_token_s_shares_from_below(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    imshow = Axes.imshow

    def watched(axes: Axes, array: Any, **options: Any) -> Any:
        shown.append((array, options["origin"], options["vmin"], options["vmax"]))
        return imshow(axes, array, **options)

    monkeypatch.setattr(Axes, "imshow", watched)
    table_of_shares().png()
    assert shown == [(SHARES, "lower", 0, 1)]


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
    for name in ("heads", "head_out"):
        with pytest.raises(HookError, match="A table has one value per layer"):
            LensTable.of(LogitLens(HookedModel(make_model("llama"))), [1, 5], component=name)


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
    assert table["title"] == "neuroscope-tiny: logit lens on resid_mid, frozen norm"
    assert len(table["cells"]) == 4
    assert len(table["cells"][0]) == 6


def test_the_command_takes_easyroutine_s_names(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for name in ("resid_out", "resid_post"):
        assert main(["lens", "neuroscope-tiny", "--prompt", PROMPT, "--component", name]) == 0
        shown.append(capsys.readouterr().out.splitlines())
    assert shown[0][0] == "neuroscope-tiny: logit lens on resid_out"
    assert shown[0][1:] == shown[1][1:]


def test_a_file_that_cannot_be_written_after_all_is_named_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / ".a.1234.writing.html"))

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(HookError) as raised:
        write_whole(tmp_path / "a.html", "text")
    assert str(raised.value) == f"cannot write {tmp_path / 'a.html'}: No space left on device"


def test_the_command_reads_a_tuned_lens(tiny: HookedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = TunedLens.identity(tiny).save(tmp_path / "lens.safetensors")
    assert main(["lens", "neuroscope-tiny", "--prompt", PROMPT, "--tuned", str(path)]) == 0
    assert capsys.readouterr().out.startswith("neuroscope-tiny: tuned lens on resid_post")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt is a text that is not empty"),
        (["--prompt", "a", "--component", "pattern"], "A lens on llama reads resid_pre"),
        (["--prompt", "a", "--top-k", "0"], "a top_k from 1, got 1 and 0"),
        (["--prompt", "a", "--tuned", "none.safetensors"], "There is no file none.safetensors."),
        (["--prompt", "a", "--tuned", "none"], "There is no file none."),
        (["--prompt", "a", "--tuned", "."], ". cannot be read: Is a directory."),
        (
            ["--prompt", "a", "--html", "no/such/folder/a.html"],
            "cannot write no/such/folder/a.html: there is no folder",
        ),
        (["--prompt", "a", "--png", "no/such/folder/a.png"], "cannot write no/such/folder/a.png: there is no folder"),
        (["--prompt", "a", "--png", "a.html", "--html", "./a.html"], "--html and --png are both a.html"),
        (["--prompt", "a", "--tuned", "t.html", "--html", "t.html"], "--html is t.html, which is read here"),
        (["--prompt", "a", "--html", "."], "cannot write .: it is a folder; name a file in it"),
        (["--prompt", "a " * 125, "--png", "a.png"], "A picture shows at most 120 positions, got 126: write HTML"),
        (["--prompt", "a " * 3000], "The prompt has 3001 tokens; the model reads at most 128."),
    ],
)
def test_what_the_command_cannot_do_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["neuroscope"])
    monkeypatch.setattr(LogitLens, "_read", lambda *_: pytest.fail("it was run"))
    assert main(["lens", "neuroscope-tiny", *arguments]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    error = said.err
    assert error.startswith("neuroscope: ")
    assert message in error
    assert error.count("\n") == 1
