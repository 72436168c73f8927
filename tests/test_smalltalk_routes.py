"""The Smalltalk client and the server's description agree: no operation without a selector, and the other way round."""

import copy
import re
from urllib.parse import parse_qsl, unquote, urlsplit

import jsonschema_rs
import pytest
from smalltalk_image import canned_server, client, literal
from smalltalk_sources.tonel import read_package

from api_server import ModelWorker, ServerConfig, create_app

CLASSES = ("LMStudioRESTClient", "LMStudioCapture", "LMStudioJob")

# Of the server's addresses, only this one has no selector: it is a page for browsers, which shows what
# apiDescription answers.
WITHOUT_SELECTOR = {"/docs"}

# The description does not describe itself.
BESIDES = {"apiDescription": "/openapi.json"}

MESSAGES = "(Array with: (Dictionary new at: 'role' put: 'user'; at: 'content' put: 'Hi'; yourself))"
HOOKS = "(Array with: (Dictionary new at: 'layer_name' put: '*'; at: 'component' put: 'mlp'; yourself))"
EDITS = "(Array with: (Dictionary new at: 'hook_point' put: 'blocks.0.hook_mlp_out'; at: 'type' put: 'zero'; yourself))"
OPTIONS = "(Dictionary new at: 'max_tokens' put: 2; at: 'keep_capture' put: true; yourself)"
EVERYWHERE = "(Dictionary new at: 'positions' put: 'all'; yourself)"
STORED = "(Dictionary new at: 'experiment' put: 'moods'; at: 'traits' put: #('angry'); yourself)"
VECTORS = "(Array with: (c traitVector: 'polite' layer: 1 numbers: #(1 2)))"
PLAIN = "(Dictionary new at: 'max_tokens' put: 2; at: 'seed' put: 1; yourself)"
EXAMPLES = "(Array with: (c example: 'a' corrupted: #(5) answer: 'b' wrong: 7))"
SWEEP = "(Dictionary new at: 'sweep' put: 'layer x head'; yourself)"
GROUPS = "(Dictionary new at: 'groups' put: #(#('L0H1' 'L0 mlp')); at: 'metric' put: 'logit'; yourself)"
CIRCUIT = "(Dictionary new at: 'method' put: 'acdc'; at: 'threshold' put: 0.5; yourself)"
SENDERS = "(Dictionary new at: 'senders' put: #('L0H1'); yourself)"
LAYERS = "(Dictionary new at: 'layers' put: #(0 1); yourself)"
KEPT = "(Dictionary new at: 'capture_id' put: 'cap-1'; yourself)"

