"""Analyses of activations as jobs: of what was captured to a folder, of uploads, of a loaded model. No transport here.

service = Interpretability(worker, Path("mechint_cache"))
service.layers(None)                                  # {"layers": ["blocks.2.hook_resid_post"], ...}
work = service.work(Asked("neuron", "blocks.2.hook_resid_post"), None)
worker.submit(work, kind="interpret").result()        # {"blocks.2.hook_resid_post": {...}}
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, get_args, get_type_hints

from mlx_hooks import HookError, HookPoint, UnknownHookError
from mlx_hooks.options import options_of
from mlx_hooks.storage.manifest import MANIFEST, RANK_FOLDERS
from mlx_hooks.storage.shards import ShardReader
from mlx_hooks.token_text import TokenText
from mlx_hooks.training.analyses import ANALYSES_BY_NAME, MODEL, Analysis, EvalContext, layers_for, run_analysis
from mlx_hooks.training.context import Spell
from mlx_hooks.training.layers import check_axes

from . import logs
from .aside import Aside, Report
from .errors import ApiError, Busy, NoModelLoaded
from .jobs import Job, Work
from .models import LoadedModel
from .uploads import read_upload
from .worker import ModelWorker

T = TypeVar("T")

MAX_RUNNING = 2
"""Analyses of rows that compute at a time."""
MAX_ANALYSES = 8
"""Analyses that may run or wait; one more is refused."""

MAX_OPTION = 100_000
"""The largest whole number that a request may give an option."""

UNPACKED = 8
"""How many times as long as the longest body an upload's arrays may be, as float32: a file may be packed."""

FOLDER = "the folder with captured activations"
_TAKEN_BY = {
    "eval_data": ("circuit", "causal", "sae"),
    "labels": ("probe",),
    "steps": ("sae", "neuron", "feature", "probe", "heads"),
}
_FIELDS = ("layer_name", "model")
"""What errors call as requests do."""


@dataclass(frozen=True)
class Asked:
    """One analysis as a request asks for it.

    Args:
        analysis: its name.
        layer: one layer; None for all that suit it.
        options: those of the analysis.
        besides: what else ``EvalContext`` takes: ``eval_data``, ``labels``, ``steps``.
        model: the id of the model that it names.
    """

    analysis: str
    layer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    besides: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None

    @property
    def runs_model(self) -> bool:
        """Whether it runs a loaded model; ``sae`` does where it is given data to run it on."""
        return "eval_data" in self.besides or ANALYSES_BY_NAME[self.analysis].needs == MODEL


