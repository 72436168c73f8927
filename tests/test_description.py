"""The description says what the server does, and the server does what it says."""

import copy
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance
from server_tools import load_tiny, save_captured, save_experiments, until

from api_server import ModelWorker, ServerConfig, create_app
from api_server.description import is_described

# The description's own addresses.
NOT_DESCRIBED = {"openapi", "docs", "asset"}

# Schemathesis asks for the description when tests are collected; the fixture starts the worker.
WORKER = ModelWorker(load_tiny)
FOLDERS = tempfile.TemporaryDirectory()
EXPERIMENTS, CAPTURED = save_experiments(Path(FOLDERS.name) / "traits"), save_captured(Path(FOLDERS.name) / "mechint")
APP = create_app(WORKER, ServerConfig(max_tokens=8, experiments=EXPERIMENTS, mechint=CAPTURED))
DOCUMENT: dict[str, Any] = APP.test_client().get("/openapi.json").json


@pytest.fixture(scope="module", autouse=True)
def app() -> Iterator[Flask]:
    with WORKER, FOLDERS:
        WORKER.load("neuroscope-tiny", "tiny")
        yield APP


@pytest.fixture
def document() -> dict[str, Any]:
    return copy.deepcopy(DOCUMENT)


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """The description with replies that hold nothing else: a field that nobody described is found."""
    document = copy.deepcopy(document)
    for name, schema in document["components"]["schemas"].items():
        if not name.endswith(("Request", "Query")) and "properties" in schema:
            schema["additionalProperties"] = False
    return document


# What fits the schemas of the others may be refused still: an unknown layer is well-formed.
ACCEPTED = {
    *("health", "list_models", "get_model", "hook_points", "list_hooks", "clear_hooks", "remove_hook"),
    *("list_captures", "clear_captures", "get_capture", "delete_capture", "list_jobs", "get_job", "cancel_job"),
    *("unload_model", "selftest", "load_model", "interpret_layers"),
}
FUZZED = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0, "keep_capture": True}
FUZZED_HOOKS = [
    {"hook_point": "blocks.*.attn.hook_z", "hook_id": "z"},
    {"layer_name": "blocks.1", "component": "residual", "hook_id": "a/b", "capture_input": True},
]
answered: dict[str, set[int]] = {}
api = schemathesis.openapi.from_dict(closed(DOCUMENT))
api.app = APP


def there_is(name: str, made_up: str) -> str:
    """The id of something that the server has, where one was made up that could be another."""
    client = APP.test_client()
    if made_up == "0":
        return made_up  # a few unknown ones
    if name == "capture_id":
        kept = client.get("/v1/captures?limit=1").json["data"]
        if kept:
            return str(kept[0]["id"])
        body = FUZZED | {"activation_hooks": FUZZED_HOOKS, "model": "tiny", "activation_encoding": "none"}
        return str(client.post("/v1/completions/with_activations", json=body).json["capture_id"])
    if name == "hook_id":
        client.post("/v1/activations/hooks", json={"hooks": FUZZED_HOOKS, "model": "tiny"})
        return str(FUZZED_HOOKS[len(made_up) % 2]["hook_id"])
    return {"model_id": "tiny", "job_id": WORKER.jobs()[0]["id"]}[name]


@api.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    if context.operation is not None and context.operation.definition.raw["operationId"] == "selftest":
        return path_parameters  # it takes seconds, and there is nothing in it to try
    return path_parameters and {name: there_is(name, str(value)) for name, value in path_parameters.items()}


MOST = {"random_circuits": 100, "sequences": 256, "length": 512, "resamples": 10_000, "steps": 64}
"""What is allowed of what takes long."""
ENOUGH = {"random_circuits": 2, "sequences": 4, "length": 8, "resamples": 100, "steps": 3}


def lighter(body: Any) -> Any:
    """What is asked as well by less work; what is refused stays as it is.

    Prompts that are made up are mostly copies of the example: each once shows as much. Numbers are made small.
    """
    if not isinstance(body, dict):
        return body
    lists = {name: body[name] for name in ("eval_data", "judge_by", "prompts") if isinstance(body.get(name), list)}
    once = {
        name: list({json.dumps(one, default=repr): one for one in given}.values())
        for name, given in lists.items()
        if len(given) <= 256
    }
    numbers = {name: body[name] for name in ENOUGH if type(body.get(name)) is int}
    return body | once | {n: ENOUGH[n] for n, given in numbers.items() if ENOUGH[n] < given <= MOST[n]}


