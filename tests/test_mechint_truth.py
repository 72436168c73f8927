"""What capturing shows must be so: induction forms in two layers, at the step where the loss falls, and not in one."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mlx_hooks import EvalMechIntRunner, MechIntConfig
from mlx_hooks.training.curves import Curves

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 250, 50


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example's module, whose model, data and training these are."""
    spec = importlib.util.spec_from_file_location("mechint_hooks_example", ROOT / "examples/mechint_hooks_example.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(example: ModuleType, layers: int, folder: Path) -> tuple[Curves, EvalMechIntRunner]:
    """Train with capture of patterns; the curves of head scores."""
    config = MechIntConfig(
        sample_layers=["blocks.*.attn.hook_pattern"],
        save_hidden_every_n_steps=EVERY,
        max_sequences_per_step=16,
        storage_path=folder / "captured",
        analyses_to_run=["heads"],
        verbose=False,
    )
    model = example.make_model(layers, seed=0)
    example.train_captured(model, config, folder / "adapters.safetensors", STEPS, seed=0)
    runner = EvalMechIntRunner(model, config)
    return runner.run_over_steps(), runner


def scores_of(curves: Curves, layer: int) -> list[float]:
    return curves["analyses"]["heads"][f"blocks.{layer}.attn.hook_pattern"]["induction"]


def test_induction_forms_in_the_second_of_two_layers(example: ModuleType, tmp_path: Path) -> None:
    curves, runner = trained(example, 2, tmp_path)
    assert curves["steps"] == list(range(0, STEPS + 1, EVERY))
    first, second = scores_of(curves, 0), scores_of(curves, 1)
    assert second[0] < 0.2
    assert second[-1] > 0.6
    assert max(first) < 0.2
    # A head of the first layer tells each token which one stood before it: without that there is no induction.
    before = curves["analyses"]["heads"]["blocks.0.attn.hook_pattern"]["previous_token"]
    assert before[-1] > 2 * before[0]
    losses = {report["step"]: report["train_loss"] for report in curves["training"] if report["kind"] == "train"}
    assert losses[25] > 0.9 * math.log(len(example.VOCABULARY))
    assert losses[STEPS] < 1
    # The score rises while the loss falls.
    steepest = {step: losses[step] - losses[step - EVERY // 2] for step in losses if step - EVERY // 2 in losses}
    fall, rise = min(steepest, key=steepest.__getitem__), int(np.argmax(np.diff(second))) * EVERY
    assert rise < fall + EVERY
    assert fall <= rise + 2 * EVERY
    causal = runner.run_analysis("causal", eval_data=example.make_pairs(8), options={"ablations": ["mean"]})
    by_name = {each["component"]: each["ablations"]["mean"]["loss_change"]["mean"] for each in causal["components"]}
    assert by_name["L1 attn"] > 1
    assert by_name["L0 attn"] > 1


def test_it_does_not_form_in_one_layer(example: ModuleType, tmp_path: Path) -> None:
    curves, _ = trained(example, 1, tmp_path)
    scores = scores_of(curves, 0)
    assert len(scores) == STEPS // EVERY + 1
    assert max(scores) < 0.2
    losses = [report["train_loss"] for report in curves["training"] if report["kind"] == "train"]
    assert losses[-1] > 2
