"""Circuits: what is patched and measured, along which edges, and what is left when the rest is taken away."""

from .ablation_study import AblationStudy, EdgeAblations, ablate_edges, ablation_study
from .attribution_patching import attribution_patching
from .circuit import Circuit
from .drawing import save_picture
from .edge_attribution import EdgeOptions, EdgeScores, attribute_edges
from .edge_runs import EdgeRuns
from .evaluation import chance_auc, edge_auc, permuted_auc
from .finding import FindOptions, find_circuit
from .gradients import Gradients, gradients
from .graph import graph_of
from .graphml import save_graphml
from .metrics import METRICS, Metric, metric_of
from .model_graph import Edge, Input, ModelGraph, Node
from .neuronpedia import save_neuronpedia, to_neuronpedia
from .patching import PatchingOptions, PatchingResult, activation_patching, draw_patching
from .path_patching import PathOptions, path_patching
from .pharo import to_neuroscope
from .pruning import AcdcOptions, AcdcResult, acdc, acdc_sweep
from .validation import (
    CircuitValidation,
    FaithfulnessCurve,
    SmallestCircuit,
    ValidationOptions,
    faithfulness_curve,
    smallest_circuit,
    validate_circuit,
)

__all__ = [
    "METRICS",
    "AblationStudy",
    "AcdcOptions",
    "AcdcResult",
    "Circuit",
    "CircuitValidation",
    "Edge",
    "EdgeAblations",
    "EdgeOptions",
    "EdgeRuns",
    "EdgeScores",
    "FaithfulnessCurve",
    "FindOptions",
    "Gradients",
    "Input",
    "Metric",
    "ModelGraph",
    "Node",
    "PatchingOptions",
    "PatchingResult",
    "PathOptions",
    "SmallestCircuit",
    "ValidationOptions",
    "ablate_edges",
    "ablation_study",
    "acdc",
    "acdc_sweep",
    "activation_patching",
    "attribute_edges",
    "attribution_patching",
    "chance_auc",
    "draw_patching",
    "edge_auc",
    "faithfulness_curve",
    "find_circuit",
    "gradients",
    "graph_of",
    "metric_of",
    "path_patching",
    "permuted_auc",
    "save_graphml",
    "save_neuronpedia",
    "save_picture",
    "smallest_circuit",
    "to_neuronpedia",
    "to_neuroscope",
    "validate_circuit",
]
