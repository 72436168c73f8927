"""Who may use the server, for what, and what it never tells: paths, keys, tracebacks."""

import ast
import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
from flask.testing import FlaskClient
from server_tools import HOOKS, MESSAGES, load_tiny, running_server, save_tiny, until

from api_server import ModelWorker, Server, ServerConfig, create_app
from api_server.__main__ import _parser, main
from api_server.logs import FORMATS, configure, formatter, request_id, scrub
from mlx_hooks import HookedModel, ModelLoadError
from neuroscope_bridge import LMStudioNeuroScopeClient, NeuroScopeAPIError

ROOT = Path(__file__).parent.parent
CHAT = "/v1/chat/completions"
CAPTURE = "/v1/chat/completions/with_activations"
KEY = "k3y-that-nobody-tells"


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        yield worker


def client_of(worker: ModelWorker, **config: Any) -> FlaskClient:
    return create_app(worker, ServerConfig(**config)).test_client()


def bearer(key: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def error_of(reply: Any, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    return reply.json["error"]


# -- pages in browsers ------------------------------------------------------------------------------------------------

PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
ALLOWED = "https://lab.example:8000"


def allowed_origin(reply: Any) -> str | None:
    return reply.headers.get("Access-Control-Allow-Origin")


def test_pages_of_a_named_origin_may_ask_and_read(worker: ModelWorker) -> None:
    client = client_of(worker, cors_origins=(ALLOWED, "http://[::1]:3000"))
    for origin in (ALLOWED, "http://[::1]:3000"):
        preflight = client.options(CHAT, headers=PREFLIGHT | {"Origin": origin})
        assert preflight.status_code == 200
        assert allowed_origin(preflight) == origin
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert "authorization" in preflight.headers["Access-Control-Allow-Headers"].lower()
        reply = client.get("/v1/models", headers={"Origin": origin})
        assert allowed_origin(reply) == origin
        assert "X-Request-Id" in reply.headers["Access-Control-Expose-Headers"]
        assert "Origin" in reply.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in reply.headers


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "https://lab.example", "https://lab.example:8000.evil.example", "null", "http://x1"],
)
def test_pages_of_other_origins_may_not(worker: ModelWorker, origin: str) -> None:
    client = client_of(worker, cors_origins=(ALLOWED, "http://[::1]:3000"))
    for reply in (
        client.options(CHAT, headers=PREFLIGHT | {"Origin": origin}),
        client.get("/v1/models", headers={"Origin": origin}),
        client.get("/v1/models/unknown", headers={"Origin": origin}),
    ):
        assert allowed_origin(reply) is None


def test_a_page_that_calls_the_server_by_another_name_is_told_nothing(worker: ModelWorker) -> None:
    for origins in ((ALLOWED,), ("*",)):
        client = client_of(worker, cors_origins=origins)
        for host, status in (("localhost", 200), ("evil.example", 403)):
            headers = {"Origin": ALLOWED, "Host": host}
            for reply in (client.get("/health", headers=headers), client.options(CHAT, headers=headers | PREFLIGHT)):
                assert reply.status_code == status
                assert any(name.startswith("Access-Control-") for name, _ in reply.headers) == (status == 200)


def test_a_page_learns_what_it_may_do_before_it_shows_the_key(worker: ModelWorker) -> None:
    client = client_of(worker, cors_origins=(ALLOWED,), api_key=KEY)
    preflight = client.options(CHAT, headers=PREFLIGHT | {"Origin": ALLOWED})
    assert (preflight.status_code, allowed_origin(preflight)) == (200, ALLOWED)
    refused = client.get("/v1/models", headers={"Origin": ALLOWED})
    assert refused.status_code == 401
    assert allowed_origin(refused) == ALLOWED  # or the page could not read why


def test_every_origin_only_where_that_was_asked_for(worker: ModelWorker) -> None:
    assert allowed_origin(client_of(worker, api_key=KEY).get("/health", headers={"Origin": ALLOWED})) is None
    assert allowed_origin(client_of(worker, cors_origins=("*",)).get("/health", headers={"Origin": ALLOWED}))


@pytest.mark.parametrize("origin", ["lab.example", "https://lab.example/", "https://*.example", "ftp://lab", ""])
def test_what_is_no_origin_is_refused_at_the_start(origin: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="An origin looks like"):
        ServerConfig(cors_origins=(origin,))
    assert main(["--cors-origin", origin]) == 1
    assert capsys.readouterr().err.startswith("neuroscope: An origin looks like")