def every_answer_is_as_described(case: schemathesis.Case) -> None:
    if "tiny" not in [loaded.model_id for loaded in WORKER.models()]:
        WORKER.load("neuroscope-tiny", "tiny")
    operation = case.operation.definition.raw["operationId"]
    case.body = lighter(case.body)
    unchecked = [] if operation in ACCEPTED else [positive_data_acceptance]
    reply = case.call_and_validate(headers={"Accept-Encoding": "identity"}, excluded_checks=unchecked)
    answered.setdefault(operation, set()).add(reply.status_code)


def fuzzed(operation: str) -> Any:
    """The test of one operation, by a name of its own: test processes tell tests apart by name."""
    tried = settings(
        max_examples=5, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )

    def test(case: schemathesis.Case) -> None:
        every_answer_is_as_described(case)

    return api.include(operation_id=operation).parametrize()(tried(test))


OPERATIONS = [one["operationId"] for methods in DOCUMENT["paths"].values() for one in methods.values()]
globals().update({f"test_every_answer_of_{name}_is_as_described": fuzzed(name) for name in OPERATIONS})


KEPT = {"get_capture", "get_activations", "get_hook_activations", "get_job", "remove_hook"}
"""Operations on things that the server keeps."""


@pytest.mark.parametrize("name", sorted(KEPT))
def test_ids_that_are_made_up_are_of_things_that_there_are(app: Flask, name: str) -> None:
    ((path, method),) = [
        (path, method)
        for path, methods in DOCUMENT["paths"].items()
        for method, operation in methods.items()
        if operation["operationId"] == name
    ]
    address = re.sub(r"{(\w+)}", lambda part: there_is(part[1], "made up"), path)
    assert app.test_client().open(address, method=method.upper()).status_code == 200
    # So the fuzzed addresses, where they were asked in this process, met some.
    assert 200 in answered.get(name, {200})


def bodies() -> list[Any]:
    found = [
        (path, operation["requestBody"]["content"]["application/json"]["example"])
        for path, methods in DOCUMENT["paths"].items()
        for operation in methods.values()
        if "application/json" in operation.get("requestBody", {}).get("content", {})
    ]
    return [pytest.param(path, body, id=path) for path, body in found]


def test_the_description_is_a_valid_document() -> None:
    api.validate()


def of_schema(path: str) -> dict[str, Any]:
    """The fields of what is posted to an address."""
    name = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return dict(DOCUMENT["components"]["schemas"][name.split("/")[-1]]["properties"])


LIGHTENED = [
    pytest.param(*one.values, name, id=f"{one.id}-{name}")
    for one in bodies()
    for name in MOST
    if name in of_schema(one.id)
]


@pytest.mark.parametrize(("path", "body", "name"), LIGHTENED)
def test_as_much_as_is_allowed_is_answered_as_described(app: Flask, path: str, body: dict[str, Any], name: str) -> None:
    """What ``lighter`` makes less of, once as it is."""
    field, most = of_schema(path)[name], MOST[name]
    assert most in [one.get("maximum") for one in (field, *field.get("anyOf", []))]
    reply = app.test_client().post(path, json=body | {name: most})
    assert reply.status_code == 200, reply.text
    check(reply, "post", path)
    reply = app.test_client().post(path, json=body | {name: most + 1})
    assert (reply.status_code, reply.json["error"]["param"]) == (400, name)


def test_all_that_is_made_less_is_asked_once_as_it_is() -> None:
    assert {one.values[-1] for one in LIGHTENED} == set(MOST) == set(ENOUGH)


JOBS = [one for one in bodies() if one.id != "/v1/activations/hooks"]


@pytest.mark.parametrize(("path", "body"), JOBS)
def test_a_job_that_is_cancelled_is_answered_as_described(path: str, body: dict[str, Any]) -> None:
    gate = threading.Event()
    with ModelWorker() as worker, ThreadPoolExecutor() as pool:
        worker.load("neuroscope-tiny", "tiny")
        client = create_app(worker, ServerConfig(mechint=CAPTURED)).test_client()
        blocking = worker.submit(gate.wait)
        until(lambda: blocking.status == "running")
        try:
            asking = pool.submit(client.post, path.replace("{model_id}", "tiny"), json=body)
            until(lambda: len([job for job in worker.jobs() if job["status"] in ("queued", "running")]) == 2)
            waiting = next(job["id"] for job in worker.jobs() if job["status"] == "queued")
            assert client.delete(f"/v1/jobs/{waiting}").status_code == 200
            reply = asking.result(10)
        finally:
            gate.set()
    assert (reply.status_code, reply.json["error"]["code"]) == (409, "cancelled")
    assert reply.headers["X-Job-Id"] == waiting
    assert "409" in DOCUMENT["paths"][path]["post"]["responses"]


