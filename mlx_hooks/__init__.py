"""NeuroScope's engine: hook any mlx-lm model, capture and edit what it computes, exactly.

from mlx_hooks import HookedModel
model = HookedModel.from_pretrained("neuroscope-tiny")
logits, cache = model.run_with_cache("The capital of France is")
"""

from .activations import ActivationCache, CapturedActivation
from .analysis.logit_lens import LogitLens
from .architectures import ModelConfig
from .capture import CaptureEstimate
from .errors import (
    HookError,
    ModelLoadError,
    UnknownHookError,
    UnreadableRunWarning,
    UnsupportedModelError,
    UntrustedHookWarning,
)
from .extraction import ExtractionConfig
from .generation import GenerationResult, GenerationStep
from .hook_points import HookPoint
from .interventions import Intervention, InterventionReceipt
from .manager import ActivationHookManager, HookSpec
from .model import HookedModel, load_model
from .sampling import TokenLogprobs
from .selftest import Check, SelfTest
from .storage.query import QueryResult, SavedRun
from .storage.runs import ActivationLoader, ActivationSaver

__version__ = "0.1.0"

__all__ = [
    "ActivationCache",
    "ActivationHookManager",
    "ActivationLoader",
    "ActivationSaver",
    "CaptureEstimate",
    "CapturedActivation",
    "Check",
    "ExtractionConfig",
    "GenerationResult",
    "GenerationStep",
    "HookError",
    "HookPoint",
    "HookSpec",
    "HookedModel",
    "Intervention",
    "InterventionReceipt",
    "LogitLens",
    "ModelConfig",
    "ModelLoadError",
    "QueryResult",
    "SavedRun",
    "SelfTest",
    "TokenLogprobs",
    "UnknownHookError",
    "UnreadableRunWarning",
    "UnsupportedModelError",
    "UntrustedHookWarning",
    "load_model",
]
