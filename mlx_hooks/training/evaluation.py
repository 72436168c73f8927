"""``EvalMechIntRunner``: the analyses of what was captured while a model trained, run one after the other."""

import json
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ..activations import to_numpy
from ..errors import FailedAnalysisWarning, HookError
from ..inference import computing_on
from ..model import HookedModel
from ..storage.manifest import MANIFEST, RANK_FOLDERS
from ..storage.rows import ArrayRows, Rows
from ..storage.shards import ShardReader, record_analysis
from ..token_text import TokenText
from .analyses import analysis_of, check_options, layers_for, run_analysis
from .checkpoints import checkpoints_by_step, load_checkpoint, weights_kept
from .config import MechIntConfig
from .context import MODEL, EvalContext, Progress, Spell
from .curves import Curves, CurveTable
from .report import write_results
from .trained import undisturbed

logger = logging.getLogger(__name__)

Captured = str | Path | ShardReader | Mapping[str, Rows | np.ndarray | mx.array] | None

MOST_EXAMPLES = 1024
"""Examples that are kept of an iterator of eval data, which may have no end; a list is kept whole."""


class EvalMechIntRunner:
    """Runs the analyses that a configuration names on captured activations, and on the model that they are of.

        runner = EvalMechIntRunner(model, config)
        results = runner.run_mechint_eval("adapters", "mechint_cache", eval_data=["The capital of France is Paris ."])
        results["analyses"]["neuron"]["blocks.2.hook_resid_post"]["firing_rate"]
        runner.export_results("mechint_results")            # mechint_results.json, mechint_report.md, pictures, sae/

    Args:
        model: an mlx-lm model or a HookedModel. None will do for analyses of captured rows.
        config: a MechIntConfig or a mapping with its names: ``analyses_to_run``, ``analysis_options``,
            ``sample_layers`` (None analyses all that was captured), ``verbose`` (progress bars).
        device: where MLX computes: None (its default), "cpu" or "gpu" (also "cuda", "mps"). Memory is shared, so
            nothing is moved.
        tokenizer: tells tokens as text, and encodes texts of eval data; None for that of a HookedModel.
        labels: for ``probe``: one label per row in stored order, of all captured rows or of those of the steps that are
            analysed; a mapping from token to label; or a function of rows.

    Raises:
        HookError: for a configuration, analysis options or a device that there is not.
    """

    def __init__(
        self,
        model: HookedModel | nn.Module | None = None,
        config: MechIntConfig | Mapping[str, Any] | None = None,
        device: Any = None,
        tokenizer: Any = None,
        labels: Any = None,
    ) -> None:
        self.config = MechIntConfig.of(config)
        check_options(self.config.analysis_options)
        with computing_on(device):
            self.device = device
        self.model = _hooked(model, tokenizer)
        self.tokenizer = tokenizer if tokenizer is not None or self.model is None else self.model.tokenizer
        self.labels = labels
        self.results: dict[str, Any] | None = None
        """What ``run_mechint_eval`` answered last."""
        self.curves: Curves | None = None
        """What ``run_over_steps`` answered last."""
        self.context = EvalContext()
        """What the results are of."""
        self._made = Path(tempfile.mkdtemp(prefix="neuroscope-"))
        weakref.finalize(self, shutil.rmtree, self._made, ignore_errors=True)

    def run_mechint_eval(
        self,
        checkpoint_path: str | Path | None = None,
        hidden_shards_path: Captured = None,
        eval_data: Any = None,
        steps: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Run every analysis of ``config.analyses_to_run``.

        Args:
            checkpoint_path: weights to put into the model first, which keeps them: a file, a folder of adapters, or the
                folder of a whole model (which is loaded where the runner has none). None takes the model as it is.
            hidden_shards_path: the folder of shards, an opened one, or rows or arrays [row, feature] by layer; None for
                ``config.storage_path``.
            eval_data: for ``causal`` and ``circuit``, and for what ``sae`` does to the model: texts, rows of ids,
                batches as mlx-lm's, or prompts with ``clean``, ``corrupted``, ``answer`` and ``wrong``.
            steps: only the rows of these training steps; None takes those of all.

        Returns:
            ``{"config", "analyses"}``, plain JSON values. Analyses are by name, in them the results by layer. What
            failed is ``{"error": sentence}`` in the place of a layer's result or of the analysis.

        Raises:
            HookError: the checkpoint or the folder that was named cannot be read, or does not fit; ``steps`` are none.

        Warns:
            FailedAnalysisWarning: for each analysis that failed; the others go on.
        """
        context = self._context(hidden_shards_path, eval_data)
        if steps is not None:
            context = context.at(steps)
        if checkpoint_path is not None:
            self._load(checkpoint_path)
            context = replace(context, model=self.model)
        self.context = context
        shutil.rmtree(self._made / "sae", ignore_errors=True)
        with self._computing():
            analyses = {name: self._run(name, context) for name in self.config.analyses_to_run}
        self.results = {"config": self.config.to_dict(), "analyses": analyses}
        self._record(checkpoint_path)
        return self.results

    def run_analysis(
        self,
        name: str,
        hidden_shards_path: Captured = None,
        eval_data: Any = None,
        layer: str | int | None = None,
        options: Any = None,
    ) -> dict[str, Any]:
        """Run one analysis, and let what goes wrong be raised.

            activations = runner.load_activations("mechint_cache")
            runner.run_analysis("neuron", activations)

        Args:
            hidden_shards_path, eval_data: as in ``run_mechint_eval``.
            layer: one layer, whose result is answered; None for all, by layer.
            options: in the place of those in the configuration.

        Raises:
            HookError: for an unknown name, and for what cannot be analysed.
        """
        context = self._context(hidden_shards_path, eval_data)
        chosen = self._options(name) if options is None else options
        with self._computing(), self._bar(name) as progress:
            return run_analysis(name, context, layer, chosen, progress)

    def run_over_steps(
        self,
        hidden_shards_path: Captured = None,
        analyses: str | Sequence[str] | None = None,
        checkpoints: Mapping[int, str | Path] | str | Path | None = None,
        eval_data: Any = None,
    ) -> Curves:
        """The same analyses at every saved step, so that one sees what forms while the model trains.

        Analyses of rows see the rows of one step; those of the model run it with the weights of each checkpoint, and a
        checkpoint that cannot be loaded leaves a gap. The model has its own weights again afterwards. What an
        autoencoder does to the model's loss is not followed: that would take the weights of its step.

        Args:
            analyses: names, or one; None for those of the configuration that can be made.
            checkpoints: paths by the step after which they were saved, or the folder where mlx-lm saved numbered
                adapters.

        Returns:
            ``{"steps": [...], "analyses": {name: {layer: {metric: [a number per step, None where there is none]}}},
            "training": reports of the loss}``.

        Raises:
            HookError: an analysis that was named lacks what it needs; nothing was captured at any step; labels that are
                listed are not one per captured row.

        Warns:
            FailedAnalysisWarning: for each analysis that failed at some step, and for checkpoints that are left out.
        """
        context = self._context(hidden_shards_path, eval_data)
        if self.results is None:
            self.context = context
        asked = [analyses] if isinstance(analyses, str) else analyses
        names = self._names_over_steps(asked, context, checkpoints)
        table = CurveTable()
        with self._computing():
            for name in names:
                if analysis_of(name).needs != MODEL:
                    self._follow_rows(table, name, context)
            of_model = [name for name in names if analysis_of(name).needs == MODEL]
            if of_model and checkpoints is not None:
                self._follow_model(table, of_model, context, checkpoints_by_step(checkpoints))
        self.curves = table.curves(context.reader.description["training"] if context.reader is not None else [])
        return self.curves

    def load_activations(self, hidden_shards_path: Captured = None) -> dict[str, Rows]:
        """The captured rows by layer; they are read from their files when they are needed.

        Raises:
            HookError: there are none.
        """
        context = self._context(hidden_shards_path, None)
        if not context.has_captured:
            raise HookError(f"There are no captured activations in {self.config.storage_path}.")
        return {name: context.rows_of(name) for name in [*context.layers("rows"), *context.layers("patterns")]}

    def export_results(self, directory: str | Path) -> Path:
        """Write ``mechint_results.json``, ``mechint_report.md`` with its pictures, and the autoencoders to a folder.

        The pictures need matplotlib (``pip install 'neuroscope-mlx[plot]'``); without it the report says so and has its
        tables.

        Returns:
            the report's path.

        Raises:
            HookError: nothing was run yet; the folder cannot be written, or has files of these names that are no
                results.
        """
        if self.results is None and self.curves is None:
            raise HookError("There are no results yet: run_mechint_eval or run_over_steps makes them.")
        results = self.results or {"config": self.config.to_dict(), "analyses": {}}
        return write_results(Path(directory), results, self.curves, self.context)

    # What is run

    def _run(self, name: str, context: EvalContext) -> dict[str, Any]:
        """One analysis of every layer; a sentence in the place of what failed."""
        layers: list[str] = []

        def find() -> dict[str, Any]:
            layers.extend(layers_for(name, context, self.config.sample_layers))
            return {}

        failed = self._attempt(name, "", find)
        if failed:
            return failed
        found = {layer: self._attempt(name, layer, self._job(name, context, layer)) for layer in layers}
        return found[MODEL] if layers == [MODEL] else found

    def _job(self, name: str, context: EvalContext, layer: str) -> Callable[[], dict[str, Any]]:
        def job() -> dict[str, Any]:
            with self._bar(name if layer == MODEL else f"{name} {layer}") as progress:
                result = run_analysis(name, context, layer, self._options(name), progress)
            json.dumps(result, allow_nan=False)
            return result

        return job

    def _attempt(self, name: str, layer: str, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            return job()
        except Exception as error:
            told = str(error) if isinstance(error, HookError) else f"{type(error).__name__}: {error}"
            where = f" of {layer}" if layer not in ("", MODEL) else ""
            warnings.warn(f"The analysis {name}{where} failed: {told}", FailedAnalysisWarning, stacklevel=2)
            return {"error": told}

    def _record(self, checkpoint_path: str | Path | None) -> None:
        """Note in the manifest what was analysed; a folder that cannot be written can be analysed all the same."""
        if self.context.reader is None or self.results is None:
            return
        failed = [name for name, found in self.results["analyses"].items() if "error" in found]
        checkpoint = None if checkpoint_path is None else str(checkpoint_path)
        record = {"analyses": list(self.config.analyses_to_run), "failed": failed, "checkpoint": checkpoint}
        try:
            record_analysis(self.context.reader.folder, record)
        except HookError as error:
            logger.info("The analysis is not noted in the manifest: %s", error)

    # Over steps

    def _names_over_steps(self, asked: Sequence[str] | None, context: EvalContext, checkpoints: Any) -> list[str]:
        if asked is not None:
            for name in asked:
                if analysis_of(name).needs == MODEL and checkpoints is None:
                    raise HookError(
                        f"{name!r} over training steps runs the model with the weights of each step: give checkpoints."
                    )
                layers_for(name, context, self.config.sample_layers)
            names = list(asked)
            if "probe" in names and self.labels is None:
                raise HookError("'probe' over training steps needs labels: give them to the runner.", field="labels")
        else:
            names = [name for name in self.config.analyses_to_run if self._can_follow(name, context, checkpoints)]
        if not names:
            raise HookError(
                f"None of {', '.join(self.config.analyses_to_run)} can be made at each step of what was captured: "
                "analyses of rows need shards, causal and circuit need checkpoints and eval_data."
            )
        of_rows = [name for name in names if analysis_of(name).needs != MODEL]
        if of_rows and not _steps(context):
            raise HookError(f"{of_rows[0]!r} over training steps needs shards of at least one step.")
        if "probe" in names and context.lists_labels and len(self.labels) != len(context.row_steps):
            raise HookError(
                f"labels over training steps are one per captured row: {len(context.row_steps)}, got "
                f"{len(self.labels)}.",
                field="labels",
            )
        return names

    def _can_follow(self, name: str, context: EvalContext, checkpoints: Any) -> bool:
        if analysis_of(name).needs == MODEL:
            return checkpoints is not None and context.model is not None and context.eval_data is not None
        return bool(context.layers(analysis_of(name).needs)) and (name != "probe" or self.labels is not None)

    def _follow_rows(self, table: CurveTable, name: str, context: EvalContext) -> None:
        # The model has other weights than those that the rows of a step come from: autoencoders are told by their rows
        # alone. Those of single steps are not kept.
        context = replace(context, sae_folder=None, steer=False, model=None, eval_data=None)
        layers = layers_for(name, context, self.config.sample_layers)
        with self._plain_bar(f"{name} over steps", len(_steps(context)) * len(layers)) as advance:
            for step in _steps(context):
                for layer in layers:
                    self._add(table, name, layer, step, context.at([step]))
                    advance()

    def _follow_model(
        self, table: CurveTable, names: Sequence[str], context: EvalContext, checkpoints: Mapping[int, Path]
    ) -> None:
        assert self.model is not None
        with (
            weights_kept(self.model.model),
            self._plain_bar("checkpoints", len(checkpoints) * len(names)) as advance,
        ):
            model = self.model
            for step, path in checkpoints.items():
                failed = self._attempt_to_load(model, step, path)
                model = _current(model)
                for name in names:
                    if failed:
                        table.add(name, MODEL, step, failed)
                    else:
                        self._add(table, name, MODEL, step, replace(context, model=model))
                    advance()

    def _attempt_to_load(self, model: HookedModel, step: int, path: Path) -> dict[str, Any]:
        """The weights of a step; a sentence where they cannot be had."""
        try:
            load_checkpoint(model.model, path)
        except HookError as error:
            warnings.warn(f"The checkpoint of step {step} is left out: {error}", FailedAnalysisWarning, stacklevel=2)
            return {"error": str(error)}
        return {}

    def _add(self, table: CurveTable, name: str, layer: str, step: int, context: EvalContext) -> None:
        result = self._attempt(
            name, f"{layer} at step {step}", lambda: run_analysis(name, context, layer, self._options(name))
        )
        table.add(name, layer, step, result if "error" in result else analysis_of(name).scalars(result))

    # What it is run on

    def _context(self, captured: Captured, eval_data: Any) -> EvalContext:
        if self.model is not None:
            self.model = _current(self.model)
        if captured is None and _has_shards(self.config.storage_path):
            captured = self.config.storage_path
        reader, rows = _opened(captured), None
        if isinstance(captured, Mapping):
            rows = {str(layer): _rows(str(layer), given) for layer, given in captured.items()}
        return EvalContext(
            reader=reader,
            rows=rows,
            model=self.model,
            eval_data=_repeatable(eval_data),
            labels=self.labels,
            spell=_spelling(self.tokenizer),
            sae_folder=self._made / "sae",
            steer=self.config.enable_feature_steering,
        )

    def _options(self, name: str) -> Any:
        return {**self.config.analysis_options}.get(name)  # type: ignore[call-overload]

    def _load(self, path: str | Path) -> None:
        if not isinstance(path, str | Path):
            raise HookError(f"checkpoint_path is a file or a folder, got {path!r:.100}.", field="checkpoint_path")
        if self.model is None:
            self.model = HookedModel.from_pretrained(path)
            self.tokenizer = self.tokenizer or self.model.tokenizer
        elif load_checkpoint(self.model.model, path):
            self.model = HookedModel(self.model.model, self.model.tokenizer, self.model.model_name)

    # How

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with computing_on(self.device), undisturbed(self.model.model) if self.model else nullcontext():
            yield

    @contextmanager
    def _bar(self, title: str) -> Iterator[Progress]:
        """A progress bar whose length becomes known with the first report."""
        done_before = 0
        with tqdm(desc=title, total=1, disable=not self.config.verbose) as bar:

            def progress(done: int, total: int) -> None:
                nonlocal done_before
                bar.total = total
                bar.update(done - done_before)
                done_before = done

            yield progress
            total = int(bar.total or 1)
            progress(total, total)

    @contextmanager
    def _plain_bar(self, title: str, total: int) -> Iterator[Callable[[], object]]:
        with tqdm(desc=title, total=total, disable=not self.config.verbose) as bar:
            yield bar.update


def _hooked(model: HookedModel | nn.Module | None, tokenizer: Any) -> HookedModel | None:
    if model is None or isinstance(model, HookedModel):
        return model
    return HookedModel(model, tokenizer)


def _current(model: HookedModel) -> HookedModel:
    """The model, wrapped anew where parts of it were replaced since it was wrapped, by adapters perhaps."""
    architecture = model.architecture
    places = [place for point in model.hook_points.values() for place in architecture.locations_of(point)]
    if all(architecture.is_current(architecture.path(place.module), place.module) for place in places):
        return model
    return HookedModel(model.model, model.tokenizer, model.model_name)


def _spelling(tokenizer: Any) -> Spell | None:
    return None if tokenizer is None else TokenText(tokenizer).text


def _steps(context: EvalContext) -> list[int]:
    return [] if context.reader is None else context.reader.steps


def _opened(captured: Any) -> ShardReader | None:
    """The shards that are meant; None for rows by layer, and for nothing."""
    if captured is None or isinstance(captured, ShardReader):
        return captured
    if isinstance(captured, str | Path):
        return ShardReader(captured)
    if isinstance(captured, Mapping):
        return None
    raise HookError(
        "hidden_shards_path is a folder of shards, a ShardReader, or rows or arrays by layer; got "
        f"{type(captured).__name__}.",
        field="hidden_shards_path",
    )


def _rows(layer: str, given: Any) -> Rows:
    """The rows of a layer, of an array too."""
    if isinstance(given, Rows):
        return given
    if not isinstance(given, np.ndarray | mx.array):
        raise HookError(
            f"hidden_shards_path has rows or an array [row, feature] for each layer; for {layer!r} it has "
            f"{type(given).__name__}.",
            field="hidden_shards_path",
        )
    if isinstance(given, mx.array) and given.dtype == mx.bfloat16:
        # NumPy has none.
        given = to_numpy(given)
    return ArrayRows(given, name=layer)


def _has_shards(folder: str | Path) -> bool:
    folder = Path(folder)
    return any((inner / MANIFEST).is_file() for inner in [folder, *folder.glob(RANK_FOLDERS)])


def _repeatable(eval_data: Any) -> Any:
    """Data that several analyses can read: what can be read only once is kept."""
    return _Kept(list(islice(eval_data, MOST_EXAMPLES))) if isinstance(eval_data, Iterator) else eval_data


class _Kept:
    """The beginning of an iterator: of no length, as that one, so that an analysis runs on a few examples of it."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)