# -- hosts and keys ---------------------------------------------------------------------------------------------------


def test_a_server_behind_a_proxy_answers_to_its_name_too(worker: ModelWorker) -> None:
    local = client_of(worker, allowed_hosts=("Lab.example",))
    for host in ("lab.example", "LAB.example:443", "localhost:8080"):
        assert local.get("/health", headers={"Host": host}).status_code == 200
    assert error_of(local.get("/health", headers={"Host": "evil.example"}), 403)["code"] == "host_not_allowed"
    public = client_of(worker, host="0.0.0.0", api_key=KEY, allowed_hosts=("lab.example",))
    assert public.get("/health", headers={"Host": "lab.example"}).status_code == 200
    assert public.get("/health", headers={"Host": "evil.example"}).status_code == 403


def test_everything_but_health_and_the_description_wants_the_key(worker: ModelWorker) -> None:
    app = create_app(worker, ServerConfig(api_key=KEY))
    client, open_addresses = app.test_client(), set()
    for rule in app.url_map.iter_rules():
        address = re.sub(r"<[^>]+>", "x", rule.rule)
        for method in rule.methods - {"OPTIONS", "HEAD"}:
            if client.open(address, method=method).status_code != 401:
                open_addresses.add(rule.rule)
    assert open_addresses == {"/health", "/openapi.json", "/docs", "/docs/<name>"}
    assert client.get("/nothing").status_code == 401
    assert client.get("/v1/models", headers=bearer()).status_code == 200


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_more_tokens_than_the_server_allows_are_refused(worker: ModelWorker, name: str) -> None:
    client = client_of(worker, max_tokens=3)
    error = error_of(client.post(CHAT, json={"messages": MESSAGES, name: 4}), 400)
    assert (error["code"], error["param"]) == ("limit_exceeded", name)
    assert "at most 3 tokens" in error["message"]
    for body, generated in (({name: 3}, 3), ({}, 3), ({"n": 3}, 3), ({name: 1, "n": 3}, 3), ({"n": 2}, 2)):
        reply = client.post(CHAT, json={"messages": MESSAGES} | body).json
        assert reply["usage"]["completion_tokens"] == generated
    for body, param in (({name: 2, "n": 2}, name), ({"n": 4}, "n")):
        assert error_of(client.post(CHAT, json={"messages": MESSAGES} | body), 400)["param"] == param
    schema = client.get("/openapi.json").json["components"]["schemas"]["ChatRequest"]["properties"][name]
    assert schema["anyOf"][0]["maximum"] == 3


def test_more_hooks_than_the_server_allows_are_refused(worker: ModelWorker) -> None:
    client = client_of(worker, max_hooks=2)
    error = error_of(client.post(CAPTURE, json={"messages": MESSAGES, "activation_hooks": HOOKS}), 400)
    assert (error["code"], error["param"]) == ("limit_exceeded", "activation_hooks")
    register = "/v1/activations/hooks"
    assert error_of(client.post(register, json={"hooks": HOOKS}), 400)["param"] == "hooks"
    try:
        assert client.post(register, json={"hooks": HOOKS[:2]}).status_code == 200
        assert client.post(register, json={"hooks": HOOKS[1:2]}).status_code == 200  # in that one's place
        error = error_of(client.post(register, json={"hooks": HOOKS[2:]}), 400)
        assert "2 hooks are registered and 1 more" in error["message"]
    finally:
        client.delete(register)


def test_limits_that_no_server_has_are_refused() -> None:
    for name in ("max_tokens", "max_hooks"):
        with pytest.raises(ValueError, match=f"{name} must be from 1 to"):
            ServerConfig(**{name: 0})


def test_the_options_of_the_command_line_reach_the_configuration() -> None:
    words = (
        "--cors-origin http://a --cors-origin http://b --allowed-host lab --model-root m --max-tokens 5 --max-hooks 6"
        " --max-connections 7 --compress-binary --log-format json"
    )
    options = _parser("x").parse_args(words.split(" "))
    assert options.cors_origin == ["http://a", "http://b"]
    assert (options.max_tokens, options.max_hooks, options.max_connections) == (5, 6, 7)
    assert (options.allowed_host, options.model_root) == (["lab"], [Path("m")])
    assert (options.compress_binary, options.log_format) == (True, "json")


