"""NeuroScope from Python: a client for the server, and the bridge to NeuroScope in a Pharo image.

    from neuroscope_bridge import LMStudioNeuroScopeClient, NeuroScopeActivationBridge

    client = LMStudioNeuroScopeClient()
    layers = client.load_model("neuroscope-tiny")["num_layers"]
    hooks = NeuroScopeActivationBridge().create_hook_specs_for_circuit_analysis(layers)
    result = client.generate_with_activations([{"role": "user", "content": "hello"}], hooks)

It needs neither MLX nor a Mac: the model runs where the server runs.
"""

from .client import LMStudioNeuroScopeClient
from .errors import (
    NeuroScopeAPIError,
    NeuroScopeError,
    PayloadError,
    ResponseFormatError,
    ServerTimeoutError,
    ServerUnreachableError,
)
from .events import EventStream
from .hook_specs import NeuroScopeActivationBridge
from .payload import decode_activation, row_positions, stack_records
from .smalltalk import generate_neuroscope_smalltalk_interface

__all__ = [
    "EventStream",
    "LMStudioNeuroScopeClient",
    "NeuroScopeAPIError",
    "NeuroScopeActivationBridge",
    "NeuroScopeError",
    "PayloadError",
    "ResponseFormatError",
    "ServerTimeoutError",
    "ServerUnreachableError",
    "decode_activation",
    "generate_neuroscope_smalltalk_interface",
    "row_positions",
    "stack_records",
]