# What each public selector is sent with, by receiver: c is a client of a model, m one that has chosen none,
# k a capture, j a job. The operations that it then asks for.
SENDS = {
    # LMStudioRESTClient
    f"c ablation: {EXAMPLES} options: {GROUPS}": ["ablation"],
    "c activationEncoding": [],
    "c activationEncoding: 'base64'": [],
    f"c activationPatching: {EXAMPLES} options: {SWEEP}": ["patching"],
    "c activationsIn: (STONJSON fromString: '{\"activations\": {}}')": [],
    f"c analysisInBackground: 'circuit' of: {EXAMPLES} options: {CIRCUIT}": ["circuit"],
    "c apiDescription": [],
    "c apiKey: 'secret'": [],
    f"c attention: 'Hi' options: {LAYERS}": ["attention"],
    f"c attention: {MESSAGES} options: nil": ["attention"],
    "c attentionPatterns: 'Hi'": ["complete_with_activations"],
    "c baseUrl": [],
    "c baseUrl: c baseUrl": [],
    "c capture: 'cap-1'": [],
    f"c captureFrom: {KEPT}": [],
    "c captures": ["list_captures"],
    "c chat: 'Hi'": ["chat"],
    f"c chat: {MESSAGES} options: {PLAIN}": ["chat"],
    "c clearAllHooks": ["clear_hooks"],
    "c clearCaptures": ["clear_captures"],
    "c clearHooks": ["clear_hooks"],
    "m clearHooks": ["clear_hooks"],
    "c complete: 'Hi'": ["complete"],
    f"c complete: #(1 2) options: {PLAIN}": ["complete"],
    f"c completeWithActivations: 'Hi' hooks: {HOOKS} options: {OPTIONS}": ["complete_with_activations"],
    "c convertActivationsForNeuroScope: Dictionary new": [],
    "c createAttentionAnalysisHooks: 2 targetLayers: nil": [],
    "c createCircuitAnalysisHooks: 2": [],
    "c detokenize: #(1 2)": ["detokenize"],
    "c directLogitAttribution: 'Hi' token: 5": ["direct_logit_attribution"],
    f"c directLogitAttribution: {MESSAGES} token: #(5 6) options: {EVERYWHERE}": ["direct_logit_attribution"],
    f"c edgeScores: {EXAMPLES} options: nil": ["edges"],
    "c example: 'a' corrupted: nil answer: 'b' wrong: nil": [],
    f"c findCircuit: {EXAMPLES} options: {CIRCUIT}": ["circuit"],
    f"c forward: 'Hi' hooks: {HOOKS}": ["complete_with_activations"],
    f"c forward: #(1 2) hooks: nil interventions: {EDITS}": ["complete_with_activations"],
    f"c generateWithActivations: 'Hi' hooks: {HOOKS}": ["chat_with_activations"],
    "c generateWithActivations: 'Hi' hooks: nil maxTokens: 0 temperature: 0": ["chat_with_activations"],
    f"c generateWithActivations: {MESSAGES} hooks: {HOOKS} options: {OPTIONS}": ["chat_with_activations"],
    f"c headComposition: {LAYERS}": ["composition"],
    f"c headScores: {LAYERS}": ["heads"],
    "c health": ["health"],
    "c hookPoints": ["hook_points"],
    "c hookPoints: 'org/other'": ["hook_points"],
    "c interpret: 'neuron' layer: 'blocks.2.hook_resid_post'": ["interpret"],
    "c interpret: #causal layer: nil config: (Dictionary new at: #'eval_data' put: #('Hi'); yourself)": ["interpret"],
    "c interpretFile: 'README.md' asFileReference analysis: 'feature'": ["interpret_upload"],
    "c interpretFile: 'README.md' asFileReference analysis: 'feature' layer: #layer1 config: "
    "(Dictionary new at: 'n_components' put: 2; yourself)": ["interpret_upload"],
    "c interpretInBackground: 'sae' layer: 2 config: Dictionary new": ["interpret"],
    "c interpretLayers": ["interpret_layers"],
    "c job: 'job-1'": ["get_job"],
    "c jobs": ["list_jobs"],
    "c listModels": ["list_models"],
    "c loadModel: 'neuroscope-tiny'": ["load_model"],
    "c loadModel: 'neuroscope-tiny' id: 'org/tiny'": ["load_model"],
    "c loadModelInBackground: 'neuroscope-tiny'": ["load_model"],
    "c logitLens: 'Hi'": ["logit_lens"],
    f"c logitLens: {MESSAGES} options: (Dictionary new at: 'position' put: 0; yourself)": ["logit_lens"],
    "c logitLens: #(1 2) topK: 3": ["logit_lens"],
    "c logitLens: 'Hi' components: #('attn_out' 'heads')": ["logit_lens"],
    "c logitLens: 'Hi' tokens: (Array with: #(1 2))": ["logit_lens"],
    "c modelId": [],
    "m modelId": ["list_models"],
    "c modelId: 'org/tiny'": [],
    "c modelInfo": ["get_model"],
    "c modelInfo: 'other'": ["get_model"],
    f"c pathPatching: {EXAMPLES} receivers: #('logits') options: {SENDERS}": ["path_patching"],
    f"c registerHooks: {HOOKS}": ["register_hooks"],
    "c registeredHooks": ["list_hooks"],
    "c printString": [],
    "c removeHook: 'mine/mlp'": ["remove_hook"],
    "c selfTest": ["selftest"],
    "c selfTestInBackground": ["selftest"],
    "c storedTraits": ["stored_traits"],
    "c storedTraits: 'moods'": ["stored_traits"],
    "c stream: 'Hi' do: [ :text :event | ]": ["chat"],
    f"c stream: {MESSAGES} options: {PLAIN} do: [ :text :event | ]": ["chat"],
    f"c streamCompletionOf: 'Hi' options: {PLAIN} do: [ :text :event | ]": ["complete"],
    f"c streamCompletionOf: 'Hi' withActivations: {HOOKS} options: {OPTIONS} do: [ :text :event | ]": [
        "complete_with_activations"
    ],
    f"c streamWithActivations: 'Hi' hooks: {HOOKS} options: {OPTIONS} do: [ :text :event | ]": [
        "chat_with_activations"
    ],
    "c textFrom: (STONJSON fromString: '{\"choices\": []}')": [],
    "c timeout": [],
    "c timeout: 30": [],
    "c tokenize: 'Hi'": ["tokenize"],
    f"c tokenize: {MESSAGES}": ["tokenize"],
    "c traitVector: 'polite' layer: 1 numbers: #(1 2)": [],
    f"c traits: 'Hi' options: {STORED}": ["traits"],
    f"c traits: {MESSAGES} options: {STORED} do: [ :text :event | ]": ["traits"],
    f"c traits: 'Hi' vectors: {VECTORS} maxTokens: 0": ["traits"],
    f"c traits: #(1 2) vectors: {VECTORS} maxTokens: 3 do: [ :text :event | ]": ["traits"],
    "c unloadModel: 'org/tiny'": ["unload_model"],
    # LMStudioCapture
    "k about": ["get_capture"],
    "k activations": ["get_activations"],
    "k activationsOf: 'mine/z'": ["get_hook_activations"],
    "k arrays": ["get_capture"],
    "k delete": ["delete_capture"],
    "(k dtype: 'float16') activations": ["get_activations"],
    "(k heads: #(0 2)) activations": ["get_activations"],
    "k hookIds": ["get_capture"],
    "(k hookPoint: 'blocks.*.attn.hook_z') activations": ["get_activations"],
    "k hooks": ["get_capture"],
    "k id": [],
    "k interventions": ["get_capture"],
    "(k layers: '1:3') activations": ["get_activations"],
    "k model": ["get_capture"],
    "(k positions: 'last') activations": ["get_activations"],
    "k printString": [],
    "(k reduce: 'norm') activations": ["get_activations"],
    "k tensors": ["get_activations"],
    "k tensorsOf: 'mine/z'": ["get_hook_activations"],
    "k tokens": ["get_capture"],
    # LMStudioJob
    "j cancel": ["cancel_job"],
    "j failure": [],
    "j fraction": [],
    "j id": [],
    "j isCancelling": [],
    "j isFinished": [],
    "j kind": [],
    "j message": [],
    "j model": [],
    "j printString": [],
    "j refresh": ["get_job"],
    "j result": [],
    "j status": [],
    "j wait": ["get_job"],
    "j waitDo: [ :job | ]": ["get_job"],
}
SET_UP = (
    "c := {client}. c modelId: 'org/tiny'. m := {client}. k := c capture: 'cap-1'."
    "j := LMStudioJob connection: (LMStudioConnection baseUrl: c baseUrl)"
    "   about: (Dictionary new at: 'id' put: 'job-1'; at: 'status' put: 'running'; at: 'kind' put: 'load';"
    "   at: 'message' put: ''; at: 'model' put: nil; yourself). {send}"
)


