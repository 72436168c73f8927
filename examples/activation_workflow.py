"""Extract activations of several inputs, save them with what they were made with, find and load them again.

    python examples/activation_workflow.py --base-dir saved_activations

The guide is docs/interpretability.md. The model is bundled.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from mlx_hooks import ActivationLoader, ActivationSaver, ExtractionConfig, HookedModel, HookError, LogitLens

TEXTS = [
    "The capital of France is",
    "When Mary and John went to the store , John gave a drink to",
    "The capital of Italy is",
]
CONFIG = ExtractionConfig(extract_resid_out=True, extract_attn_pattern=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-dir", type=Path, default=Path("saved_activations"), help="folder of the saved runs")
    try:
        model = HookedModel.from_pretrained("neuroscope-tiny")
        saver = ActivationSaver(base_dir=parser.parse_args(argv).base_dir, experiment_name="documentation_example")
        extract_and_save(model, saver)
        load_and_analyze(model, saver)
    except HookError as error:
        sys.stderr.write(f"example: {error}\n")
        return 1
    return 0


def extract_and_save(model: HookedModel, saver: ActivationSaver) -> None:
    """A run for each text, with a tag and a key of its own, and one of all texts together."""
    tokenizer = model.get_tokenizer()
    for i, text in enumerate(TEXTS):
        cache = model.forward(
            tokenizer(text, return_tensors="np"), target_token_positions=["last"], extraction_config=CONFIG
        )
        folder = saver.save(
            activations=cache,
            model=model,
            target_token_positions=["last"],
            interventions=None,
            extraction_config=CONFIG,
            other_metadata={"batch_id": i},
            tag=f"batch_{i}",
        )
        print(f"Saved  {folder.parent.parent.name}/{folder.parent.name}  tag batch_{i}")
    dataset = model.extract_cache(TEXTS, target_token_positions=["last"], extraction_config=CONFIG)
    saver.save_cache(dataset, other_metadata={"batch_id": "all"}, tag="dataset_run")
    print(f"Saved  all of them as one run, resid_out_3 is {tuple(dataset['resid_out_3'].shape)}\n")


def load_and_analyze(model: HookedModel, saver: ActivationSaver) -> None:
    """Find runs by tag, by key, by configuration; read what was loaded with the logit lens."""
    loader = ActivationLoader.from_saver(saver)
    activations, metadata = loader.query(tag="batch_0").load(-1)
    print(f"By tag     {metadata['tag']}, of {metadata['model_name']}, keys: {', '.join(list(activations)[:2])}, ...")
    activations, metadata = loader.query(custom_keys={"batch_id": 1}).load(-1)
    fresh = model.forward(TEXTS[1], ["last"], CONFIG)
    same = all(np.array_equal(activations.numpy(name), fresh.numpy(name)) for name in fresh)
    print(f"By key     {metadata['tag']}, {'the same numbers' if same else 'other numbers'} as computed anew")
    found = loader.query(model_name="neuroscope-tiny", extraction_config=ExtractionConfig(extract_attn_pattern=True))
    print(f"Found {len(found.results)} matching runs\n")

    print("The logit lens on the run of all texts, at the last position")
    activations, _ = loader.query(tag="dataset_run").load(-1)
    for key, logits in LogitLens.from_model(model).compute(activations, "resid_out_{i}").items():
        best = [model.tokenizer.decode([token]) for token in np.array(logits[:, -1].argmax(axis=-1)).tolist()]
        print(f"  {key.removeprefix('logit_lens_')}  {'   '.join(f'{word:10}' for word in best)}")


if __name__ == "__main__":
    sys.exit(main())