@pytest.mark.parametrize("key", ["", " ", "schl\u00fcssel", " pad", "pad ", "a\tb", "a\n", "a\x7f"])
def test_a_key_that_no_request_can_send_is_refused_at_the_start(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="An API key is printable ASCII"):
        ServerConfig(api_key=key)
    if key:
        assert main(["--api-key", key]) == 1
        told = capsys.readouterr().err
        assert re.fullmatch(r"neuroscope: An API key is [^\n]*\n", told)
        assert key == " " or key not in told


def test_a_key_may_hold_blanks_and_signs(worker: ModelWorker) -> None:
    key = "a \"k'ey\\~"
    assert client_of(worker, api_key=key).get("/v1/models", headers=bearer(key)).status_code == 200


# -- models from folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    save_tiny(tmp_path / "root" / "inside")
    save_tiny(tmp_path / "outside")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    return tmp_path


def test_with_a_key_models_come_from_inside_the_roots_only(folders: Path) -> None:
    with ModelWorker() as worker:
        client = client_of(worker, api_key=KEY, model_roots=(folders / "root",))

        def load(path: str) -> Any:
            return client.post("/v1/models/load", json={"model_path": path}, headers=bearer())

        assert load(str(folders / "root" / "inside")).status_code == 200
        assert load("neuroscope-tiny").status_code == 200
        refused = [
            error_of(load(path), 403)
            for path in (
                str(folders / "outside"),
                str(folders / "not-there"),
                str(folders / "root" / ".." / "outside"),
                str(folders / "root" / "link"),
                "/etc",
                "~",
                "~nobody-of-this-name/x",
                "x" * 4000,
            )
        ]
        for error in refused:
            assert {**error, "request_id": ""} == {**refused[0], "request_id": ""}
            assert error["code"] == "path_not_allowed"
            assert str(folders) not in error["message"]
        # An id of the hub is let through to the hub, which is offline here.
        assert error_of(load("owner/name"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_templates", "sub/tool.jinja"])
def test_no_file_of_a_model_may_lead_out_of_the_roots(folders: Path, name: str) -> None:
    inside = folders / "root" / "inside"
    (inside / "sub").mkdir()
    (inside / "fine.json").symlink_to(inside / "config.json")
    config = ServerConfig(api_key=KEY, model_roots=(folders / "root",))
    assert config.admits_folder(inside)
    (inside / name).unlink(missing_ok=True)
    (inside / name).symlink_to(folders / "outside")
    assert not config.admits_folder(inside)
    assert ServerConfig(model_roots=(folders,)).admits_folder(inside)


def test_with_a_key_and_no_root_no_folder_is_read(folders: Path) -> None:
    with ModelWorker() as worker:
        client = client_of(worker, api_key=KEY)
        body = {"model_path": str(folders / "outside")}
        assert client.post("/v1/models/load", json=body, headers=bearer()).status_code == 403
        assert client_of(worker).post("/v1/models/load", json=body).status_code == 200


MARKER = "import pathlib; pathlib.Path({path!r}).write_text('run')\n"


@pytest.mark.parametrize("asks", ["model_file", "auto_map", "tokenizer"])
def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, asks: str) -> None:
    folder, marker = save_tiny(tmp_path / "model"), tmp_path / "marker"
    (folder / "custom.py").write_text(MARKER.format(path=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    if asks == "model_file":
        config["model_file"] = "custom.py"
    elif asks == "auto_map":
        config |= {"model_type": "of_its_own", "auto_map": {"AutoModelForCausalLM": "custom.Model"}}
    else:
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer |= {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(config))
    with ModelWorker() as worker:
        error = error_of(client_of(worker).post("/v1/models/load", json={"model_path": str(folder)}), 400)
    assert error["code"] == "model_not_loadable"
    assert not marker.exists()


def test_weights_that_are_pickled_are_not_read(tmp_path: Path) -> None:
    folder, marker = save_tiny(tmp_path / "model"), tmp_path / "marker"
    (folder / "model.safetensors").unlink()
    # A pickle that would create the marker.
    (folder / "pytorch_model.bin").write_bytes(f"cbuiltins\nopen\n(V{marker}\nVw\ntR.".encode())
    with pytest.raises(ModelLoadError, match="safetensors"):
        HookedModel.from_pretrained(str(folder))
    assert not marker.exists()


def pickles(source: str) -> list[str]:
    """What a source has to do with pickle: modules, and calls that read one."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.split(".")[0] in {"pickle", "cPickle", "dill", "shelve", "joblib"}]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = f"{ast.unparse(node.func.value)}.{node.func.attr}"
            allows = any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords)
            found += [called] if called == "torch.load" or allows else []
            trusts = any(w.arg == "trust_remote_code" and ast.unparse(w.value) != "False" for w in node.keywords)
            found += [called] if trusts else []
    return found


def test_nothing_of_ours_reads_pickles_or_trusts_code() -> None:
    for package in ("api_server", "mlx_hooks", "neuroscope_bridge"):
        for path in (ROOT / package).rglob("*.py"):
            assert pickles(path.read_text()) == [], path
    for bad in ("import pickle", "from joblib import load", "np.load(f, allow_pickle=True)", "torch.load(f)"):
        assert pickles(bad), bad


# -- what is never told -----------------------------------------------------------------------------------------------


class Written(logging.Handler):
    """The lines that a formatter makes of everything that is logged."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(params=FORMATS)
def written(request: pytest.FixtureRequest) -> Iterator[Written]:
    handler, root = Written(formatter(request.param, secret=KEY)), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


def test_nothing_that_fails_tells_a_path_a_key_or_a_traceback(
    tmp_path: Path, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, damaged, odd = tmp_path / "empty", save_tiny(tmp_path / "damaged"), save_tiny(tmp_path / "odd")
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    (damaged / "model.safetensors").write_bytes(b"x" * 20)
    (odd / "config.json").write_text("not json")
    no_tokenizer = save_tiny(tmp_path / "mute")
    (no_tokenizer / "tokenizer.json").unlink()

    def load(path: str) -> HookedModel:
        if path == "falls":
            raise RuntimeError(f"cannot open '{tmp_path}/secret file.bin' with {KEY}")
        if path == "lost":
            raise ModelLoadError(f"mlx-lm could not load 'lost': no weights in {tmp_path}/cache/snapshots.")
        if path == "disk":
            (tmp_path / "not" / "there").read_text()
        return load_tiny(path)

    replies = []
    with ModelWorker(load=load) as worker:
        worker.load("llama", "tiny")
        roots = (tmp_path, *map(Path, ("falls", "disk", "lost")))
        app = create_app(worker, ServerConfig(api_key=KEY, model_roots=roots))
        client = app.test_client()
        for folder in (empty, damaged, odd, no_tokenizer, tmp_path / "nowhere"):
            monkeypatch.chdir(tmp_path)
            replies.append(client.post("/v1/models/load", json={"model_path": folder.name}, headers=bearer()))
        for name in ("falls", "disk", "lost", "owner/name", "../x"):
            replies.append(client.post("/v1/models/load", json={"model_path": name}, headers=bearer()))
        replies.append(client.get("/v1/models", headers=bearer("wrong")))
        replies.append(client.get(f"/v1/models?api_key={KEY}", headers=bearer()))
        replies.append(client.post(CHAT, data="{", content_type="application/json", headers=bearer()))
        replies.append(client.get("/nothing/at/all", headers=bearer()))
        model = worker.get("tiny").model
        monkeypatch.setattr(model, "generate_steps", _fails)
        for stream in (False, True):
            replies.append(client.post(CHAT, json={"messages": MESSAGES, "stream": stream}, headers=bearer()))
        with monkeypatch.context() as patch:
            failing = SimpleNamespace(has_chat_template=True, apply_chat_template=_template_fails)
            patch.setattr(model, "tokenizer", failing)
            replies.append(client.post("/v1/tokenize", json={"messages": MESSAGES}, headers=bearer()))
    assert {reply.status_code for reply in replies} >= {400, 401, 403, 404, 500}
    for reply in replies:
        assert reply.status_code >= 400
        told = [reply.text, *(value for _, value in reply.headers)]
        assert not [text for text in told if str(tmp_path) in text or KEY in text or "Traceback" in text], told
        assert str(ROOT) not in reply.text
        assert "/lib/" not in reply.text
    log = "\n".join(written.lines)
    assert len([line for line in written.lines if "api_server.access" in line]) == len(replies)
    for secret in (KEY, str(tmp_path), "Traceback", str(ROOT), "/lib/python", ".py", "secret file.bin'"):
        assert secret not in log.replace("'secret file.bin'", "")
    assert "RuntimeError" in log
    assert "test_safety:" in log  # the way it came, by modules


def _fails(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device", "/var/folders/of/somebody/spill.bin")


def _template_fails(*_: Any, **__: Any) -> Any:
    raise ValueError("no template at /srv/models/private/chat_template.jinja")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("No safetensors found in /root/models/tiny", "No safetensors found in tiny"),
        ("cannot open '/a b/c d.bin': gone", "cannot open 'c d.bin': gone"),
        ('(/tmp/x), "/tmp/y z" and ~/w/v.', '(x), "y z" and v.'),
        ("file:///srv/m/config.json", "config.json"),
        (r"C:\models\tiny is no folder", "tiny is no folder"),
        ("POST /v1/models/load first, see /docs; 1/2 of it and/or more", None),
        ("a hook at blocks.1/x or owner/name", None),
    ],
)
def test_paths_are_cut_to_their_last_part(text: str, told: str | None) -> None:
    assert scrub(text) == (text if told is None else told)
    assert scrub(f"mlx-lm could not load '/mine/m': {text}", "/mine/m").startswith("mlx-lm could not load '/mine/m'")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cannot open /srv/m/model.safetensors.", "cannot open /srv/m/model.safetensors."),
        ("no folder '/srv/m': /srv/m/ or /srv/m/a/b.json", "no folder '/srv/m': /srv/m/ or /srv/m/b.json"),
        ("/srv/model/x and /data/srv/m/y", "x and y"),
        ("There is no model at /srv/m.", "There is no model at /srv/m."),
    ],
)
def test_a_path_that_was_sent_is_told_with_the_names_of_its_files(text: str, told: str) -> None:
    assert scrub(text, "/srv/m") == told


@pytest.mark.parametrize("sent", ["/", "//", "m", "s"])
def test_no_path_is_told_for_a_part_of_it_that_was_sent(sent: str) -> None:
    assert scrub("cannot open /srv/m/secrets", sent) == "cannot open secrets"


# -- the log ----------------------------------------------------------------------------------------------------------


def test_a_request_is_one_line_of_json(worker: ModelWorker) -> None:
    handler, access = Written(formatter("json")), logging.getLogger("api_server.access")
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    try:
        client = client_of(worker)
        reply = client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1}, headers={"X-Request-Id": "mine.1"})
        client.get("/v1/models/none")
        stream = client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 2, "stream": True})
        sent = len(stream.data)
        stream.close()
    finally:
        access.removeHandler(handler)
        access.setLevel(logging.NOTSET)
    whole, unknown, streamed = [json.loads(line) for line in handler.lines]
    assert (whole["request_id"], whole["method"], whole["route"], whole["status"]) == ("mine.1", "POST", CHAT, 200)
    assert (whole["model"], whole["job_id"]) == ("tiny", reply.headers["X-Job-Id"])
    assert whole["bytes"] == len(reply.data)
    assert whole["ms"] > 0
    assert (unknown["route"], unknown["model"]) == ("/v1/models/<model:model_id>", "none")
    assert streamed["bytes"] == sent


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("llama-3.1:8b", "llama-3.1:8b"),
        ("gr\u00fcn", "gr\u00fcn"),
        (200, "200"),
        ("x status=200 job_id=1", '"x status=200 job_id=1"'),
        ('a"b', r'"a\"b"'),
        ("a\rb", r'"a\rb"'),
        ("\x1b[2J", r'"\u001b[2J"'),
        ("a\u2028b", r'"a\u2028b"'),
        ("a\\b", r'"a\\b"'),
        ("", '""'),
    ],
)
def test_no_value_passes_for_a_field_or_a_line(value: Any, told: str) -> None:
    record = logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "request", "model": value})
    assert formatter("text").format(record).endswith(f" INFO x request model={told}")


