"""``neuroscope train``: mlx-lm's training with capture."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import HookError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train with mlx_lm.lora, and capture activations meanwhile",
        description="Train with mlx_lm.lora, and capture activations of training batches meanwhile.",
        usage="neuroscope train [options] -- mlx_lm.lora's options",
        epilog="example: neuroscope train --layers 1 3 --every 100 -- --model neuroscope-tiny --data texts --iters 600",
    )
    parser.add_argument("--mechint", type=Path, metavar="FILE", help="the fields of MechIntConfig, as JSON or YAML")
    parser.add_argument(
        "--layers", nargs="+", metavar="NAME", help="blocks by number or name, or hook points (default: detected)"
    )
    parser.add_argument("--every", type=int, metavar="N", help="capture every N steps (default: 200)")
    parser.add_argument("--storage", metavar="FOLDER", help="where captures go (default: mechint_cache)")
    parser.add_argument(
        "--first-step", type=int, default=0, metavar="N", help="steps of earlier training that this one continues"
    )
    parser.add_argument(
        "lora", nargs="*", metavar="OPTION", help="after --: the options of mlx_lm.lora; --train is set"
    )
    parser.set_defaults(run=run, hint="the options of mlx_lm.lora come after --")


def run(options: argparse.Namespace) -> int:
    from mlx_lm import lora

    from .. import MechIntCallback, MechIntConfig
    from ..training.capturing import check_storage

    given = {} if options.mechint is None else _fields(options.mechint, "it has no fields of MechIntConfig")
    given |= {
        name: value
        for name, value in {
            "sample_layers": options.layers,
            "save_hidden_every_n_steps": options.every,
            "storage_path": options.storage,
        }.items()
        if value is not None
    }
    config = MechIntConfig.of(given)
    callback = MechIntCallback(config, first_step=options.first_step)
    lora_options = _with_bundled(options.lora)
    # Loading a model and data sets may take minutes.
    check_storage(config)
    plain = sys.argv
    sys.argv = ["mlx_lm.lora", "--train", *lora_options]
    try:
        with callback.inside_lora(), _shown(config.verbose):
            lora.main()
    except (ValueError, OSError, ImportError) as error:
        raise HookError(f"mlx_lm.lora: {str(error).strip() or type(error).__name__}") from error
    except KeyboardInterrupt:
        sys.stderr.write(f"neuroscope: interrupted; what was captured is in {config.storage_path}\n")
        return 130
    finally:
        sys.argv = plain
    if found := callback.get_statistics():
        layers = ", ".join(found["tracked_layers"])
        rows, files = found["total_samples_saved"], found["total_shards"]
        print(f"Captured {rows:,} tokens in {files} file{'s' if files != 1 else ''} of {config.storage_path}: {layers}")
    return 0


def _fields(path: Path, otherwise: str) -> dict[str, Any]:
    """The fields in a file of JSON or, which holds JSON too, YAML; ``otherwise`` says what a file without is."""
    import yaml  # type: ignore[import-untyped]

    try:
        text = path.read_text()
        fields = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise HookError(f"cannot read {path}: {reason}") from error
    if not isinstance(fields, dict):
        raise HookError(f"cannot read {path}: {otherwise}")
    return fields


@contextmanager
def _shown(verbose: bool) -> Iterator[None]:
    """A block in which a line on stderr tells of each step that is captured."""
    if not verbose:
        yield
        return
    log = logging.getLogger("mlx_hooks.training")
    handler, level = _AboveBars(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class _AboveBars(logging.Handler):
    """Writes lines to stderr without breaking into progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _with_bundled(arguments: list[str]) -> list[str]:
    """mlx-lm's options, in which the bundled model's name, there or in the file of ``--config``, means its folder.

    Raises:
        HookError: no model is named, where mlx-lm would download one.
    """
    from ..loading import BUNDLED, fetch

    parser = argparse.ArgumentParser(prog="neuroscope train", add_help=False)
    parser.add_argument("--model")
    parser.add_argument("-c", "--config", type=Path)
    known, _ = parser.parse_known_args(arguments)
    model = known.model
    if model is None and known.config is not None:
        model = _fields(known.config, "it has no options of mlx_lm.lora").get("model")
    if model is None and not {"-h", "--help"} & set(arguments):
        raise HookError("The options of mlx_lm.lora come after --, at least --model and --data.")
    # Of an option that is there twice the last one counts.
    return [*arguments, "--model", str(fetch(BUNDLED))] if model == BUNDLED else arguments
