"""What a query asks of runs, and the runs that it found: to be loaded, moved and removed."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, cast, overload

import numpy as np

from ..errors import HookError, UnreadableRunWarning
from ..extraction import ExtractionConfig
from . import metadata as about
from .content import read_content
from .files import move_folder, remove_folder
from .index import ACTIVATIONS, METADATA, Row, read_metadata, reason, rewrite_experiment


@dataclass(slots=True)
class SavedRun:
    """One run that a query found.

    Args:
        base_dir: the folder of all experiments.
        experiment_name: the experiment to which it belongs.
        folder: that of its model.
        run_id: the name of its own folder, which begins with the time when it was saved.
        model_name, tag, save_time: of its metadata.
    """

    base_dir: Path
    experiment_name: str
    folder: str
    run_id: str
    model_name: str
    tag: str | None
    save_time: str

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.base_dir / self.experiment_name / self.folder / self.run_id

    @property
    def metadata(self) -> dict[str, Any]:
        """The whole of its metadata, read from its file.

        Raises:
            HookError: it cannot be read.
        """
        try:
            return read_metadata(self.path)
        except (OSError, ValueError) as error:
            if not self.path.is_dir():
                raise HookError(f"The run {self.run_id} is not at {self.path} any more: query again.") from error
            raise HookError(f"The run at {self.path} cannot be read: {reason(error)}.") from error

    def load(self) -> tuple[Any, dict[str, Any]]:
        """What was saved, and the metadata. Values are read from the file when they are asked for, one by one.

        Returns:
            activations: an ActivationCache as it was saved; an array; or a mapping of arrays by name.
            metadata: of metadata.json.

        Raises:
            HookError: it cannot be read; one sentence says why.
        """
        metadata = self.metadata
        try:
            return read_content(self.path / ACTIVATIONS, metadata), metadata
        except (OSError, ValueError) as error:
            why = reason(error, ACTIVATIONS)
            raise HookError(f"The activations of the run at {self.path} cannot be read: {why}.") from error


class QueryResult:
    """The runs that a query found, oldest first. What is printed at an index is what the index means everywhere.

        found = loader.query(tag="batch_0")
        print(found)
        activations, metadata = found.load(-1)                  # the newest
        found.load("2023-04-15_14-30-25")                       # by the beginning of its folder's name

    A run is named by its index, or by its folder's name or the beginning of it, where one run begins so.
    """

    def __init__(self, results: Sequence[SavedRun] = ()) -> None:
        self._results: list[SavedRun] | None = list(results)
        self._rows: list[Row] = []
        self._base = Path()

    @classmethod
    def of_rows(cls, base_dir: Path, rows: list[Row]) -> "QueryResult":
        """The runs below a base directory, of their rows."""
        result = cls()
        result._results, result._rows, result._base = None, rows, base_dir
        return result

    @property
    def results(self) -> list[SavedRun]:
        """The runs."""
        # Ten thousand runs, of which one is loaded, are not made before somebody asks.
        if self._results is None:
            base = self._base
            self._results = [
                SavedRun(base, r.experiment, r.folder, r.run, r.model_name, r.tag, r.save_time) for r in self._rows
            ]
        return self._results

    def __len__(self) -> int:
        return len(self._rows if self._results is None else self._results)

    def __iter__(self) -> Iterator[SavedRun]:
        return iter(self.results)

    @overload
    def __getitem__(self, index: int) -> SavedRun: ...
    @overload
    def __getitem__(self, index: slice) -> "QueryResult": ...
    def __getitem__(self, index: int | slice) -> "SavedRun | QueryResult":
        return QueryResult(self.results[index]) if isinstance(index, slice) else self.results[index]

    def __repr__(self) -> str:
        if not self.results:
            return "No runs."
        rows = []
        for i, run in enumerate(self.results):
            tag = "" if run.tag is None else f", tag {run.tag}"
            rows.append(f"{i} - {run.run_id}: experiment {run.experiment_name}, model {run.model_name}{tag}")
        return "\n".join(rows)

    def get_paths(self) -> list[Path]:
        """The runs' folders, in order."""
        return [run.path for run in self.results]

    def load(self, which: int | str = -1) -> tuple[Any, dict[str, Any]]:
        """What was saved, and its metadata; see :meth:`SavedRun.load`.

        Raises:
            HookError: there is no such run, or it cannot be read.
        """
        return self.results[self._at(which)].load()

    def remove(self, which: int | str) -> None:
        """Delete a run: its folder, with all that lies in it. The others keep their order.

        Raises:
            HookError: there is no such run, or it cannot be deleted.
        """
        at = self._at(which)
        run = self.results[at]
        try:
            remove_folder(run.path, drafts=run.base_dir)
        except OSError as error:
            raise _cannot(run, "removed", error) from error
        del self.results[at]

    def update_run_experiment(self, which: int | str, new_experiment_name: str) -> None:
        """Move a run to another experiment; the result shows it there.

        Raises:
            HookError: there is no such run, or it cannot be moved.
        """
        new = about.check_name("new_experiment_name", new_experiment_name)
        run = self.results[self._at(which)]
        if new == run.experiment_name:
            return
        target = run.base_dir / new / run.folder / run.run_id
        try:
            # The folder says to which experiment it belongs, so it is at one or at the other at any time.
            move_folder(run.path, target, below=run.base_dir)
        except OSError as error:
            raise _cannot(run, "moved", error) from error
        run.experiment_name = new
        if not rewrite_experiment(target):
            warn_of([run], f"keeps its old experiment name in {METADATA}, which cannot be rewritten")

    def _at(self, which: int | str) -> int:
        """The index of a run in ``results``."""
        if not self.results:
            raise HookError("The query found no runs.")
        if isinstance(which, str):
            found = [i for i, run in enumerate(self.results) if which and run.run_id.startswith(which)]
            if len(found) == 1:
                return found[0]
            names = [self.results[i].run_id for i in found] or [run.run_id for run in self.results]
            listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            if found:
                raise HookError(
                    f"{len(found)} runs begin with {which!r}: {listed}. Give more of the name, or an index."
                )
            raise HookError(f"No run found begins with {which!r}. There are: {listed}.")
        if isinstance(which, bool) or not isinstance(which, int | np.integer):
            raise HookError(f"A run is named by an index or by its folder's name, got {which!r}.")
        count = len(self.results)
        if not -count <= which < count:
            raise HookError(f"There is no run {which}: there are {count}, 0 to {count - 1}, -1 is the newest.")
        return int(which) % count