def test_no_message_breaks_its_line() -> None:
    record = logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "a\nb\r\x1b[2J\u2028c"})
    assert formatter("text").format(record).endswith(r" INFO x a b\r\u001b[2J\u2028c")


@pytest.mark.parametrize("form", FORMATS)
def test_a_key_that_is_escaped_is_not_told_either(form: str) -> None:
    record = logging.makeLogRecord({"msg": "given", "reason": 'the key is k"e\\y'})
    line = formatter(form, secret='k"e\\y').format(record)
    assert "***" in line
    assert "k" + json.dumps('"e')[1:-1] not in line


def test_a_request_that_waits_for_a_thread_is_no_line_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(logging, "captureWarnings", lambda _: None)
    queue = logging.getLogger("waitress.queue")
    monkeypatch.setattr(queue, "level", logging.NOTSET)
    configure("warning", "text")
    assert not queue.isEnabledFor(logging.WARNING)


def test_tracebacks_are_for_level_debug() -> None:
    try:
        raise RuntimeError("no")
    except RuntimeError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 1, "failed", (), (type(error), error, error.__traceback__))
    for form in FORMATS:
        assert "Traceback" in formatter(form, tracebacks=True).format(record)
        assert "Traceback" not in formatter(form).format(record)


# -- the name of a request --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "kept"), [("a-B_9.x", True), ("x" * 64, True), ("x" * 65, False), ("a b", False)])
def test_a_client_may_name_its_request(worker: ModelWorker, given: str, kept: bool) -> None:
    reply = client_of(worker).get("/v1/models/none", headers={"X-Request-Id": given})
    name = reply.headers["X-Request-Id"]
    assert (name == given) == kept
    assert reply.json["error"]["request_id"] == name


