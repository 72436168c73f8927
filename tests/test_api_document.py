"""docs/api.md: its examples run, and it leaves out no address and no option."""

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from documents import DEFAULT, ROOT, blocks
from smalltalk_image import Image
from smalltalk_packages import write_client

from api_server import ModelWorker, create_app
from api_server.__main__ import _parser

DOCUMENT = (ROOT / "docs" / "api.md").read_text()
SHELL = blocks("docs/api.md", "")


def objects(text: str) -> list[Any]:
    """The JSON objects in what curl wrote, those in events included."""
    found, decoder = [], json.JSONDecoder()
    while (start := text.find("{")) >= 0:
        one, end = decoder.raw_decode(text, start)
        found.append(one)
        text = text[end:]
    return found


@pytest.mark.parametrize("block", SHELL, ids=[re.sub(r"\W+", " ", block[:60]) for block in SHELL])
def test_the_shell_blocks_run(live_server: SimpleNamespace, block: str, tmp_path: Path) -> None:
    assert DEFAULT in block
    script = block.replace(DEFAULT, live_server.base_url)
    mx.save_safetensors(str(tmp_path / "activations.safetensors"), {"layer1": mx.random.normal((64, 8))})
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-ec", script], capture_output=True, text=True, timeout=60, check=True, env=environment, cwd=tmp_path
    )
    replies = objects(done.stdout)
    assert replies
    assert not [reply for reply in replies if reply.get("error")]
    if "chat/completions -H" in block and "stream" not in block:
        assert replies[-1]["choices"][0]["message"]["content"].strip().startswith("Paris")
    if "format=safetensors" in block:
        assert (tmp_path / "z.safetensors").stat().st_size > 10_000
        assert [record["shape"] for record in replies[1]["activations"]["z"]] == [[1, 2, 2]]
    if "background" in block:
        assert replies[-1]["object"] == "job"


EXPECTED = re.compile(r"^(\S.*?) +# -> (.*)$")


def test_the_python_blocks_run_with_the_values_that_they_name(live_server: SimpleNamespace) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    checked = 0
    for block in blocks("docs/api.md", "python"):
        exec(compile(block.replace(DEFAULT, live_server.base_url), "docs/api.md", "exec"), names)
        for expression, value in (found.groups() for found in map(EXPECTED.match, block.splitlines()) if found):
            assert eval(expression, names) == eval(value), expression
            checked += 1
    names["client"].close()
    assert checked == DOCUMENT.count("# -> ") == 21


def test_the_smalltalk_blocks_run(live_server: SimpleNamespace, tmp_path: Path) -> None:
    with Image(write_client(tmp_path, live_server.base_url)) as image:
        values = [image.evaluate(block) for block in blocks("docs/api.md", "smalltalk")]
    assert values == [128, "is", 6, 5, 128]


def test_the_example_of_an_error_is_one() -> None:
    (shown,) = blocks("docs/api.md", "json")
    with ModelWorker() as worker:
        worker.load("neuroscope-tiny")
        reply = create_app(worker).test_client().get("/v1/models/x", headers={"X-Request-Id": "req-5f0c"})
    assert json.loads(shown) == reply.json


def test_no_address_and_no_option_is_left_out() -> None:
    app = create_app(ModelWorker())
    paths = app.test_client().get("/openapi.json").json["paths"]
    assert [path for path in paths if f"{path}`" not in DOCUMENT and f"{path}," not in DOCUMENT] == []
    told = {"--help", "-h"}
    options = {text for action in _parser("x")._actions for text in action.option_strings} - told
    assert [option for option in sorted(options) if option not in DOCUMENT] == []


def test_no_code_of_an_error_that_it_tells_is_made_up() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "api_server").rglob("*.py"))
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", DOCUMENT, re.MULTILINE)
    codes = [code for _, cell in rows for code in re.findall(r"`(\w+)`", cell)]
    assert len(codes) > 25
    # Made by Werkzeug's name of the status.
    assert {code for code in codes if f'"{code}"' not in sources} == {"method_not_allowed"}