@pytest.fixture(scope="module")
def app():
    return create_app(ModelWorker(), ServerConfig())


@pytest.fixture(scope="module")
def document(app):
    return app.test_client().get("/openapi.json").json


# -- which operation a request is ----------------------------------------------------------------


def operations(document):
    """Operation id -> (method, path, what the description says)."""
    return {
        operation["operationId"]: (method.upper(), path, operation)
        for path, found in document["paths"].items()
        for method, operation in found.items()
        if method != "parameters"
    }


def operation_of(request, document):
    """The id of the operation that a request is, or why it is none: its body and query must fit, too."""
    path = urlsplit(request.path).path
    for name, (method, template, operation) in operations(document).items():
        if method == request.method and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
            return misfit(request, operation, document) or name
    return f"{request.method} {request.path} is no operation"


def misfit(request, operation, document):
    """What of a request is not as described, or None."""
    content = operation.get("requestBody", {}).get("content", {})
    kind, sent = ("multipart/form-data", request.form) if request.form else ("application/json", request.json)
    body = content.get(kind, {}).get("schema")
    if (not content) != (sent is None) or (content and body is None):
        return f"{request.path}: {' or '.join(content) or 'no'} body is wanted"
    components = {"components": document["components"]}
    if body is not None:
        try:
            jsonschema_rs.validate(body | components, sent)
        except jsonschema_rs.ValidationError as error:
            return f"{request.path}: {error.message}"
    known = {each["name"]: each["schema"] for each in operation.get("parameters", []) if each["in"] == "query"}
    for name, value in parse_qsl(urlsplit(request.path).query, keep_blank_values=True):
        if name not in known or not jsonschema_rs.is_valid(known[name] | components, value):
            return f"{request.path}: {name}={value} is no parameter of it"
    return None