class Interpretability:
    """What the addresses under ``/interpret``, and the causal ones under ``/v1/analysis``, work with.

    Args:
        worker: owns the models, and shows the jobs.
        folder: with captured activations; None where there is none.
        defaults: options of analyses by name, which a request's own precede.
        steer: whether ``sae`` steers the model that it is given data for.
        max_array_bytes: what the arrays of an upload may take as float32.
        to_load: what callers are told to do where there is no model.
    """

    def __init__(
        self,
        worker: ModelWorker,
        folder: Path | None = None,
        *,
        defaults: Mapping[Any, Mapping[str, Any]] | None = None,
        steer: bool = False,
        max_array_bytes: int = 2**28,
        to_load: str = "Load one with POST /v1/models/load",
    ) -> None:
        self.worker = worker
        self.max_array_bytes = max_array_bytes
        self._captured = _Captured(folder)
        self._defaults = defaults or {}
        self._steer, self._to_load = steer, to_load
        self._aside = Aside(MAX_RUNNING)
        self._unpacking = threading.BoundedSemaphore(MAX_RUNNING)
        self._jobs: list[Job[Any]] = []
        self._lock = threading.Lock()

    def layers(self, loaded: LoadedModel | None) -> dict[str, Any]:
        """What was captured, and what could be of a model.

        Raises:
            ApiError: the folder cannot be read.
        """
        points = loaded.model.hook_points.values() if loaded is not None else ()
        available = [point.name for point in points if _has_rows(point)]
        if not self._captured.is_there:
            return {"layers": [], "shapes": {}, "steps": [], "available": available}
        with self._captured.reader() as reader:
            rows = {name: reader.rows(name) for name in reader.layers} if reader.entries else {}
            shapes = {name: [len(one), *one.shape] for name, one in rows.items()}
            return {"layers": list(shapes), "shapes": shapes, "steps": reader.steps, "available": available}

    def submit(self, submit: Callable[[], Job[Any]]) -> Job[Any]:
        """Let an analysis become a job.

        Raises:
            Busy: as many run or wait as may.
        """
        with self._lock:
            self._check_room()
            self._jobs.append(job := submit())
            return job

    def _check_room(self) -> None:
        self._jobs = [job for job in self._jobs if not job.is_finished]
        if len(self._jobs) >= MAX_ANALYSES:
            raise Busy(len(self._jobs), "analyses are under way")

    def work(self, asked: Asked, loaded: LoadedModel | None, file: IO[bytes] | None = None) -> Work[dict[str, Any]]:
        """What the job is to do; what is wrong with the request is said here, as far as it can be told.

        Args:
            loaded: the model to run, which also spells tokens where they are its own; None where there is none.
            file: an upload, to be read in the place of what was captured.

        Raises:
            ApiError: nothing was captured, or not this layer; or the analysis cannot be made of it.
            Busy: as many analyses run or wait as may.
        """
        with self._lock:
            self._check_room()
        analysis = ANALYSES_BY_NAME[asked.analysis]
        _check_options(asked, analysis.options_class)
        given = {**self._defaults.get(asked.analysis, {}), **asked.options}
        with self._told():
            options: Any = options_of(analysis.options_class, given)
        context = EvalContext(steer=self._steer and asked.runs_model, **asked.besides)
        if analysis.needs != MODEL:
            context = replace(context, **self._source(file))
            context = replace(context, spell=_spell(asked, loaded, context.reader))
        elif file is not None:
            raise ApiError(
                400,
                f"The analysis {asked.analysis} runs a model and reads no activations: ask for it at /interpret.",
                code="invalid_value",
                param="analysis_type",
            )
        if not asked.runs_model:
            analyse = partial(self._analyse, asked, self._layers(asked, context), context, options)
            return lambda: self._aside.beside(analyse)
        if loaded is None:
            raise NoModelLoaded(self._to_load)
        context = replace(context, model=loaded.model)
        analyse = partial(self._analyse, asked, self._layers(asked, context), context, options)
        return self.on_model(loaded, analyse)

    def on_model(self, loaded: LoadedModel, analyse: Callable[[Report], T]) -> Work[T]:
        """What the job is to do for an analysis that runs a model: others get a turn at each of its reports."""
        instrument = loaded.model.instrument
        return lambda: self._aside.in_turns(analyse, lambda: instrument.is_attached, lambda: instrument.holder)

    def _source(self, file: IO[bytes] | None) -> dict[str, Any]:
        if file is None:
            with self._captured.reader() as reader:
                if not reader.entries:
                    raise ApiError(404, f"Nothing was captured to {FOLDER} yet.", code="activations_not_found")
                return {"reader": reader}
        # Only a few are unpacked at a time.
        with self._unpacking:
            return {"rows": read_upload(file, self.max_array_bytes)}

    def _layers(self, asked: Asked, context: EvalContext) -> list[str]:
        """The layers that are analysed; all that is asked of them is there."""
        _check_layers(asked, ANALYSES_BY_NAME[asked.analysis], context)
        with self._told():
            try:
                if asked.layer is None:
                    found = layers_for(asked.analysis, context)
                else:
                    found = [context.rows_of(asked.layer).name if context.has_captured else asked.layer]
                if context.has_captured:
                    for layer in found:
                        context.rows_of(layer)
            except UnknownHookError as error:
                raise ApiError(404, self._captured.told(error), code="layer_not_found", param="layer_name") from error
            return found

    def _analyse(
        self, asked: Asked, layers: list[str], context: EvalContext, options: Any, progress: Report
    ) -> dict[str, Any]:
        # Where the rows come from is at fault if no option is.
        of_rows = "file" if context.rows is not None else "layer_name" if context.has_captured else "config"
        results = {}
        for i, layer in enumerate(layers):

            def report(done: int, total: int, i: int = i) -> None:
                progress(i * total + done, len(layers) * total)

            with self._told(of_rows):
                results[layer] = run_analysis(asked.analysis, context, layer, options, report)
        return results[MODEL] if list(results) == [MODEL] else results

    @contextmanager
    def _told(self, otherwise: str = "config") -> Iterator[None]:
        """What the engine says of a request, as its answer.

        Args:
            otherwise: what is at fault where the engine names no field.
        """
        try:
            yield
        except HookError as error:
            # Options, and what stands besides them, are fields of ``config``.
            field = otherwise if error.field in (None, "rows") else error.field
            param = field if field in (otherwise, *_FIELDS) else f"config.{field}"
            # What a program may give as any sequence.
            message = self._captured.told(error).replace("an instance of Sequence", "a list")
            raise ApiError(400, message, code="invalid_value", param=param) from error

    def close(self, timeout: float = 5.0) -> bool:
        """Leave what still computes; answers whether it ended within ``timeout`` s."""
        return self._aside.close(timeout)


def check_defaults(defaults: Mapping[Any, Mapping[str, Any]]) -> None:
    """Raises HookError for options that would fail each request, or have each write to the same place."""
    for analysis, given in defaults.items():
        options_class = ANALYSES_BY_NAME[analysis].options_class
        options_of(options_class, given)
        if files := [name for name in given if given[name] is not None and _names_file(options_class, name)]:
            raise HookError(
                f"Requests read and write no files: leave {files[0]} out of the options of {analysis}.",
                field="analysis_options",
            )


def _names_file(options_class: type, name: str) -> bool:
    return Path in get_args(get_type_hints(options_class).get(name))