# What HTTP itself says of any answer.
OF_HTTP = {"Content-Type", "Content-Length", "Content-Disposition", "Cache-Control"}
OF_HTTP |= {"X-Content-Type-Options", "X-Accel-Buffering"}


def check_headers(reply: Any, described: dict[str, Any]) -> None:
    """Hold an answer's headers to the description of its address and status."""
    headers = {name: DOCUMENT["components"]["headers"].get(name, one) for name, one in described["headers"].items()}
    assert set(reply.headers.keys()) - OF_HTTP <= set(headers)
    assert {name for name, one in headers.items() if one.get("required")} <= set(reply.headers.keys())
    for name, one in headers.items():
        assert one["description"].endswith((".", "`."))
        if name in reply.headers:
            jsonschema_rs.validate(one["schema"], reply.headers[name])


def check(reply: Any, method: str, path: str) -> None:
    """Hold a reply, or each event of one, to the description of its address."""
    document = closed(DOCUMENT)
    described = document["paths"][path][method]["responses"][str(reply.status_code)]
    schema, components = described["content"][reply.mimetype]["schema"], {"components": document["components"]}
    check_headers(reply, described)
    if reply.mimetype == "application/json":
        jsonschema_rs.validate(schema | components, reply.json)
    else:
        *events, end = [line.removeprefix("data: ") for line in reply.text.split("\n\n")[:-1]]
        assert end == "[DONE]"
        # The other thing that an event may be is an error.
        event_schema = schema["properties"]["data"]["anyOf"][1]["contentSchema"]["anyOf"][0]
        for event in events:
            jsonschema_rs.validate(event_schema | components, json.loads(event))


def with_streams() -> list[Any]:
    """Each example, and once more with a stream where there can be one."""
    content = {
        path: methods["post"]["responses"]["200"]["content"]
        for path, methods in DOCUMENT["paths"].items()
        if "post" in methods
    }
    streams = [
        pytest.param(*one.values, True, id=f"{one.id}-stream")
        for one in bodies()
        if "text/event-stream" in content[one.id]
    ]
    assert len(streams) == 5
    return [pytest.param(*one.values, False, id=one.id) for one in bodies()] + streams


@pytest.mark.parametrize(("path", "body", "stream"), with_streams())
def test_every_example_is_answered_well(app: Flask, path: str, body: dict[str, Any], stream: bool) -> None:
    reply = app.test_client().post(path.replace("{model_id}", "tiny"), json=body | ({"stream": True} if stream else {}))
    assert reply.status_code == 200, reply.text
    check(reply, "post", path)


