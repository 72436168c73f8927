"""While an analysis of circuits or heads runs, others have a turn after each pass: none is longer than is allowed, and
none is made that is not told."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from api_server import circuits, heads
from api_server.schemas.circuits import (
    AblationRequest,
    CircuitRequest,
    EdgesRequest,
    PatchingRequest,
    PathPatchingRequest,
)
from api_server.schemas.heads import AttentionRequest, CompositionRequest, HeadsRequest
from mlx_hooks import HookedModel
from mlx_hooks.analysis import eval_data, patched_runs
from mlx_hooks.analysis.circuit_search import analyse_circuit
from mlx_hooks.analysis.circuits import edge_runs
from mlx_hooks.analysis.circuits.edge_attribution import attribute_edges
from mlx_hooks.analysis.circuits.edge_runs import EdgeRuns
from mlx_hooks.analysis.circuits.graph import graph_of
from mlx_hooks.analysis.circuits.pruning import acdc
from mlx_hooks.analysis.circuits.validation import faithfulness_curve, smallest_circuit
from mlx_hooks.analysis.progress import Part, Passes

LENGTH, AT_ONCE = 6, 72
"""Tokens of a prompt, and of one pass at most."""
DRAW = np.random.default_rng(0)
ROWS = DRAW.integers(0, 60, (10, 2, LENGTH)).tolist()
PAIRS = [
    {"clean": clean, "corrupted": corrupted, "answer": i, "wrong": 50 - i} for i, (clean, corrupted) in enumerate(ROWS)
]
SENTENCES = [{name: pair[name] for name in ("clean", "answer")} for pair in PAIRS]
OPERATIONS: list[tuple[Callable[..., Any], type, dict[str, Any]]] = [
    (circuits.ablation, AblationRequest, {"mean_over": "position"}),
    (circuits.ablation, AblationRequest, {"eval_data": SENTENCES, "ablations": ["resample", "mean"]}),
    *(
        (circuits.ablation, AblationRequest, {"groups": [["L1H1"], ["L0 mlp"]], "ablations": [which], "metric": "kl"})
        for which in ("zero", "mean", "resample")
    ),
    (circuits.ablation, AblationRequest, {"groups": [["L1H1"]], "ablations": ["zero", "mean"]}),
    (circuits.patching, PatchingRequest, {}),
    (circuits.patching, PatchingRequest, {"sweep": "layer x head", "metric": "kl", "direction": "noising"}),
    (circuits.patching, PatchingRequest, {"sweep": "layer x head x position", "component": "pattern"}),
    (circuits.patching, PatchingRequest, {"sweep": "component"}),
    (circuits.patching, PatchingRequest, {"method": "attribution"}),
    (circuits.patching, PatchingRequest, {"method": "attribution", "metric": "kl"}),
    (circuits.patching, PatchingRequest, {"groups": [["L1H1"], ["L0 mlp"]]}),
    (circuits.path_patching, PathPatchingRequest, {"receivers": ["L2 mlp", "logits"], "direction": "denoising"}),
    (circuits.path_patching, PathPatchingRequest, {"receivers": ["logits"], "metric": "kl"}),
    *(
        (circuits.edges, EdgesRequest, {"method": method, "ablation": ablation})
        for method in ("eap", "eap-ig", "exact")
        for ablation in ("corrupted", "mean", "resample", "zero")
    ),
    (circuits.edges, EdgesRequest, {"method": "eap-ig", "metric": "kl", "steps": 13}),
    (circuits.edges, EdgesRequest, {"method": "exact", "metric": "kl"}),
    (circuits.circuit, CircuitRequest, {"metric": "kl", "random_circuits": 40}),
    (circuits.circuit, CircuitRequest, {"method": "exact", "size": 60, "ablation": "mean", "judge_by": PAIRS[::-1]}),
    (circuits.circuit, CircuitRequest, {"method": "acdc", "threshold": 0.05, "ablation": "zero"}),
    (heads.heads, HeadsRequest, {"prompts": [pair["clean"] for pair in PAIRS]}),
    (heads.heads, HeadsRequest, {"sequences": 20, "length": LENGTH}),
    (heads.attention, AttentionRequest, {"prompt": ROWS[0][0]}),
    (heads.composition, CompositionRequest, {}),
]


class Turns:
    """What a model reads between two reports, [tokens of each pass] by turn; and all that was reported."""

    def __init__(self, model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[list[int]] = [[]]
        self.told: list[tuple[int, int]] = []
        kind = type(model.model)
        own = kind.__call__

        def counted(module: Any, tokens: mx.array, *args: Any, **kwargs: Any) -> Any:
            self.passes[-1].append(tokens.size)
            return own(module, tokens, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", counted)

    def __call__(self, done: int, total: int) -> None:
        self.told.append((done, total))
        self.passes.append([])

    def check(self) -> None:
        done = [each for each, _ in self.told]
        assert done == sorted(done)
        assert all(each <= total for each, total in self.told)
        assert self.told[-1][0] == self.told[-1][1]
        # A gradient begins with a pass that is built and not computed.
        assert max(map(len, self.passes)) <= 2, self.passes
        assert max(map(sum, self.passes)) <= AT_ONCE, self.passes

    def without_probes(self) -> None:
        """Leave out the few short rows with which weights are read: they do not grow with what is asked."""
        self.passes = [[n for n in turn if n >= len(ROWS) * LENGTH] for turn in self.passes]


@pytest.fixture
def turns(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> Turns:
    monkeypatch.setattr(eval_data, "TOKENS_AT_ONCE", AT_ONCE)
    monkeypatch.setattr(patched_runs, "_ENOUGH", AT_ONCE // 2)
    graph = graph_of(llama)
    for module in (edge_runs, circuits):
        monkeypatch.setattr(module, "graph_of", lambda model: graph)
    return Turns(llama, monkeypatch)


@pytest.mark.parametrize(
    ("operation", "request_of", "body"),
    OPERATIONS,
    ids=[f"{i} {operation.__name__}" for i, (operation, _, _) in enumerate(OPERATIONS)],
)
def test_others_have_a_turn_after_each_pass(
    turns: Turns, llama: HookedModel, operation: Callable[..., Any], request_of: type, body: dict[str, Any]
) -> None:
    if operation.__module__ == circuits.__name__:
        body = {"eval_data": PAIRS} | body
    batch = {"batch_size": 64} if "batch_size" in request_of.model_fields else {}  # type: ignore[attr-defined]
    operation(llama, request_of(**body | batch), turns)
    if operation.__module__ == heads.__name__:
        turns.without_probes()
    turns.check()
    shares = [done / total for done, total in turns.told]
    assert shares == sorted(shares)


def test_gradients_are_of_fewer_tokens(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass with its gradients counts for three."""
    monkeypatch.setattr(eval_data, "TOKENS_AT_ONCE", AT_ONCE)
    runs = EdgeRuns(llama, PAIRS)
    assert [len(batch.tokens) for batch in runs.batches] == [4, 4, 2]
    assert runs.sets_at_once(runs.batches[0]) == 3
    assert [len(batch.tokens) for batch in runs.data.batches(64)] == [10]