def _check_options(asked: Asked, options_class: type) -> None:
    """Raises ApiError for what the analysis does not take, and what a program may ask for and a request may not."""
    for name in asked.besides:
        if asked.analysis not in _TAKEN_BY[name]:
            message = f"Field {name!r} is of {', '.join(_TAKEN_BY[name])}: leave it out of {asked.analysis}."
            raise ApiError(400, message, code="invalid_value", param=f"config.{name}")
    if asked.options.get("steering") and not asked.runs_model:
        message = "Steering runs the model on data: give eval_data."
        raise ApiError(400, message, code="invalid_value", param="config.eval_data")
    for name, value in asked.options.items():
        if _names_file(options_class, name):
            message = f"The server reads and writes no files for a request: leave {name} out."
            raise ApiError(400, message, code="invalid_value", param=f"config.{name}")
        if type(value) is int and value > MAX_OPTION and name != "seed":
            message = f"Field {name!r} asks for {value}; at most {MAX_OPTION} are allowed."
            raise ApiError(400, message, code="limit_exceeded", param=f"config.{name}")


def _check_layers(asked: Asked, analysis: Analysis, context: EvalContext) -> None:
    """Raises ApiError for what the engine would tell in the words of a program, or of a folder where a file came."""
    if analysis.name == "probe" and context.labels is None:
        message = "A probe needs labels: a list, one per row, or an object from tokens to labels."
        raise ApiError(400, message, code="invalid_value", param="config.labels")
    if analysis.needs == MODEL:
        return
    if context.rows is not None:
        if context.steps is not None:
            message = "The rows of a file are of no steps: leave steps out."
            raise ApiError(400, message, code="invalid_value", param="config.steps")
        if asked.layer is not None and asked.layer not in context.rows:
            message = f"The file has no array {asked.layer!r}. There are: {', '.join(context.rows)}."
            raise ApiError(404, message, code="layer_not_found", param="layer_name")
    if asked.layer is None and not context.layers(analysis.needs):
        what = "attention patterns (hook_pattern)" if analysis.needs == "patterns" else "activations of tokens"
        where = "the file has none" if context.rows is not None else "none are captured"
        message = f"The analysis {asked.analysis!r} needs {what}; {where}."
        raise ApiError(400, message, code="invalid_value", param="analysis_type")


def _has_rows(point: HookPoint) -> bool:
    """Whether what stands at a hook point can be captured: one value per token."""
    try:
        check_axes(point.name, point.axes)
    except HookError:
        return False
    return True


def _spell(asked: Asked, loaded: LoadedModel | None, reader: ShardReader | None) -> Spell | None:
    """Of the model that is named; of another one if what was captured has its vocabulary."""
    if loaded is None or loaded.model.tokenizer is None:
        return None
    captured = reader.description.get("model", {}).get("d_vocab") if reader is not None else None
    known = loaded.model.cfg.d_vocab
    if not asked.model and captured != known:
        return None
    text = TokenText(loaded.model.tokenizer).text
    return lambda token: text(token) if token < known else None


class _Captured:
    """A folder of shards. It is read anew when its manifest has changed, not with each request."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder.resolve() if folder is not None else None
        self._lock = threading.Lock()
        self._stamp: tuple[Any, ...] = ()
        self._reader: ShardReader | None = None

    @property
    def is_there(self) -> bool:
        """Whether anything was captured yet."""
        return bool(self._manifests())

    @contextmanager
    def reader(self) -> Iterator[ShardReader]:
        """What was captured up to now.

        Raises:
            ApiError: 404 for nothing, and for what was not captured, which is asked for in the block; 400 where the
                server has no such folder.
        """
        if self.folder is None:
            raise ApiError(
                400,
                "This server was started without captured activations: start it with --mechint DIR, or upload some.",
                code="no_captured_activations",
            )
        try:
            yield self._current(self.folder)
        except HookError as error:
            raise ApiError(404, self.told(error), code="activations_not_found") from error

    def told(self, error: HookError) -> str:
        """What the error says, without where the folder lies, which is nobody's business."""
        text = str(error)
        if self.folder is not None:
            text = text.replace(f"{self.folder}/", "").replace(str(self.folder), FOLDER)
        return logs.scrub(text)

    def _current(self, folder: Path) -> ShardReader:
        with self._lock:
            stamp = tuple((path, state.st_ino, state.st_mtime_ns, state.st_size) for path, state in self._manifests())
            if self._reader is None or stamp != self._stamp:
                self._reader, self._stamp = ShardReader(folder), stamp
            return self._reader

    def _manifests(self) -> list[tuple[Path, Any]]:
        """Of the folder, and of the processes that write to folders in it."""
        if self.folder is None:
            return []
        found = []
        for path in sorted([self.folder / MANIFEST, *self.folder.glob(f"{RANK_FOLDERS}/{MANIFEST}")]):
            try:
                found.append((path, path.stat()))
            except OSError:
                # Not there, or no more.
                continue
        return found
