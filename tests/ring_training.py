"""One process of distributed trainings on this machine, with and without capture: ``ring_training.py FOLDER CONFIGS``.

CONFIGS is a JSON list, for each training what MechIntCallback is given, or null for a training without it. MLX_RANK and
MLX_HOSTFILE say which process of which ring it is.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.trainer import train
from training_runs import run

from mlx_hooks import MechIntCallback


def main() -> None:
    folder = Path(sys.argv[1])
    group = mx.distributed.init(strict=True, backend="ring")
    results: list[dict[str, Any]] = []
    for config in json.loads(sys.argv[2]):
        callback = None if config is None else MechIntCallback(config)
        trained = run(train if callback is None else callback.train, folder, "lora", iters=6)
        results.append(
            {
                "size": group.size(),
                "losses": trained.losses,
                "weights": {name: np.array(value).tobytes().hex() for name, value in trained.weights.items()},
                "batches": [batch.tolist() for _, batch, _ in trained.seen],
                "n_shards": 0 if callback is None else len(callback.saved_shards),
            }
        )
    (folder / f"results_{group.rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
