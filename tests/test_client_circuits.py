"""The client's causal analyses, against a real server, and the circuits that the bridge makes of them."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from neuroscope_bridge import LMStudioNeuroScopeClient, NeuroScopeActivationBridge
from neuroscope_bridge.errors import PayloadError

TEXT = "When {} and {} went to the store , {} gave a drink to"
PAIRS = [
    {"clean": TEXT.format(a, b, b), "corrupted": TEXT.format(a, b, a), "answer": a, "wrong": b}
    for a, b in (("Mary", "John"), ("Tom", "Mary"))
]


@pytest.fixture
def client(live_server: SimpleNamespace) -> Iterator[LMStudioNeuroScopeClient]:
    with LMStudioNeuroScopeClient(live_server.base_url) as client:
        yield client


def test_components_are_ablated_and_become_circuits(client: LMStudioNeuroScopeClient) -> None:
    found = client.ablation(PAIRS, components=["heads", "mlp_out"], ablations=["zero"], resamples=100)
    circuits = NeuroScopeActivationBridge.find_causal_circuits(found)
    assert len(circuits) == 4 * 4 + 4
    assert [one["confidence"] for one in circuits] == sorted((one["confidence"] for one in circuits), reverse=True)
    plain = found["plain"]["logit_difference"]["mean"]
    (mlp,) = (one for one in circuits if one["name"] == "mlp L2 (zero ablation)")
    (change,) = (one for one in found["components"] if one["component"] == "L2 mlp")
    effect = change["ablations"]["zero"]["logit_difference_change"]["mean"]
    assert mlp["confidence"] == pytest.approx(min(1, abs(effect / plain)))
    assert mlp["components"] == [{"layer": 2, "componentType": "mlp", "index": None}]
    assert mlp["description"].startswith("Causal: zero ablation of mlp L2 changes the logit difference from")
    head = next(one for one in circuits if one["name"] == "attention_head L2H1 (zero ablation)")
    assert head["components"] == [{"layer": 2, "componentType": "attention_head", "index": 1}]


@pytest.mark.parametrize(
    ("plain", "effects", "confidences"),
    [
        (0.0, [1.0, 0.25], [1.0, 0.25]),
        # More than there was is not all the same.
        (0.01, [0.02, 10.0], [0.002, 1.0]),
        (4.0, [1.0, -2.0], [0.25, 0.5]),
        (0.0, [0.0, 0.0], [0.0, 0.0]),
        (0.0, [None, 3.0], [None, 1.0]),
        (0.0, [None, None], [None, None]),
    ],
)
def test_effects_on_a_loss_are_compared_with_the_largest_where_there_is_little(
    plain: float, effects: list[float | None], confidences: list[float | None]
) -> None:
    components = [
        {"layer": i, "part": "blocks", "head": None, "ablations": {"mean": {"loss_change": {"mean": effect, "n": 2}}}}
        for i, effect in enumerate(effects)
    ]
    circuits = NeuroScopeActivationBridge.find_causal_circuits(
        {"plain": {"loss": {"mean": plain}}, "components": components}
    )
    told = {one["name"]: one["confidence"] for one in circuits}
    wanted = {f"block L{i} (mean ablation)": one for i, one in enumerate(confidences) if one is not None}
    assert told == pytest.approx(wanted)


def test_groups_and_places_are_patched(client: LMStudioNeuroScopeClient) -> None:
    tokens = [np.array(client.tokenize(PAIRS[0][name])["tokens"]) for name in ("clean", "corrupted")]
    answer, wrong = (np.int64(client.tokenize(PAIRS[0][name])["tokens"][-1]) for name in ("answer", "wrong"))
    by_id = {"clean": tokens[0], "corrupted": tokens[1], "answer": answer, "wrong": wrong}
    cells = [{"hook_point": "blocks.2.attn.hook_z", "heads": 1}]
    found = client.activation_patching([by_id], cells=cells)
    by_name = client.activation_patching(PAIRS[:1], groups=[["L2H1"]])
    assert found["patched"] == pytest.approx(by_name["groups"]["groups"][0]["values"], abs=1e-4)
    noised = client.activation_patching(PAIRS, "component", direction="noising", components=["mlp_out"])
    assert (noised["effect"], len(noised["effects"])) == ("damage", 4)
    paths = client.path_patching(PAIRS, ["L3H0<q>", ("logits",)], senders=["L2H1"])
    assert np.array(paths["effects"]).shape == (1, 2)
    ablated = client.ablation(PAIRS, groups=[["L2H1"]], metric="logit")
    assert len(ablated["groups"]["zero"]["groups"][0]["values"]) == 2


def test_a_circuit_is_found_and_judged_by_others(client: LMStudioNeuroScopeClient) -> None:
    job = client.find_circuit(PAIRS[:1], size=30, judge_by=PAIRS[1:], random_circuits=0, background=True)
    found = client.wait_for_job(job["id"], interval=0.02)
    (circuit,) = NeuroScopeActivationBridge.find_causal_circuits(found)
    assert circuit == found["neuroscope_circuit"]
    assert circuit["description"].startswith("Causal: ")
    edges = client.edge_scores(PAIRS[:1], top=3)["edges"]
    assert {edge["edge"] for edge in edges} <= {edge["edge"] for edge in found["circuit"]["edges"]}


def test_heads_are_analysed(client: LMStudioNeuroScopeClient) -> None:
    tokens = client.tokenize(PAIRS[0]["clean"])["tokens"]
    found = client.analyse_attention(np.array(tokens), layers=[1], top_k=1)
    assert [head["layer"] for head in found["attention_heads"]] == [1] * 4
    assert client.detect_heads([tokens, PAIRS[1]["clean"]], copying=False)["sequences"] == 2
    job = client.composition(top=2, background=True)
    assert len(client.wait_for_job(job["id"], interval=0.02)["strongest"]) == 2


@pytest.mark.parametrize("prompt", ["text", {"clean": [1.5], "answer": 1}, {"clean": "Mary", "answer": 1.5}])
def test_prompts_that_are_none_are_refused_before_they_are_sent(client: LMStudioNeuroScopeClient, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"A prompt is a mapping|must be whole numbers"):
        client.ablation([prompt])


def test_ablated_groups_become_circuits(client: LMStudioNeuroScopeClient) -> None:
    groups = [["L2H1", "L3 mlp"], ["L0"], ["L1 resid"], ["L2 attn"]]
    found = client.ablation(PAIRS, groups=groups, ablations=["zero", "resample"], metric="logit_difference")
    circuits = NeuroScopeActivationBridge.find_causal_circuits(found)
    assert len(circuits) == 8
    one = next(each for each in circuits if each["name"] == "L2H1 + L3 mlp (zero ablation)")
    effects = found["groups"]["zero"]
    plain, after = np.mean(effects["plain"]), np.mean(effects["groups"][0]["values"])
    assert one["confidence"] == pytest.approx(min(1, abs((after - plain) / plain)))
    assert one["components"] == [
        {"layer": 2, "componentType": "attention_head", "index": 1},
        {"layer": 3, "componentType": "mlp", "index": None},
    ]
    assert one["description"].startswith("Causal: zero ablation of L2H1 + L3 mlp changes the logit difference from")
    kinds = {each["name"]: each["components"][0]["componentType"] for each in circuits}
    assert [kinds[f"{name} (zero ablation)"] for name in ("L0", "L1 resid", "L2 attn")] == [
        *("block", "residual", "attention")
    ]


def test_one_receiver_and_one_sender_need_no_list(client: LMStudioNeuroScopeClient) -> None:
    found = client.path_patching(PAIRS[:1], "logits", senders="L2H1")
    assert found["axes"] == {"sender": ["L2H1"], "receiver": ["logits"]}


@pytest.mark.parametrize("groups", ["L2H1", ["L2H1"], [("L2H1",)]])
def test_a_name_alone_is_a_group(client: LMStudioNeuroScopeClient, groups: Any) -> None:
    for found in (
        client.ablation(PAIRS[:1], groups=groups)["groups"]["zero"],
        client.activation_patching(PAIRS[:1], groups=groups)["groups"],
    ):
        assert [group["components"] for group in found["groups"]] == [["L2H1"]]


def test_divergences_are_told_apart(client: LMStudioNeuroScopeClient) -> None:
    """That of the model as it is is 0: the largest effect is the whole."""
    found = client.ablation(PAIRS, groups=["L0H3", "L2H1", "L3H3"], metric="kl")
    means = {group["components"][0]: group["mean"] for group in found["groups"]["zero"]["groups"]}
    circuits = NeuroScopeActivationBridge.find_causal_circuits(found)
    assert [one["name"].split()[0] for one in circuits] == sorted(means, key=lambda name: -means[name])
    largest = max(means.values())
    assert largest > 1
    for one in circuits:
        assert one["confidence"] == pytest.approx(means[one["name"].split()[0]] / largest, abs=1e-6)


def test_cells_may_stand_where_the_engine_takes_them(client: LMStudioNeuroScopeClient) -> None:
    cells = [{"hook_point": "blocks.2.attn.hook_z", "heads": 1}]
    found = client.activation_patching(PAIRS[:1], cells)
    assert found["effects"] == client.activation_patching(PAIRS[:1], cells=cells)["effects"]
    ranges = client.activation_patching(PAIRS[:1], [{"hook_point": "blocks.2.hook_mlp_out", "positions": range(3)}])
    listed = client.activation_patching(PAIRS[:1], [{"hook_point": "blocks.2.hook_mlp_out", "positions": [0, 1, 2]}])
    assert ranges["effects"] == listed["effects"]
    with pytest.raises(ValueError, match="A cell is a mapping with hook_point, got 'L2H1'"):
        client.activation_patching(PAIRS[:1], ["L2H1"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="Give cells once"):
        client.activation_patching(PAIRS[:1], cells, cells=cells)


@pytest.mark.parametrize(
    "reply",
    [
        {"components": [{"x": 1}], "plain": {}},
        {"components": [3], "plain": {"loss": {"mean": 1.0}}},
        {"components": [], "plain": {"loss": 1.0}},
        {"neuroscope_circuit": 3},
        {"ablations": {}, "groups": {"zero": {"plain": [1.0], "metric": "loss", "groups": [{"components": []}]}}},
        {
            "ablations": {},
            "groups": {
                "zero": {
                    "plain": [1.0],
                    "metric": "loss",
                    "groups": [{"components": ["a head"], "values": [1.0], "mean": 1.0}],
                }
            },
        },
    ],
)
def test_replies_that_lack_what_circuits_have_are_refused(reply: dict[str, Any]) -> None:
    with pytest.raises(PayloadError, match="Causal circuits cannot be read: the reply"):
        NeuroScopeActivationBridge.find_causal_circuits(reply)


@pytest.mark.parametrize("reply", [{}, {"circuit": {}}, {"components": [], "groups": {}}, None, [], "reply"])
def test_replies_without_circuits_are_refused(reply: Any) -> None:
    with pytest.raises(PayloadError, match="Causal circuits are in the reply of find_circuit"):
        NeuroScopeActivationBridge.find_causal_circuits(reply)
