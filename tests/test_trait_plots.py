"""Charts of traits: what a page and a picture must show, whatever tokens hold, and the command that draws files."""

import builtins
import json
import struct
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from mlx_hooks import HookedModel, HookError, TraitVector, monitor_dynamics, steer, trait_dynamics
from mlx_hooks.analysis.traits.capture import SUBLAYERS, capture_all_layers
from mlx_hooks.analysis.traits.plots import (
    Chart,
    LayerChart,
    ScoreChart,
    SteeredScores,
    SteeringChart,
    TraitScores,
    page_of,
    svg,
)
from mlx_hooks.analysis.traits.plots.files import charts_of
from mlx_hooks.analysis.traits.plots.steered import _apart
from mlx_hooks.analysis.traits.records import write_record
from mlx_hooks.cli import main

ODD = ["<b>&\"'", " a", "\n\t", "\x1b[31m", "語" * 20, "$\\frac$", "</svg><script>x</script>"]
RESPONSE = [0.0, 1.0, 4.0, 4.0, 4.0, 1.5, 3.0]


class Page(HTMLParser):
    """The elements of a page with their attributes and the text right in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(len(self.found) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self.open.pop()][0] == tag, f"{tag} closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open:
            self.found[self.open[-1]][2].append(data)

    def of(self, tag: str, class_: str | None = None) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.found
            if name == tag and (class_ is None or class_ in (attributes.get("class") or "").split())
        ]


def entry(n_traits: int = 1, tokens: str = "response", prompt: list[str] = ODD) -> dict[str, Any]:
    traits: dict[str, Any] = {}
    for i in range(n_traits):
        scores = {"prompt": [0.5] * len(prompt), "response": [score * 10**i for score in RESPONSE]}
        followed = scores["response"] if tokens == "response" else scores["prompt"] + scores["response"]
        traits[f"trait <u>{i}"] = {"probe": {
            "layer": i, "vector_path": None, "norm": 1.0, "threshold": None if i else 2.0, "scores": scores,
            "dynamics": {"tokens": tokens, **trait_dynamics(followed).to_dict()},
        }}  # fmt: skip
    return {
        "prompt": {"text": "a <prompt> &", "tokens": prompt},
        "response": {"text": "b", "tokens": [f"t{i}" for i in range(len(RESPONSE))]},
        "traits": traits,
    }


def layers(**more: Any) -> LayerChart:
    values = np.array([[1.0, -2.0, 0.0], [4.0, 0.5, -8.0]])
    return LayerChart("t", ["a", "<b>", "$x$"], 1, values, **more)


def steered() -> SteeringChart:
    runs = [SteeredScores(c, 2 * c, 2 * c, [c + i for i in range(3)], c, f"<i>{c}</i>") for c in (-2.0, 0.0, 4.0)]
    return SteeringChart("t", ["a", "<b>", "$x$"], 1, runs)


def every_chart() -> list[Chart]:
    return [ScoreChart.of(entry(2)), layers(own_layer=1), layers(per_layer=True), steered()]


def test_a_page_stands_alone_and_escapes_what_tokens_hold() -> None:
    text = page_of("a <title>", every_chart(), "about & <b>")
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "b", "i", "u", "prompt"} & {tag for tag, _, _ in page.found}
    assert "http" not in text
    assert "\x1b" not in text
    assert "prefers-color-scheme: dark" in text
    assert [text for _, text in page.of("h1")] == ["a <title>"]
    assert [text for _, text in page.of("h2")] == ["“a <prompt> &”", "t", "t", "t"]
    assert any("</svg><script>x</script>" in text for _, text in page.of("span"))


@pytest.mark.parametrize("tokens", ["response", "all"])
def test_scores_stand_at_their_tokens_with_commitment_and_peak(tokens: str) -> None:
    page = Page(ScoreChart.of(entry(tokens=tokens)).html())
    dots = [attributes for attributes, _ in page.of("circle")]
    n_prompt, n = len(ODD), len(ODD) + len(RESPONSE)
    assert len(dots) == n
    assert [("of-prompt" in (dot["class"] or "")) for dot in dots] == [i < n_prompt for i in range(n)]
    x, y = (np.array([float(dot[name] or "") for dot in dots]) for name in ("cx", "cy"))
    np.testing.assert_allclose(np.diff(x), np.diff(x)[0], atol=0.02)
    # Heights are the scores, on one scale, upwards.
    scores = np.array([0.5] * n_prompt + RESPONSE)
    slope, offset = np.polyfit(scores, y, 1)
    assert slope < 0
    np.testing.assert_allclose(y, slope * scores + offset, atol=0.02)
    dynamics = trait_dynamics(RESPONSE if tokens == "response" else scores)
    shift = n_prompt if tokens == "response" else 0
    assert dynamics.commitment_point is not None
    assert dynamics.peak is not None
    (line,) = [attributes for attributes, _ in page.of("line", "mark-line")]
    assert float(line["x1"] or "") == pytest.approx(x[dynamics.commitment_point + shift], abs=0.02)
    tip = ((page.of("polygon", "peak")[-1][0]["points"]) or "").split()[0].split(",")
    assert float(tip[0]) == pytest.approx(x[dynamics.peak.index + shift], abs=0.06)
    # The prompt's ground ends between its last token and the response's first.
    (ground,) = [attributes for attributes, _ in page.of("rect", "shade")]
    edge = float(ground["x"] or "") + float(ground["width"] or "")
    assert edge == pytest.approx((x[n_prompt - 1] + x[n_prompt]) / 2, abs=0.02)


def test_figures_and_all_scores_can_be_read_without_the_drawing() -> None:
    page = Page(ScoreChart.of(entry(2)).html())
    cells = [text for _, text in page.of("td")]
    assert cells[:9] == [
        "trait <u>0", "probe, layer 0", "response 2: t2", "4 at response 2: t2", "2", "3", "3", "1.33", "0.1",
    ]  # fmt: skip
    assert cells[-4:] == ["response 6", "t6", "3", "30"]
    assert [text for _, text in page.of("p") if "boundary" in text] == [
        "trait <u>0 (probe, layer 0): red above the class boundary, blue below"
    ]
    # The text on coloured ground: 4 is the furthest from the boundary, 2; 1.5 lies below it.
    spans = page.of("span")[: len(ODD) + len(RESPONSE)]
    styles = [((attributes["class"] or "").split()[0], attributes["style"]) for attributes, _ in spans]
    assert styles[len(ODD) :] == [
        ("low", "--share: 1.000"), ("low", "--share: 0.500"), *[("high", "--share: 1.000")] * 3,
        ("low", "--share: 0.250"), ("high", "--share: 0.500"),
    ]  # fmt: skip


def test_each_trait_has_a_scale_of_its_own() -> None:
    page = Page(ScoreChart.of(entry(3)).html())
    y = np.array([float(attributes["cy"] or "") for attributes, _ in page.of("circle")]).reshape(3, -1)
    heights = np.ptp(y[:, len(ODD) :], axis=1)
    assert heights.min() > 0.5 * heights.max()
    assert y[0].max() < y[1].min()
    assert y[1].max() < y[2].min()


def test_few_tokens_lie_flat_and_many_stand_upright() -> None:
    few, many = (Page(ScoreChart.of(entry(prompt=["w"] * n)).html()).of("text") for n in (3, 53))  # 10 and 60 tokens
    turned = [sum("rotate" in (attributes.get("transform") or "") for attributes, _ in texts) for texts in (few, many)]
    assert turned == [0, 60]


@pytest.mark.parametrize(("n_prompt", "n_tokens", "has_room"), [(1, 6, True), (2, 60, False), (3, 60, True)])
def test_the_names_of_the_parts_do_not_run_into_each_other(
    n_prompt: int, n_tokens: int, has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    axis = svg.TokenAxis(["w"] * n_tokens, n_prompt, 58.0)
    named = Page("".join(axis.names(10))).of("text")
    assert [text for _, text in named] == ["prompt", "response"]
    (prompt, _), (response, _) = named
    # At 11 pixels the word takes 36 or so.
    begins, border = float(prompt["x"] or ""), axis.left + n_prompt * axis.step
    assert float(response["x"] or "") == border + 4
    assert (prompt["text-anchor"], begins) == (("start", 62.0) if has_room else ("end", border - 6))
    assert border - begins > 40 or not has_room
    drawn: list[Any] = []
    annotate = Axes.annotate

    def kept(self: Axes, text: str, *place: Any, **style: Any) -> Any:
        drawn.append(annotate(self, text, *place, **style))
        return drawn[-1]

    monkeypatch.setattr(Axes, "annotate", kept)
    LayerChart("t", ["w"] * n_tokens, n_prompt, np.ones((2, n_tokens))).png()
    drawn[0].figure.draw_without_rendering()
    one, two = (text.get_window_extent() for text in drawn)
    assert one.x1 + 3 < two.x0


def test_a_layer_chart_s_colours_part_at_zero() -> None:
    page = Page(layers(own_layer=1).html())
    cells = [(attributes["class"], attributes["style"]) for attributes, _ in page.of("rect", "cell")]
    assert cells == [
        ("high cell", "--share: 0.125"), ("low cell", "--share: 0.250"), ("high cell", "--share: 0.000"),
        ("high cell", "--share: 0.500"), ("high cell", "--share: 0.062"), ("low cell", "--share: 1.000"),
    ]  # fmt: skip
    per_layer = [attributes["style"] for attributes, _ in Page(layers(per_layer=True).html()).of("rect", "cell")]
    assert per_layer[:3] == ["--share: 0.500", "--share: 1.000", "--share: 0.000"]
    # The last layer is on top, and the vector's own is framed.
    places = [float(attributes["y"] or "") for attributes, _ in page.of("rect", "cell")]
    assert places[0] > places[3]
    (frame,) = page.of("rect", "own-layer")
    assert float(frame[0]["y"] or "") == pytest.approx(places[3], abs=0.1)
    assert [text for _, text in page.of("title")][:2] == ["layer 0, 0: a\n1", "layer 0, 1: <b>\n-2"]
    assert [text for _, text in page.of("td")][-4:] == ["2", "$x$", "0", "-8"]


def test_a_first_token_far_from_all_others_does_not_hide_them() -> None:
    """The stream at the first token is many times longer in most models."""
    values = np.array([[900.0, -2.0, 1.0], [-50.0, 0.5, 4.0]])
    chart = LayerChart("t", ["<bos>", "a", "b"], 1, values)
    assert chart.limits == [4, 4]
    assert LayerChart("t", ["<bos>", "a", "b"], 1, values, per_layer=True).limits == [2, 4]
    page = Page(chart.html())
    assert [attributes["style"] for attributes, _ in page.of("rect", "cell")][:2] == [
        "--share: 1.000",
        "--share: 0.500",
    ]
    assert [text for _, text in page.of("text") if "≥" in text or "≤" in text] == ["≤ -4", "≥ 4"]
    assert chart.png()
    plain = entry(prompt=["<bos>", "a"])
    plain["traits"]["trait <u>0"]["probe"]["scores"]["prompt"] = [-900.0, 0.5]
    dots = Page(ScoreChart.of(plain).html()).of("circle")
    assert ["beyond" in (attributes["class"] or "") for attributes, _ in dots] == [i == 0 for i in range(9)]
    y = [float(attributes["cy"] or "") for attributes, _ in dots]
    others = Page(ScoreChart.of(entry(prompt=["<bos>", "a"])).html()).of("circle")
    assert y[1:] == [float(attributes["cy"] or "") for attributes, _ in others][1:]
    assert y[0] > max(y[1:])
    # Unless it is what is marked.
    found = TraitScores("t", "s", [-900.0, 0.5, 1.0, 2.0], peak=0)
    assert found.scale(0, 1).low < -900 < TraitScores("t", "s", [-900.0, 0.5, 1.0, 2.0], peak=3).scale(0, 1).low


def test_steering_is_drawn_by_coefficient_and_by_token() -> None:
    page = Page(steered().html())
    lines = page.of("polyline", "steered")
    assert len(lines) == 3
    assert [(attributes["class"] or "").split()[1] for attributes, _ in lines] == ["to-low", "still", "to-high"]
    assert [text for _, text in page.of("td")][:5] == ["-2", "-4", "-4", "-2", "<i>-2.0</i>"]
    points = [attributes for attributes, _ in page.of("circle", "own-words")]
    x, y = (np.array([float(point[name] or "") for point in points]) for name in ("cx", "cy"))
    np.testing.assert_allclose((x[2] - x[1]) / (x[1] - x[0]), 2, rtol=1e-3)
    np.testing.assert_allclose((y[2] - y[1]) / (y[1] - y[0]), 2, rtol=1e-3)


def test_labels_are_moved_apart_in_their_order() -> None:
    assert _apart([0, 1, 50], 13) == [-6, 7, 50]
    crowded = _apart([3.0, 2.0, 1.0, 2.5], 13)
    assert np.argsort(crowded).tolist() == [2, 1, 3, 0]
    np.testing.assert_allclose(np.diff(sorted(crowded)), 13)
    assert np.mean(crowded) == pytest.approx(2.125)


# Pictures


@pytest.mark.parametrize("chart", every_chart(), ids=["scores", "layers", "per layer", "steering"])
def test_a_picture_is_a_png_whatever_tokens_hold(chart: Chart) -> None:
    assert chart.png().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_picture_grows_with_its_tokens() -> None:
    pictures = [ScoreChart.of(entry(n, prompt=["w"] * m)).png() for n, m in ((1, 5), (3, 5), (1, 90))]
    sizes = [struct.unpack(">II", picture[16:24]) for picture in pictures]
    assert sizes[1][1] > sizes[0][1] + 300
    assert sizes[2][0] > sizes[0][0] + 800


def test_pictures_show_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, images, marks = [], [], []
    plot, imshow, axvline = Axes.plot, Axes.imshow, Axes.axvline

    def plotted(axes: Axes, *data: Any, **options: Any) -> Any:
        lines.append([list(part) for part in data if not isinstance(part, str)])
        return plot(axes, *data, **options)

    def imaged(axes: Axes, array: Any, **options: Any) -> Any:
        images.append((np.array(array).tolist(), options["origin"], options["vmin"], options["vmax"]))
        return imshow(axes, array, **options)

    monkeypatch.setattr(Axes, "plot", plotted)
    monkeypatch.setattr(Axes, "imshow", imaged)
    monkeypatch.setattr(Axes, "axvline", lambda axes, x, **options: marks.append(x) or axvline(axes, x, **options))
    ScoreChart.of(entry(prompt=["p", "q"])).png()
    assert [list(range(1, 9)), [0.5, *RESPONSE]] in lines
    assert [[0, 1], [0.5, 0.5]] in lines
    assert marks == [4]
    layers(own_layer=0).png()
    layers(per_layer=True).png()
    assert images == [
        ([[1, -2, 0], [4, 0.5, -8]], "lower", -8, 8),
        ([[0.5, -1, 0], [0.5, 0.0625, -1]], "lower", -1, 1),
    ]
    steered().png()
    assert lines[-3:] == [[[-2, -1, 0]], [[0, 1, 2]], [[4, 5, 6]]]


@pytest.mark.parametrize("chart", [layers(), steered(), ScoreChart.of(entry())])
def test_without_matplotlib_a_picture_is_a_clear_error(chart: Chart, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(HookError, match=r"needs matplotlib: pip install 'neuroscope-mlx\[plot\]', or write HTML"):
        chart.png()
    assert chart.html()


def test_what_cannot_be_drawn_is_an_error() -> None:
    with pytest.raises(HookError, match="A picture shows at most 240 positions, got 307: write HTML"):
        ScoreChart.of(entry(prompt=["w"] * 300)).png()
    with pytest.raises(HookError, match=r"for 3 tokens; got \[2, 2\]"):
        LayerChart("t", ["a", "b", "c"], 1, np.zeros((2, 2)))
    with pytest.raises(HookError, match="finite values only"):
        LayerChart("t", ["a"], 1, np.array([[np.nan]]))
    with pytest.raises(HookError, match="t: there are 1 scores for 2 tokens"):
        ScoreChart("t", ["a", "b"], 1, [TraitScores("t", "s", [1.0])])
    with pytest.raises(HookError, match="A commitment point is one of 0 to 0, or none; got '1'"):
        TraitScores("t", "s", [1.0], commitment=1)
    with pytest.raises(HookError, match="Of 1 tokens, 0 to 1 are the prompt; got 2"):
        ScoreChart("t", ["a"], 2, [TraitScores("t", "s", [1.0])])
    with pytest.raises(HookError, match="coefficient 0 once"):
        SteeringChart("t", ["a"], 1, [SteeredScores(1.0, 1.0, 1.0, [1.0], 1.0, "x")])


def test_nothing_but_zeros_is_drawn_too() -> None:
    zeros = LayerChart("t", ["a"], 1, np.zeros((2, 1)))
    assert zeros.png()
    assert "--share: 0.000" in zeros.html()
    alone = {"layer": 0, "threshold": None, "scores": {"prompt": [0.0], "response": []}}
    alone["dynamics"] = {"tokens": "response", **trait_dynamics([]).to_dict()}
    chart = ScoreChart.of({
        "prompt": {"text": "a", "tokens": ["a"]},
        "response": {"text": "", "tokens": []},
        "traits": {"t": {"probe": alone}},
    })  # fmt: skip
    assert chart.png()
    assert "none" in chart.html()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 10.0, [0, 5, 10]), (-1.0, 1.0, [-1, -0.5, 0, 0.5, 1]), (120.0, 124.0, [120, 121, 122, 123, 124])],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert svg.Scale(low, high, 0, 100).ticks() == pytest.approx(ticks)


def test_small_pieces() -> None:
    assert (
        svg.element("rect", x=1.5, class_="a", stroke_width=2.0) == '<rect x="1.5" class="a" stroke-width="2"></rect>'
    )
    assert [svg.number(x) for x in (0.25, -1234.5, 0.000123, 3.0, 0.0, 2.5e7)] == [
        "0.25", "-1234", "0.000123", "3", "0", "2.5e+07",
    ]  # fmt: skip
    assert svg.share_of(-1.0, 1.0, 4.0) == ("low", 0.5)
    assert svg.share_of(5.0, 0.0, 0.0) == ("high", 0.0)


# Files


def vector(layer: int = 2) -> TraitVector:
    return TraitVector("t", layer, "probe", np.random.default_rng(1).normal(size=128), threshold=0.2)


@pytest.fixture(scope="module")
def files(tiny: HookedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    found: dict[str, Any] = {
        "dynamics": monitor_dynamics(tiny, ["Write a story", "Hello"], [vector()], max_tokens=6),
        "steering": steer(tiny, "Hello", vector(), [2, -3], measured=[vector(), vector(3)], max_tokens=3).to_dict(),
    }
    for name, plain in found.items():
        (folder / f"{name}.json").write_text(json.dumps(plain))
    [record] = capture_all_layers(tiny, "Hello", [vector()], max_tokens=4)
    write_record(record, folder / "capture.safetensors", json_beside=True)
    paths = {path.name: path for path in folder.iterdir()}
    assert sorted(paths) == ["capture.json", "capture.safetensors", "dynamics.json", "steering.json"]
    return paths


def test_a_capture_s_chart_holds_its_projections(tiny: HookedModel, files: dict[str, Path]) -> None:
    for name in ("capture.safetensors", "capture.json"):
        for i, sublayer in enumerate(SUBLAYERS):
            (chart,) = charts_of(files[name], sublayer=sublayer)
            assert isinstance(chart, LayerChart)
            [record] = capture_all_layers(tiny, "Hello", [vector()], max_tokens=4)
            both = np.concatenate([record["projections"]["prompt"], record["projections"]["response"]])
            np.testing.assert_array_equal(chart.values.astype(np.float32), both[:, :, i].T)
            assert chart.n_prompt == record["prompt"]["n_tokens"]
            assert (chart.own_layer, chart.unit) == (2, "h.v/|v|")
            assert chart.title == f"t (probe, layer 2), {sublayer}, on “Hello”"


def test_a_steering_s_chart_is_by_growing_coefficient(files: dict[str, Path]) -> None:
    plain = json.loads(files["steering.json"].read_text())
    for i, chart in enumerate(charts_of(files["steering.json"])):
        assert isinstance(chart, SteeringChart)
        assert [run.coefficient for run in chart.runs] == [-3, 0, 2]
        assert chart.runs[0].text == plain["runs"][2]["text"]
        forced = plain["runs"][2]["measured"][i]["forced_scores"]
        assert chart.runs[0].scores == [*forced["prompt"], *forced["response"]]
        assert chart.tokens == [*plain["prompt"]["tokens"], *plain["runs"][0]["tokens"]]
        assert chart.title == f"t (probe, layer {(2, 3)[i]}) while t is added at layer 2, on “Hello”"


RUBBISH = (None, "x", -1, 999, [], {}, float("nan"), 1e300, ["x"], "left out")
"""What may stand in the place of anything; the last is a place that is missing."""


def places(plain: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value of plain JSON; of the numbers of a list, to the first."""
    if at:
        yield at
    for key in plain if isinstance(plain, dict) else range(len(plain)) if isinstance(plain, list) else ():
        if key == 0 or not isinstance(key, int) or isinstance(plain[key], dict | list):
            yield from places(plain[key], (*at, key))