HOOKS = [
    {"layer_name": "transformer.h.1", "component": "residual", "hook_id": "a/b", "capture_input": True},
    {"hook_point": "blocks.*.attn.hook_z", "hook_id": "z", "positions": "last", "heads": [0, 2]},
    {"layer_name": "*", "component": "mlp", "hook_id": "norms", "positions": {"start": 1, "stop": 3}, "reduce": "norm"},
    {"layer_name": "transformer.wte", "component": "embedding", "hook_id": "ids", "capture_input": True},
]
EDIT = {"hook_point": "blocks.2.attn.hook_z", "type": "zero", "heads": [1]}
VECTORS = [
    {"name": "ones", "layer": 1, "vector": [1] * 128, "threshold": 0.5},
    {"name": "large", "hook_point": "blocks.2.hook_resid_post", "vector": [3e38] * 128},
]
PROMPT = {"prompt": "The capital of France is", "max_tokens": 3, "model": "tiny"}
CAPTURE = {"activation_hooks": HOOKS, "interventions": [EDIT], "keep_capture": True}
MESSAGES = [{"role": "user", "content": "What is the capital of France ?"}]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_to_all_that_can_be_asked_are_as_described(app: Flask, stream: bool) -> None:
    client, streamed = app.test_client(), {"stream": stream, "stream_options": {"include_usage": True}}
    streamed = streamed if stream else {}

    def ask(method: str, path: str, body: dict[str, Any] | None = None, status: int = 200, **parts: str) -> Any:
        reply = client.open(path.format(**parts), method=method.upper(), json=body)
        assert reply.status_code == status, reply.text
        check(reply, method, path.split("?")[0])
        return reply

    ask("post", "/v1/completions", PROMPT | streamed | {"logprobs": 2, "n": 2})
    ask("post", "/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "n": 2} | streamed)
    ask("post", "/v1/analysis/traits", PROMPT | {"vectors": VECTORS, "interventions": [EDIT], "stream": stream})
    ask(
        "post",
        "/v1/analysis/traits",
        {"messages": MESSAGES, "vectors": VECTORS, "max_tokens": 0, "stream": stream, "normalize": False},
    )
    stored = {"experiment": "tiny_cognitive", "stored_chat": True, "stream": stream}
    ask("post", "/v1/analysis/traits", PROMPT | stored)
    ask("get", "/v1/analysis/traits")
    ask("get", "/v1/analysis/traits?experiment=tiny_cognitive")
    whole = ask("post", "/v1/completions/with_activations", PROMPT | CAPTURE | streamed)
    kept = re.search(r"cap-\w+", whole.text)
    assert kept
    for address in ("/v1/captures", "/v1/captures/{capture_id}", "/v1/jobs", "/v1/models", "/v1/activations/hooks"):
        ask("get", address, capture_id=kept[0])
    activations = "/v1/captures/{capture_id}/activations"
    for query in ("", "?encoding=base64&dtype=float16", "?encoding=none", "?layers=1"):
        ask("get", activations + query, capture_id=kept[0])
    one = activations + "/{hook_id}"
    ask("get", one, capture_id=kept[0], hook_id="z")
    ask("get", one + "?reduce=mean&positions=:2", capture_id=kept[0], hook_id="a/b")
    ask("post", "/v1/activations/hooks", {"hooks": HOOKS})
    ask("get", "/v1/activations/hooks")
    ask("delete", "/v1/activations/hooks/{hook_id}", hook_id="a/b")
    ask("delete", "/v1/activations/hooks")
    ask("get", "/interpret/layers")
    ask("get", "/interpret/layers?model=tiny")
    neuron = {"analysis_type": "neuron", "config": {"steps": [0]}}
    ask("post", "/interpret", neuron)
    ask("post", "/interpret", neuron | {"background": True}, 202)
    for status, further in ((200, {}), (202, {"background": "true", "layer_name": "blocks.2.hook_resid_post"})):
        with next(CAPTURED.glob("*.safetensors")).open("rb") as file:
            reply = client.post("/interpret/upload", data={"analysis_type": "neuron", "file": file} | further)
        assert reply.status_code == status
        check(reply, "post", "/interpret/upload")
    job = ask("post", "/v1/models/load", {"model_path": "neuroscope-tiny", "background": True}, 202)
    ask("get", "/v1/jobs/{job_id}", job_id=job.json["id"])
    ask("delete", "/v1/jobs/{job_id}", job_id=job.json["id"])
    ask("delete", "/v1/captures/{capture_id}", capture_id=kept[0])
    ask("delete", "/v1/captures")


def test_the_headers_of_answers_are_as_described(app: Flask) -> None:
    client = app.test_client()
    reply = client.post("/v1/completions/with_activations", json=PROMPT | CAPTURE)
    path = "/v1/captures/{capture_id}/activations"
    address = path.format(capture_id=reply.json["capture_id"])
    responses = DOCUMENT["paths"][path]["get"]["responses"]
    npy = client.get(f"{address}/z?format=npy&layers=1")
    asked = [
        ("?format=safetensors", {}, 200, {"Accept-Ranges", "ETag"}),
        ("?format=safetensors", {"Range": "bytes=0-9"}, 206, {"Accept-Ranges", "Content-Range"}),
        ("?format=safetensors", {"Range": "bytes=99999999-"}, 416, {"Content-Range"}),
        ("/z?format=npy&layers=1", {"If-None-Match": npy.headers["ETag"]}, 304, {"ETag"}),
        ("", {"Accept-Encoding": "gzip"}, 200, {"Content-Encoding", "Vary", "ETag"}),
    ]
    for query, headers, status, named in asked:
        reply = client.get(address + query, headers=headers)
        assert reply.status_code == status
        assert named <= set(reply.headers.keys())
        response = responses[str(status)]
        if "$ref" in response:
            response = DOCUMENT["components"]["responses"][response["$ref"].split("/")[-1]]
        check_headers(reply, response)


def test_a_model_says_which_tokens_end_a_text(app: Flask) -> None:
    client = app.test_client()
    ends = client.get("/v1/models/tiny").json["eos_token_ids"]
    body = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "activation_hooks": HOOKS[:1], "model": "tiny"}
    reply = client.post("/v1/chat/completions/with_activations", json=body).json
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert ends == [reply["tokens"]["ids"][-1]]