@pytest.mark.parametrize("given", ["", "a\nb", "é", "<script>"])
def test_what_could_do_harm_in_a_log_names_no_request(given: str) -> None:
    assert re.fullmatch(r"req-[0-9a-f]{32}", request_id(given))


def test_an_error_inside_a_stream_has_the_name_too(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = worker.get("tiny").model
    plain = model.generate_steps

    def breaks(*arguments: Any, **options: Any) -> Any:
        yield next(plain(*arguments, **options))
        raise RuntimeError("in the middle")

    monkeypatch.setattr(model, "generate_steps", breaks)
    body = {"messages": MESSAGES, "stream": True, "max_tokens": 3}
    reply = client_of(worker).post(CHAT, json=body, headers={"X-Request-Id": "mine"})
    assert json.loads(reply.text.split("data: ")[-1])["error"]["request_id"] == "mine"


def test_over_the_wire_the_client_learns_the_name(worker: ModelWorker) -> None:
    with running_server(worker) as url:
        with LMStudioNeuroScopeClient(url) as client, pytest.raises(NeuroScopeAPIError) as caught:
            client.model_info("none")
        assert re.fullmatch(r"req-[0-9a-f]{32}", caught.value.request_id or "")


@pytest.mark.parametrize(
    ("headers", "status", "named"),
    [({"Transfer-Encoding": "odd"}, 501, True), ({"X": "x" * 2**18}, 431, False)],
)
def test_what_the_http_layer_refuses_has_a_name_and_a_line(
    worker: ModelWorker, headers: dict[str, str], status: int, named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with running_server(worker) as url, caplog.at_level(logging.INFO, "api_server.access"):
        reply = requests.post(f"{url}/v1/tokenize", headers={"X-Request-Id": "mine"} | headers, timeout=10)
        # Its line is written once the answer is out.
        until(lambda: bool(caplog.records))
    assert reply.status_code == status
    name = reply.headers["X-Request-Id"]
    assert name == reply.json()["error"]["request_id"]
    assert (name == "mine") == named  # headers that are too large are not read
    assert [(record.request_id, record.status) for record in caplog.records] == [(name, status)]


# -- compression ------------------------------------------------------------------------------------------------------

CAPTURED = {"messages": MESSAGES, "activation_hooks": HOOKS[:1], "max_tokens": 1, "temperature": 0}


def unpacked(reply: Any) -> bytes:
    return {"gzip": gzip.decompress, None: bytes}[reply.headers.get("Content-Encoding")](reply.data)


def activations(data: bytes) -> Any:
    return json.loads(data)["activations"]


def test_json_is_compressed_for_those_who_ask(worker: ModelWorker) -> None:
    client = client_of(worker)
    plain = client.post(CAPTURE, json=CAPTURED)
    packed = client.post(CAPTURE, json=CAPTURED, headers={"Accept-Encoding": "gzip"})
    assert "Content-Encoding" not in plain.headers
    assert packed.headers["Content-Encoding"] == "gzip"
    assert "Accept-Encoding" in packed.headers["Vary"]
    assert len(packed.data) == packed.content_length < len(plain.data)
    assert activations(unpacked(packed)) == activations(plain.data)
    for asked, chosen in {"zstd, gzip": "zstd", "br": "br", "zstd;q=0.5, gzip": "gzip", "identity": None}.items():
        got = client.post(CAPTURE, json=CAPTURED, headers={"Accept-Encoding": asked}).headers.get("Content-Encoding")
        assert got == chosen


@pytest.fixture
def kept(worker: ModelWorker) -> Any:
    """A client, one whose server compresses binary too, and the address of the same capture at both."""

    def keep(client: FlaskClient) -> str:
        capture_id = client.post(CAPTURE, json=CAPTURED | {"keep_capture": True}).json["capture_id"]
        return f"/v1/captures/{capture_id}/activations/resid"

    clients = [client_of(worker), client_of(worker, compress_binary=True)]
    return [(client, keep(client)) for client in clients]


ASKING = {"Accept-Encoding": "gzip, zstd"}


def test_binary_and_events_are_sent_as_they_are(worker: ModelWorker, kept: Any) -> None:
    client, address = kept[0]
    for form in ("npy", "safetensors"):
        assert "Content-Encoding" not in client.get(f"{address}?format={form}", headers=ASKING).headers
    events = client.post(CHAT, json={"messages": MESSAGES, "stream": True, "max_tokens": 30}, headers=ASKING)
    assert "Content-Encoding" not in events.headers
    assert events.text.endswith("data: [DONE]\n\n")


def test_a_server_that_was_told_to_compresses_binary(kept: Any) -> None:
    client, address = kept[1]
    plain = client.get(f"{address}?format=npy")
    packed = client.get(f"{address}?format=npy", headers={"Accept-Encoding": "gzip"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.data) == plain.data
    assert plain.headers["Accept-Ranges"] == "bytes"
    assert "Accept-Ranges" not in packed.headers
    tag = plain.headers["ETag"]
    assert packed.headers["ETag"] == f"W/{tag}"
    part = {"Range": "bytes=0-99"} | ASKING
    assert client.get(f"{address}?format=npy", headers=part | {"If-Range": f"W/{tag}"}).status_code == 200
    assert client.get(f"{address}?format=npy", headers=part | {"If-Range": tag}).status_code == 206


def test_what_is_known_or_a_part_stays_what_it_is(kept: Any) -> None:
    for client, address in kept:
        whole = client.get(f"{address}?format=npy").data
        part = client.get(f"{address}?format=npy", headers=ASKING | {"Range": "bytes=0-999"})
        assert (part.status_code, part.data) == (206, whole[:1000])
        packed = client.get(address, headers=ASKING)
        assert packed.headers["Content-Encoding"] == "zstd"
        assert packed.headers["ETag"].startswith('W/"')
        for reply in (part, packed):
            same = client.get(
                address + ("?format=npy" if reply is part else ""),
                headers=ASKING | {"If-None-Match": reply.headers["ETag"]},
            )
            assert (same.status_code, same.data) == (304, b"")
            assert "Content-Encoding" not in same.headers


def test_the_client_asks_for_compression_only_if_told(worker: ModelWorker) -> None:
    seen = []
    app = create_app(worker)

    def look(response: Any) -> Any:
        seen.append(response.headers.get("Content-Encoding"))
        return response

    app.after_request_funcs[None].insert(0, look)  # the last one to run

    server = Server(app, ServerConfig(port=0))
    thread = server.start()
    try:
        arrays = []
        for compress in (False, True):
            with LMStudioNeuroScopeClient(server.url, compress=compress) as client:
                result = client.generate_with_activations(MESSAGES, HOOKS[:1], max_tokens=1, temperature=0)
                arrays.append(result["activations"]["resid"][0]["data"])
        assert np.array_equal(*arrays)
    finally:
        server.stop()
        thread.join(10)
    assert seen[0] is None
    assert seen[1] in ("gzip", "zstd", "br")


def test_a_compressed_reply_is_whole_over_the_wire(worker: ModelWorker) -> None:
    with running_server(worker) as url:
        reply = requests.post(
            url + CAPTURE, json=CAPTURED, headers={"Accept-Encoding": "gzip"}, stream=True, timeout=30
        )
        raw = reply.raw.read(decode_content=False)
        assert len(raw) == int(reply.headers["Content-Length"])
        assert json.loads(zlib.decompress(raw, 31))["usage"]["completion_tokens"] == 1