@pytest.mark.parametrize("name", ["dynamics.json", "steering.json"])
def test_whatever_stands_in_a_file_it_is_drawn_or_refused(
    files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads(files[name].read_text())
    monkeypatch.setattr("mlx_hooks.analysis.traits.plots.files._read_json", lambda _: content)
    refused = []
    for way in list(places(content)):
        inside = content
        for key in way[:-1]:
            inside = inside[key]
        right = inside[way[-1]]
        for wrong in RUBBISH:
            if wrong != "left out":
                inside[way[-1]] = wrong
            elif isinstance(inside, dict):
                del inside[way[-1]]
            else:
                inside.pop(way[-1])
            try:
                page_of("t", charts_of(files[name]))
            except HookError as error:
                refused.append(str(error))
            if wrong == "left out" and isinstance(inside, list):
                inside.insert(way[-1], right)
            else:
                inside[way[-1]] = right
    assert len(refused) > 100
    assert all(said.startswith(f"{files[name]} ") for said in refused)


def test_the_command_draws_each_kind_of_file_by_its_content(files: dict[str, Path], tmp_path: Path) -> None:
    for name, n in (("dynamics.json", 2), ("steering.json", 2), ("capture.safetensors", 1), ("capture.json", 1)):
        folder = tmp_path / name
        folder.mkdir()
        assert (
            main(["traits", "plot", str(files[name]), "--png", str(folder / "p.png"), "--html", str(folder / "p.html")])
            == 0
        )
        assert (folder / "p.html").read_text().count("<section>") == n
        assert len(list(folder.glob("*.png"))) == n


def test_the_command_s_options_reach_the_chart(files: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    capture = str(files["capture.safetensors"])
    assert main(["traits", "plot", capture, "--html", str(page), "--sublayer", "after_attn", "--per-layer"]) == 0
    assert "after_attn" in page.read_text()
    assert "max of the layer" in page.read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "There is no file"),
        ("none.safetensors", None, "There is no file"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "[1]", "is no JSON object"),
        ("a.json", '{"a": 1}', "holds no dynamics, no steering and no capture of all layers"),
        ("a.json", "[" * 200_000, "its JSON is nested too deeply"),
        ("a.json", '{"format": "neuroscope.trait_dynamics/1", "results": [{}]}', "cannot be drawn: KeyError 'prompt'"),
        ("a.json", '{"format": "neuroscope.trait_dynamics/1", "results": []}', "holds no results: there is nothing to"),
        ("a.json", '{"format": "neuroscope.trait_steering/1", "runs": [{"measured": []}]}', "holds no results: there"),
        ("a.safetensors", "rubbish", "a.safetensors"),
        ("a.pt", "PK", "pickle"),
    ],
)
def test_what_the_command_cannot_draw_is_one_line(
    tmp_path: Path, name: str, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["traits", "plot", str(tmp_path / name), "--html", str(tmp_path / "p.html")]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("name", ["capture.safetensors", "dynamics.json"])
@pytest.mark.parametrize("option", ["--html", "--png"])
def test_the_command_does_not_draw_over_the_file_that_it_draws(
    files: dict[str, Path], name: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files[name].read_bytes()
    (tmp_path / "link").symlink_to(files[name])
    for source, target in ((files[name], files[name]), (files[name], tmp_path / "link")):
        assert main(["traits", "plot", str(source), option, str(target)]) == 1
        assert f"{option} is {target}, which is read here: name another file" in capsys.readouterr().err
    assert files[name].read_bytes() == before


@pytest.mark.parametrize("source", ["capture.safetensors", "capture.json", "dynamics.json"])
@pytest.mark.parametrize("option", ["--html", "--png"])
def test_the_command_draws_over_no_capture(
    files: dict[str, Path], source: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in {path.name for path in files.values()}:
        (tmp_path / name).write_bytes(files[name].read_bytes())
    (tmp_path / "d-3.safetensors").write_text("numbers")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in {"capture.safetensors", "capture.json", "d-3.json"} - {source}:
        assert main(["traits", "plot", str(tmp_path / source), option, str(tmp_path / name)]) == 1
        assert f"{name}, which is a capture's: name another file" in capsys.readouterr().err
    assert main(["traits", "plot", str(tmp_path / source), "--png", str(tmp_path / "d.safetensors")]) == 1
    assert "may come to" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_command_wants_something_to_write(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["traits", "plot", str(files["dynamics.json"])]) == 1
    assert "Say what to write: --png FILE, --html FILE or both." in capsys.readouterr().err