def test_searches_tell_of_each_pass(turns: Turns, llama: HookedModel) -> None:
    analyse_circuit(llama, PAIRS, {"components": ["mlp_out", "attn_out"], "batch_size": 64}, turns)
    assert max(map(len, turns.passes)) == 1
    assert turns.told[-1][0] == turns.told[-1][1]


def test_sweeps_over_sizes_count_on(turns: Turns, llama: HookedModel) -> None:
    runs = EdgeRuns(llama, PAIRS)
    scores = attribute_edges(runs, options={"method": "random"})
    smallest_circuit(runs, scores, progress=turns)
    turns.check()
    turns.told.clear()
    faithfulness_curve(runs, scores, [5, 50], progress=turns)
    assert turns.told == [(i + 1, len(turns.told)) for i in range(len(turns.told))]
    turns.check()
    acdc(runs, 0.5, progress=turns)
    assert max(map(len, turns.passes)) == 1


def test_parts_are_shares_of_the_whole() -> None:
    told: list[tuple[int, int]] = []
    for i in range(2):
        part = Part(lambda *at: told.append(at), i, 2)
        for done, total in ((1, 4), (4, 4), (2, 4)):
            part(done, total)
    assert told == [(125, 1000), (500, 1000), (500, 1000), (625, 1000), (1000, 1000), (1000, 1000)]
    Part(None, 0, 1)(1, 2)


def test_passes_that_are_not_needed_are_taken_back() -> None:
    told: list[tuple[int, int]] = []
    passes = Passes(lambda *at: told.append(at), 4)
    passes.passed()
    passes.expect(-2)
    passes.tell()
    passes.passed(2)
    assert told == [(1, 4), (1, 2), (3, 3)]
    Passes().passed()
