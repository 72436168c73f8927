"""NeuroScope's engine: hook any mlx-lm model, capture and edit what it computes, exactly.

from mlx_hooks import HookedModel
model = HookedModel.from_pretrained("neuroscope-tiny")
logits, cache = model.run_with_cache("The capital of France is")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .activations import ActivationCache, CapturedActivation
from .analysis.attribution import Attribution, attribution_points, direct_logit_attribution
from .analysis.logit_lens import LogitLens
from .analysis.sae.autoencoder import SparseAutoencoder
from .analysis.sae.training import train_sae
from .analysis.traits.capture import capture_all_layers
from .analysis.traits.dynamics import TraitDynamics, trait_dynamics
from .analysis.traits.experiment import Experiment
from .analysis.traits.extraction import extract_vectors
from .analysis.traits.internals import capture_single_layer
from .analysis.traits.monitoring import monitor_dynamics
from .analysis.traits.prompts import Chat
from .analysis.traits.records import read_record
from .analysis.traits.steering import Steering, steer
from .analysis.traits.vectors import TraitVector
from .analysis.traits.verify import verify_format
from .analysis.traits.watching import watch_traits
from .analysis.tuned_lens import TunedLens
from .architectures import ModelConfig
from .capture import CaptureEstimate
from .errors import (
    CaptureWarning,
    FailedAnalysisWarning,
    HookError,
    ModelLoadError,
    ObserverError,
    ObserverWarning,
    UnknownHookError,
    UnknownVectorError,
    UnreadableRunWarning,
    UnreadableShardWarning,
    UnsupportedModelError,
    UntrustedHookWarning,
    UploadWarning,
)
from .extraction import ExtractionConfig
from .generation import GenerationResult, GenerationStep
from .hook_points import HookPoint
from .inference import run_generation
from .interventions import Intervention, InterventionReceipt
from .manager import ActivationHookManager, HookSpec
from .model import HookedModel, load_model
from .observers import (
    ActivationHook,
    AttentionExtractionHook,
    InferenceHook,
    LayerAttention,
    SymbolicStreamHook,
    create_attention_extraction_hook,
)
from .reductions import Projection
from .sampling import TokenLogprobs
from .selftest import Check, SelfTest
from .storage.query import QueryResult, SavedRun
from .storage.runs import ActivationLoader, ActivationSaver
from .storage.shards import ShardReader
from .training.config import MechIntConfig
from .training.hooks import MechIntHooks
from .training.sampler import ActivationSampler

if TYPE_CHECKING:
    from .analysis.attention_analysis import analyse_attention
    from .analysis.circuits import (
        Circuit,
        EdgeRuns,
        EdgeScores,
        acdc,
        activation_patching,
        attribute_edges,
        find_circuit,
        smallest_circuit,
        validate_circuit,
    )
    from .analysis.circuits.ablation_study import ablation_study
    from .analysis.circuits.attribution_patching import attribution_patching
    from .analysis.circuits.path_patching import path_patching
    from .analysis.composition import composition_scores, copying_scores
    from .analysis.head_detection import detect_heads
    from .training.callback import MechIntCallback
    from .training.evaluation import EvalMechIntRunner

__version__ = "0.1.0"

__all__ = [
    "ActivationCache",
    "ActivationHook",
    "ActivationHookManager",
    "ActivationLoader",
    "ActivationSampler",
    "ActivationSaver",
    "AttentionExtractionHook",
    "Attribution",
    "CaptureEstimate",
    "CaptureWarning",
    "CapturedActivation",
    "Chat",
    "Check",
    "Circuit",
    "EdgeRuns",
    "EdgeScores",
    "EvalMechIntRunner",
    "Experiment",
    "ExtractionConfig",
    "FailedAnalysisWarning",
    "GenerationResult",
    "GenerationStep",
    "HookError",
    "HookPoint",
    "HookSpec",
    "HookedModel",
    "InferenceHook",
    "Intervention",
    "InterventionReceipt",
    "LayerAttention",
    "LogitLens",
    "MechIntCallback",
    "MechIntConfig",
    "MechIntHooks",
    "ModelConfig",
    "ModelLoadError",
    "ObserverError",
    "ObserverWarning",
    "Projection",
    "QueryResult",
    "SavedRun",
    "SelfTest",
    "ShardReader",
    "SparseAutoencoder",
    "Steering",
    "SymbolicStreamHook",
    "TokenLogprobs",
    "TraitDynamics",
    "TraitVector",
    "TunedLens",
    "UnknownHookError",
    "UnknownVectorError",
    "UnreadableRunWarning",
    "UnreadableShardWarning",
    "UnsupportedModelError",
    "UntrustedHookWarning",
    "UploadWarning",
    "ablation_study",
    "acdc",
    "activation_patching",
    "analyse_attention",
    "attribute_edges",
    "attribution_patching",
    "attribution_points",
    "capture_all_layers",
    "capture_single_layer",
    "composition_scores",
    "copying_scores",
    "create_attention_extraction_hook",
    "detect_heads",
    "direct_logit_attribution",
    "extract_vectors",
    "find_circuit",
    "load_model",
    "monitor_dynamics",
    "path_patching",
    "read_record",
    "run_generation",
    "smallest_circuit",
    "steer",
    "train_sae",
    "trait_dynamics",
    "validate_circuit",
    "verify_format",
    "watch_traits",
]

_WHEN_USED = {
    "EvalMechIntRunner": "training.evaluation",
    "MechIntCallback": "training.callback",
    "analyse_attention": "analysis.attention_analysis",
    "composition_scores": "analysis.composition",
    "copying_scores": "analysis.composition",
    "detect_heads": "analysis.head_detection",
} | dict.fromkeys(
    (
        "Circuit",
        "EdgeRuns",
        "EdgeScores",
        "ablation_study",
        "acdc",
        "activation_patching",
        "attribute_edges",
        "attribution_patching",
        "find_circuit",
        "path_patching",
        "smallest_circuit",
        "validate_circuit",
    ),
    "analysis.circuits",
)
"""Where what is imported when it is first used lives: what comes with it takes a while to import."""


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _WHEN_USED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(import_module(f".{_WHEN_USED[name]}", __name__), name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