# -- what the selectors ask for ------------------------------------------------------------------


ANYTHING = {
    "id": "job-1", "status": "completed", "kind": "load", "message": "", "model": "a", "model_id": "org/tiny",
    "result": {}, "text": "", "tokens": [], "arrays": [], "hook_ids": [], "hooks": [], "interventions": [],
    "hook_points": [], "registered_hooks": [], "has_more": False, "data": [{"id": "job-1"}], "choices": [],
    "activations": {"mine/z": [], "pattern": []}, "experiments": [{"name": "moods", "traits": []}],
}  # fmt: skip
EVENTS = 'data: {"choices": [], "text": ""}\n\ndata: [DONE]\n\n'


class Anything(dict):
    """Answers every route, with all that a reply may have, or with a stream of events."""

    def __init__(self):
        super().__init__()
        self.requests = []

    def get(self, route, default=None):
        request = self.requests[-1]
        if route.split("?")[0] == "GET /v1/activations/hooks":
            return {"hooks": []}
        return (200, EVENTS) if (request.json or {}).get("stream") else ANYTHING


def requests_of(image, sends):
    """Send -> the requests that it makes."""
    found = {}
    with canned_server(Anything()) as server:
        server.replies.requests = server.requests
        for send in sends:
            server.requests.clear()
            image.evaluate(SET_UP.format(client=client(server), send=send + ". nil"))
            found[send] = list(server.requests)
    return found


@pytest.fixture(scope="module")
def made(image):
    return requests_of(image, SENDS)


def selector_of(send):
    """`LMStudioCapture heads:` of `(k heads: #(0 2)) activations`: the first message to the receiver."""
    receiver, rest = re.fullmatch(r"\(?([cmkj]) (.*)", send, re.DOTALL).groups()
    owner = {"c": "LMStudioRESTClient", "m": "LMStudioRESTClient", "k": "LMStudioCapture", "j": "LMStudioJob"}[receiver]
    if send.startswith("("):
        rest = rest[: closing(rest, 1)]
    return owner, "".join(keywords(rest)) or rest.split()[0]


