"""NeuroScope integration in five examples: the engine, the server, the bridge, circuits, attention.

python examples/neuroscope_integration_example.py              # starts a server of its own
python examples/neuroscope_integration_example.py --url http://127.0.0.1:8080
"""

import argparse
import sys
from contextlib import ExitStack

import numpy as np
from local_server import local_server

from mlx_hooks import HookedModel
from neuroscope_bridge import (
    LMStudioNeuroScopeClient,
    NeuroScopeActivationBridge,
    NeuroScopeError,
    generate_neuroscope_smalltalk_interface,
    stack_records,
)

MODEL = "neuroscope-tiny"


def example_basic_activation_capture() -> None:
    """Hooks on a model in this process, without any server."""
    model = HookedModel.from_pretrained(MODEL)
    hook_id = model.register_activation_hook(layer_name="transformer.h.0", component="residual")
    result = model.generate("The capital of France is", max_tokens=4)
    print(f"text: {result.text.strip()}")
    for record in model.captured_activations(hook_id):
        print(f"  {record.phase:8} step {record.step} positions {record.positions} shape {record.value.shape}")
    model.unregister_activation_hook(hook_id)


def example_api_server_usage(client: LMStudioNeuroScopeClient) -> None:
    """Load a model over REST and generate with activations."""
    print(f"health: {client.health()['status']}")
    loaded = client.load_model(MODEL)
    print(f"loaded: {loaded['model_id']}, activations: {loaded['supports_activations']}")
    hooks = [
        {"layer_name": "transformer.h.1", "component": "residual", "hook_id": "layer_1_residual"},
        {"layer_name": "transformer.h.2", "component": "attention", "hook_id": "layer_2_attention"},
    ]
    result = client.generate_with_activations(
        messages=[{"role": "user", "content": "Explain transformers"}],
        activation_hooks=hooks,
        max_tokens=20,
        temperature=0,
    )
    print(f"generated: {result['choices'][0]['message']['content'].strip()}")
    for hook_id, records in result["activations"].items():
        print(f"  {hook_id}: {len(records)} records, the first {records[0]['shape']} {records[0]['dtype']}")

    with client.generate_with_activations(
        messages=[{"role": "user", "content": "Write a story"}],
        activation_hooks=hooks,
        stream=True,
        max_tokens=20,
        temperature=0,
    ) as events:
        norms = [
            np.linalg.norm(event["activations"]["layer_1_residual"][0]["data"][0, -1])
            for event in events
            if "activations" in event
        ]
    print(f"streamed: residual norm of each step {', '.join(f'{norm:.1f}' for norm in norms)}")


def example_bridge_conversion(client: LMStudioNeuroScopeClient) -> None:
    """Activations in NeuroScope's shape, and the Smalltalk client that reads them itself."""
    bridge = NeuroScopeActivationBridge()
    hooks = [{"layer_name": "transformer.h.0", "component": "mlp", "hook_id": "layer_0_mlp"}]
    messages = [{"role": "user", "content": "hello"}]
    result = client.generate_with_activations(messages=messages, activation_hooks=hooks, max_tokens=3)
    for hook_id, tensors in bridge.convert_activations_for_neuroscope(result["activations"]).items():
        first = tensors[0]
        print(f"{hook_id}: {first['hookPoint']} {first['shape']} axes {', '.join(first['axes'])}")
    smalltalk = generate_neuroscope_smalltalk_interface(client)
    print(f"Smalltalk interface: {len(smalltalk.splitlines())} lines, for {client.base_url}")


def example_circuit_analysis(client: LMStudioNeuroScopeClient) -> None:
    """Hooks for circuit analysis, and the components that a capture shows to be strongest."""
    bridge = NeuroScopeActivationBridge()
    n_layers = client.model_info()["num_layers"]
    hooks = bridge.create_hook_specs_for_circuit_analysis(
        model_layers=n_layers, components=["residual", "attention", "mlp"]
    )
    result = client.generate_with_activations(
        messages=[{"role": "user", "content": "The cat sat on the mat"}], activation_hooks=hooks, max_tokens=10
    )
    print(f"captured {len(result['activations'])} hooks; by what they write to the stream (correlational):")
    for circuit in bridge.find_circuits(result["activations"])[:3]:
        print(f"  {circuit['name']:22} {circuit['confidence']:.3f}")


def example_attention_patterns(client: LMStudioNeuroScopeClient) -> None:
    """Where the last token of a sentence looks, in every head of the middle layers."""
    bridge = NeuroScopeActivationBridge()
    n_layers = client.model_info()["num_layers"]
    hooks = bridge.create_attention_analysis_hooks(model_layers=n_layers, target_layers=[1, 2])
    result = client.generate_with_activations(
        messages=[{"role": "user", "content": "John gave Mary the book because she asked for it"}],
        activation_hooks=hooks,
        max_tokens=1,
    )
    strings = result["tokens"]["strings"]
    for layer in (1, 2):
        pattern = stack_records(result["activations"][f"layer_{layer}_attention_pattern"])[0]
        looked_at = [strings[int(row.argmax())].strip() for row in pattern[:, -1]]
        print(f"  layer {layer}: the last token looks most at {', '.join(looked_at)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running server; without it, one is started")
    url = parser.parse_args(argv).url
    try:
        run_all(url)
    except (NeuroScopeError, OSError, RuntimeError, ValueError) as error:
        sys.stderr.write(f"example: {error}\n")
        return 1
    return 0


def run_all(url: str | None) -> None:
    """The five examples in order, against a running server or one of its own."""
    with ExitStack() as stack:
        client = stack.enter_context(LMStudioNeuroScopeClient(url or stack.enter_context(local_server())))
        for number, (title, run) in enumerate(
            [
                ("Basic activation capture", example_basic_activation_capture),
                ("API server usage", lambda: example_api_server_usage(client)),
                ("NeuroScope bridge conversion", lambda: example_bridge_conversion(client)),
                ("Circuit analysis setup", lambda: example_circuit_analysis(client)),
                ("Attention pattern analysis", lambda: example_attention_patterns(client)),
            ],
            start=1,
        ):
            print(f"\n{number}. {title}")
            run()


if __name__ == "__main__":
    sys.exit(main())