_Accept = Callable[[Row], bool]


def criteria(
    model_name: Any,
    target_token_positions: Any,
    pivot_positions: Any,
    save_time: Any,
    custom_keys: Any,
    extraction_config: Any,
    interventions: Any,
    tag: Any,
) -> list[_Accept]:
    """A test per criterion that is given."""
    accepts: list[_Accept] = []
    if model_name is not None:
        if not isinstance(model_name, str):
            raise HookError(f"model_name is a text, got {model_name!r}.")
        wanted = model_name.rstrip("/")
        accepts.append(_cached(attrgetter("model_name"), lambda name: wanted in (name.rstrip("/"), Path(name).name)))
    if tag is not None:
        about.check_tag(tag)
        accepts.append(lambda row: row.tag == tag)
    if save_time is not None:
        time = about.digits(save_time)
        accepts.append(lambda row: row.digits.startswith(time))
    if target_token_positions is not None:
        positions = about.canonical(about.plain_positions(target_token_positions))
        accepts.append(lambda row: row.positions == positions)
    if pivot_positions is not None:
        pivots = about.canonical(about.plain_pivots(pivot_positions))
        accepts.append(lambda row: row.pivots == pivots)
    if interventions is not None:
        edits = about.canonical(about.plain_interventions(interventions))
        accepts.append(lambda row: row.interventions == edits)
    if custom_keys is not None:
        # Ten thousand mappings are not parsed for it: that would take longer than all the rest.
        items = about.canonical_items(about.plain_custom(custom_keys, "custom_keys"))
        accepts.append(lambda row: all(item in row.custom for item in items))
    if extraction_config is not None:
        config = _set_flags(extraction_config)
        accepts.append(_cached(attrgetter("config"), lambda text: _has_flags(json.loads(text), config)))
    return accepts


def _cached(text: Callable[[Row], str], test: Callable[[str], bool]) -> _Accept:
    """A test on a text of the row; of equal texts one is tested."""
    answers: dict[str, bool] = {}

    def accept(row: Row) -> bool:
        key = text(row)
        if key not in answers:
            answers[key] = test(key)
        return answers[key]

    return accept


def _set_flags(config: ExtractionConfig | Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration in a query sets: of a mapping all keys, of an ExtractionConfig what is no default."""
    plain = cast(dict[str, Any], about.plain_config(config))
    if isinstance(config, Mapping):
        return {key: plain[key] for key in config}
    return {f.name: plain[f.name] for f in fields(config) if plain[f.name] != f.default}


def _has_flags(found: Any, wanted: dict[str, Any]) -> bool:
    if not isinstance(found, dict):
        return False
    wanted = dict(wanted)
    heads, held = wanted.pop("attn_heads", "all"), found.get("attn_heads", "all")
    if heads != "all" and held != "all" and not (isinstance(held, list) and all(head in held for head in heads)):
        return False
    return all(key in found and found[key] == value for key, value in wanted.items())


def _cannot(run: SavedRun, done: str, error: OSError) -> HookError:
    if isinstance(error, FileNotFoundError):
        return HookError(f"The run {run.run_id} is not at {run.path} any more: query again.")
    return HookError(f"The run at {run.path} cannot be {done}: {error.strerror or error}.")


def warn_of(runs: Sequence[Row | SavedRun], what: str) -> None:
    names = []
    for run in runs[:10]:
        names.append(
            str(run.path)
            if isinstance(run, SavedRun)
            else f"{run.experiment}/{run.folder}/{run.run}" + (f" ({run.problem})" if run.problem else "")
        )
    more = f" and {len(runs) - 10} more" if len(runs) > 10 else ""
    shown = ", ".join(names).encode(errors="backslashreplace").decode()
    warnings.warn(f"Saved runs {what}: {shown}{more}.", UnreadableRunWarning, stacklevel=3)