def closing(text, depth):
    """Where the bracket that is open ends."""
    for found in re.finditer(r"'[^']*'|[(\[{]|[)\]}]", text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    raise ValueError(text)


def keywords(text):
    """The keywords of the outermost message."""
    found, depth = [], 0
    for token in re.finditer(r"'[^']*'|[(\[{]|[)\]}]|:?\w+:?", text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token[0], 0)
        if depth == 0 and re.fullmatch(r"[a-z]\w*:", token[0]):
            found.append(token[0])
    return found


def public_selectors():
    """Of instances: what stands in no private protocol and sets nothing up."""
    return {
        (cls.name, signature(method.source.split("\n")[0]))
        for cls in read_package("NeuroScope-Core")
        if cls.name in CLASSES
        for method in cls.methods
        if not method.class_side and not method.category.startswith(("private", "initialization"))
    }


def signature(header):
    return "".join(re.findall(r"\w+:", header)) or header.strip()


# -- both ways -----------------------------------------------------------------------------------


def test_the_table_has_every_public_selector():
    told = {selector_of(send) for send in SENDS}
    told = {(owner, "printOn:" if selector == "printString" else selector) for owner, selector in told}
    assert told == public_selectors()


def test_every_selector_asks_for_operations_that_there_are(made, document):
    for send, requests in made.items():
        if selector_of(send)[1] in BESIDES:
            assert [request.path for request in requests] == [BESIDES[selector_of(send)[1]]]
            continue
        assert (send, [operation_of(request, document) for request in requests]) == (send, SENDS[send])


def test_every_operation_has_a_selector(made, document):
    assert set(operations(document)) == {operation for reached in SENDS.values() for operation in reached}


def test_what_is_not_described_is_known(app, document):
    """The server's addresses are those of its description, those of BESIDES, and the excepted ones."""
    described = {re.sub(r"\{\w+\}", "{}", path) for path in document["paths"]}
    served = {re.sub(r"<[^>]+>", "{}", rule.rule) for rule in app.url_map.iter_rules() if rule.endpoint != "static"}
    others = {path for path in served - described if not any(path.startswith(page) for page in WITHOUT_SELECTOR)}
    assert others == set(BESIDES.values())


def test_ids_with_slashes_are_one_segment(made):
    (request,) = made["c removeHook: 'mine/mlp'"]
    path, _, query = request.path.partition("?")
    assert (unquote(path), unquote(query)) == ("/v1/activations/hooks/mine/mlp", "model=org/tiny")
    assert path.count("/") == 4


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda d: d["paths"].pop("/v1/tokenize"), "POST /v1/tokenize is no operation"),
        (lambda d: d["components"]["schemas"]["TokenizeRequest"].update(required=["words"]), '"words" is a required'),
        (lambda d: d["paths"]["/v1/tokenize"]["post"].pop("requestBody"), "/v1/tokenize: no body is wanted"),
    ],
)
def test_the_check_notices_a_route_that_changed(made, document, break_it, complaint):
    document = copy.deepcopy(document)
    break_it(document)
    (request,) = made["c tokenize: 'Hi'"]
    assert complaint in operation_of(request, document)


def test_the_check_notices_a_query_that_changed(made, document):
    (request,) = made["(k positions: 'last') activations"]
    document = copy.deepcopy(document)
    parameters = document["paths"]["/v1/captures/{capture_id}/activations"]["get"]["parameters"]
    (positions,) = (each for each in parameters if each["name"] == "positions")
    positions["schema"] = {"enum": ["first"]}
    assert "positions=last is no parameter" in operation_of(request, document)


def test_the_check_notices_a_selector_without_operation(image, document):
    """A method is added to the image that asks for what no server has."""
    source = "frobnicate ^ connection post: #( 'v1' 'frobnicate' ) data: Dictionary new"
    image.evaluate(f"Compiler new install: {literal(source)} forClass: LMStudioRESTClient protocol: 'test'. nil")
    (requests,) = requests_of(image, ["c frobnicate"]).values()
    assert [operation_of(request, document) for request in requests] == ["POST /v1/frobnicate is no operation"]