def test_no_field_of_a_request_stands_bare(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"].items()
    inputs = {
        f"{model}.{name}": field
        for model, schema in schemas
        if model.endswith(("Request", "ChatMessage", "TextPart", "StreamOptions"))
        for name, field in schema["properties"].items()
    }
    assert len(inputs) > 100
    assert [name for name, field in inputs.items() if not field.get("description")] == []
    queries = [one for operation in operations(document).values() for one in operation["parameters"]]
    assert [one["name"] for one in queries if not one.get("description")] == []


def test_a_run_too_large_for_a_reply_is_answered_as_described(app: Flask) -> None:
    client = create_app(WORKER, ServerConfig(max_reply_bytes=1000)).test_client()
    for stream in (False, True):
        reply = client.post("/v1/completions/with_activations", json=PROMPT | CAPTURE | {"stream": stream})
        assert "omitted" in reply.text
        check(reply, "post", "/v1/completions/with_activations")


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["operationId"]: one for path in document["paths"].values() for one in path.values()}


def test_every_address_is_described_or_left_out_on_purpose(app: Flask, document: dict[str, Any]) -> None:
    names = {rule.endpoint.split(".")[-1]: rule for rule in app.url_map.iter_rules()}
    described = {name for name, rule in names.items() if is_described(app.view_functions[rule.endpoint])}
    assert set(names) - described == NOT_DESCRIBED
    assert set(operations(document)) == described


def test_the_models_that_validate_are_the_ones_described(document: dict[str, Any]) -> None:
    body = operations(document)["chat"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    schema = document["components"]["schemas"]["ChatRequest"]
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["messages"]
    assert schema["properties"]["top_p"]["anyOf"] == [
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "null"},
    ]
    assert schema["properties"]["tools"]["enum"] == [[], None]


def test_every_operation_says_what_it_does_and_how_it_fails(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        assert operation["summary"].endswith("."), name
        assert operation["tags"], name
        assert {"400", "403", "500"} <= set(operation["responses"]), name
        assert "401" not in operation["responses"], name


def test_a_server_with_a_key_says_so(app: Flask) -> None:
    guarded = create_app(app.extensions["model_worker"], ServerConfig(api_key="secret")).test_client()
    document = guarded.get("/openapi.json", headers={"Authorization": "Bearer secret"}).json
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    for name, operation in operations(document).items():
        assert operation["security"] == ([] if name == "health" else [{"bearer": []}])
        assert ("401" in operation["responses"]) == (name != "health")


@pytest.mark.parametrize("address", ["/docs", "/docs/swagger_bundle.js", "/docs/swagger_style.css", "/docs/start.js"])
def test_the_page_and_its_parts_are_served(app: Flask, address: str) -> None:
    reply = app.test_client().get(address)
    assert reply.status_code == 200
    assert len(reply.data) > 100


def test_the_page_may_load_from_this_server_only(app: Flask) -> None:
    reply = app.test_client().get("/docs")
    policy = dict(part.split(" ", 1) for part in reply.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert "http" not in reply.text.replace("http-equiv", "")


def test_another_file_is_not_served(app: Flask) -> None:
    for name in ("redoc.js", "..%2Ftemplates.py", "__init__.py"):
        assert app.test_client().get(f"/docs/{name}").status_code == 404


QUERIES = {
    ("GET", "/health"): (),
    ("GET", "/v1/activations/hooks"): ("model",),
    ("POST", "/v1/tokenize"): (),
}


@pytest.mark.parametrize(("method", "address"), QUERIES)
def test_an_unknown_query_parameter_is_refused_with_the_known_ones(app: Flask, method: str, address: str) -> None:
    reply = app.test_client().open(f"{address}?modle=x", method=method, json={} if method == "POST" else None)
    assert reply.status_code == 400
    known = ", ".join(QUERIES[method, address]) or "none"
    assert reply.json["error"]["message"] == f"Query parameter 'modle' is not supported here. Supported: {known}."
    assert reply.json["error"]["param"] == "modle"


def test_no_described_address_passes_over_an_unknown_query_parameter(app: Flask, document: dict[str, Any]) -> None:
    client = app.test_client()
    for path, methods in document["paths"].items():
        for method in methods:
            address = path.replace("{model_id}", "none").replace("{", "").replace("}", "") + "?nonsense=1"
            reply = client.open(address, method=method.upper(), json={} if method == "post" else None)
            assert (reply.status_code, reply.json["error"]["param"]) == (400, "nonsense"), (method, path)


def test_a_query_parameter_that_comes_twice_is_refused(app: Flask) -> None:
    reply = app.test_client().get("/v1/activations/hooks?model=tiny&model=other")
    assert (reply.status_code, reply.json["error"]["param"]) == (400, "model")
