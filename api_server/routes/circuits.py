"""Causal analyses of a loaded model on clean and corrupted prompts: jobs with progress."""

from flask import Blueprint, Response

from .. import circuits
from ..description import described
from ..schemas.circuits import (
    AblationReply,
    AblationRequest,
    CircuitReply,
    CircuitRequest,
    EdgesReply,
    EdgesRequest,
    PatchingReply,
    PatchingRequest,
    PathPatchingRequest,
)
from ..schemas.replies import JobReply
from ..transport import answer_of_model, read

blueprint = Blueprint("circuits", __name__, url_prefix="/v1/analysis")

_PAIR = {
    "clean": "The capital of France is",
    "corrupted": "The capital of Italy is",
    "answer": "Paris",
    "wrong": "Rome",
}


@blueprint.post("/ablation")
@described(
    AblationRequest,
    replies={200: AblationReply, 202: JobReply},
    tags=["Circuits"],
    errors=(404,),
    job=True,
    example={"eval_data": [_PAIR], "groups": [["L2H1"], ["L2H1", "L3 mlp"]]},
)
def ablation() -> Response:
    """What the model loses without each component, or without groups of them: zero, mean and resample ablation."""
    return answer_of_model(read(AblationRequest), "ablation", circuits.ablation)


@blueprint.post("/patching")
@described(
    PatchingRequest,
    replies={200: PatchingReply, 202: JobReply},
    tags=["Circuits"],
    errors=(404,),
    job=True,
    example={"eval_data": [_PAIR], "sweep": "layer x head"},
)
def patching() -> Response:
    """What activations of the clean run bring back in the corrupted one, place by place, or the other way round."""
    return answer_of_model(read(PatchingRequest), "patching", circuits.patching)


@blueprint.post("/path_patching")
@described(
    PathPatchingRequest,
    replies={200: PatchingReply, 202: JobReply},
    tags=["Circuits"],
    errors=(404,),
    job=True,
    example={"eval_data": [_PAIR], "receivers": ["L3H0<q>", "logits"], "senders": ["L2H1"]},
)
def path_patching() -> Response:
    """What one part of the model tells another directly: the receiver alone reads the other run's part of a sender."""
    return answer_of_model(read(PathPatchingRequest), "path_patching", circuits.path_patching)


@blueprint.post("/edges")
@described(
    EdgesRequest,
    replies={200: EdgesReply, 202: JobReply},
    tags=["Circuits"],
    errors=(404,),
    job=True,
    example={"eval_data": [_PAIR], "method": "eap-ig", "top": 10},
)
def edges() -> Response:
    """How much each edge between components matters, by gradients (EAP, EAP-IG) or exactly."""
    return answer_of_model(read(EdgesRequest), "edges", circuits.edges)


@blueprint.post("/circuit")
@described(
    CircuitRequest,
    replies={200: CircuitReply, 202: JobReply},
    tags=["Circuits"],
    errors=(404,),
    job=True,
    example={"eval_data": [_PAIR], "size": 20},
)
def circuit() -> Response:
    """Find the circuit that some prompts need, judge it, and write it in other programs' formats."""
    return answer_of_model(read(CircuitRequest), "circuit", circuits.circuit)
