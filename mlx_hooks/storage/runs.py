"""Saved runs: activations in folders that say how they were made.

``base_dir/experiment/model/run`` holds ``activations.safetensors`` and ``metadata.json``. A run appears whole and goes
at once; two processes may save in the same place.
"""

import json
import os
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..activations import ActivationCache
from ..errors import HookError
from ..extraction import ExtractionConfig
from . import metadata as about
from .content import Content
from .files import clear_left, move_folder, whole_folder
from .index import ACTIVATIONS, METADATA, Row, RunIndex, experiments, rewrite_experiment
from .query import QueryResult, criteria, warn_of
from .tensors import Array

BASE_DIR_VARIABLE = "ACTIVATION_BASE_DIR"


class ActivationSaver:
    """Saves activations together with how they were made.

        saver = ActivationSaver("saved_activations", experiment_name="hello_world_test")
        config = ExtractionConfig(extract_resid_out=True)
        cache = model.forward("Hello, world!", ["last"], config)
        saver.save(cache, model, ["last"], None, config, tag="first_test")
        saver.save_cache(cache, tag="the_same")                 # what forward and extract_cache return says it itself

    Args:
        base_dir: the folder of all experiments; made when it is needed.
        experiment_name: the folder of this one.

    Raises:
        HookError: for a name that is no folder's.
    """

    def __init__(self, base_dir: str | Path, experiment_name: str = "default") -> None:
        self.base_dir = _base(base_dir)
        self.experiment_name = about.check_name("experiment_name", experiment_name)
        self._is_clear = False

    @classmethod
    def from_env(cls, experiment_name: str = "default") -> "ActivationSaver":
        """A saver whose base directory is that of the environment variable ``ACTIVATION_BASE_DIR``.

        Raises:
            HookError: the variable is not set.
        """
        return cls(_base_of_the_environment(), experiment_name)

    def __repr__(self) -> str:
        return f"ActivationSaver(base_dir={str(self.base_dir)!r}, experiment_name={self.experiment_name!r})"

    def save(
        self,
        activations: ActivationCache | Array | Mapping[str, Array],
        model: Any,
        target_token_positions: Any,
        interventions: Sequence[Any] | None,
        extraction_config: ExtractionConfig | Mapping[str, Any] | None,
        other_metadata: Mapping[str, Any] | None = None,
        tag: str | None = None,
        *,
        pivot_positions: Sequence[int] | None = None,
    ) -> Path:
        """Save activations as a run of their own.

        Args:
            activations: an activation cache, an array or arrays by name, of MLX or NumPy; bit for bit.
            model: the HookedModel that made them; or its name, which is the caller's to know.
            target_token_positions, interventions, extraction_config, pivot_positions: as they were given to
                ``forward``, whose caches know them: None is then what the cache says, save for interventions, where it
                is none. Every cache that the model made knows what edited it (``cache.edited_by``). Of an
                intervention's large arrays a hash is kept.
            other_metadata: more for metadata.json, under keys of the caller's own, as JSON.
            tag: a text to find the run by.

        Returns:
            the run's folder.

        Raises:
            HookError: for what cannot be saved, before anything is written; and when it cannot be written: then nothing
                of it is left.
        """
        known = _known(activations)
        if target_token_positions is None:
            target_token_positions = known.get("target_token_positions")
        extraction_config = known.get("extraction_config") if extraction_config is None else extraction_config
        pivot_positions = known.get("pivot_positions") if pivot_positions is None else pivot_positions
        _check_agreement(known, target_token_positions, interventions, extraction_config, pivot_positions)
        sizes = _sizes(known, model)
        name = getattr(model, "model_name", model)
        if not isinstance(name, str) or not name.strip():
            raise HookError(f"model is a HookedModel or its name, got {model!r}.")
        about.check_text("A model's name", name)
        time = about.now()
        run = about.run_id(time)
        content = Content(activations)
        described = {
            "format": 1,
            "run_id": run,
            "tag": None if tag is None else about.check_tag(tag),
            "save_time": time.isoformat(timespec="microseconds"),
            "experiment_name": self.experiment_name,
            "model_name": name,
            "target_token_positions": about.plain_positions(target_token_positions),
            "pivot_positions": about.plain_pivots(pivot_positions),
            "interventions": about.plain_interventions(interventions),
            "extraction_config": about.plain_config(extraction_config),
            "model": about.plain(sizes, "model"),
            "versions": about.versions(),
            "keys": content.keys,
            **about.plain_custom(other_metadata),
        }
        path = self.base_dir / self.experiment_name / about.model_folder(name) / run
        try:
            self.base_dir.mkdir(parents=True, exist_ok=True)
            if not self._is_clear:
                clear_left(self.base_dir)
                self._is_clear = True
            with whole_folder(path, drafts=self.base_dir) as draft:
                content.write(draft / ACTIVATIONS)
                (draft / METADATA).write_text(json.dumps(described, indent=2), encoding="utf-8")
        except OSError as error:
            raise HookError(
                f"The run could not be saved in {self.base_dir}: {error.strerror or error}. Nothing of it is left."
            ) from error
        return path

    def save_cache(
        self, cache: ActivationCache, other_metadata: Mapping[str, Any] | None = None, tag: str | None = None
    ) -> Path:
        """Save an activation cache that says how it was made: one of ``forward`` or ``extract_cache``, or a loaded one.

        Raises:
            HookError: the cache does not say it; and as ``save`` does.
        """
        known = cache.metadata if isinstance(cache, ActivationCache) else {}
        missing = [key for key in ("model_name", "target_token_positions", "extraction_config") if key not in known]
        if missing:
            raise HookError(
                f"The activation cache does not say its {missing[0]}, as those of forward and extract_cache do: "
                "use save."
            )
        return self.save(
            cache,
            known["model_name"],
            known["target_token_positions"],
            known.get("interventions"),
            known["extraction_config"],
            other_metadata,
            tag,
        )

    def rename_experiment(self, new_experiment_name: str) -> None:
        """Rename the experiment's folder, and with it the experiment of its runs; this saver goes on in it.

        Raises:
            HookError: there is no such experiment, or there is one of the new name already.
        """
        new = about.check_name("new_experiment_name", new_experiment_name)
        source, target = self.base_dir / self.experiment_name, self.base_dir / new
        if not source.is_dir():
            there = ", ".join(experiments(self.base_dir)) or "none"
            raise HookError(f"There is no experiment {self.experiment_name!r} in {self.base_dir}. There are: {there}.")
        if target.exists():
            raise HookError(
                f"There is an experiment {new!r} already: move runs to it with QueryResult.update_run_experiment."
            )
        try:
            # The folder says to which experiment a run belongs, so all of them change at once.
            move_folder(source, target, below=self.base_dir)
        except OSError as error:
            raise HookError(f"The experiment {self.experiment_name!r} cannot be renamed: {error}.") from error
        self.experiment_name = new
        unreadable = [
            row for row in RunIndex(self.base_dir).rows(new) if not rewrite_experiment(_path(self.base_dir, row))
        ]
        if unreadable:
            warn_of(unreadable, f"keep their old experiment name in {METADATA}, which cannot be rewritten")


class ActivationLoader:
    """Finds and loads what an :class:`ActivationSaver` saved, in this process or in another.

        loader = ActivationLoader("saved_activations", "hello_world_test")
        found = loader.query(model_name="gpt2", extraction_config=ExtractionConfig(extract_attn_pattern=True))
        print(f"Found {len(found.results)} matching runs")
        activations, metadata = found.load(-1)

    Args:
        base_dir: the folder of all experiments.
        experiment_name: the one that queries look in.
    """

    def __init__(self, base_dir: str | Path, experiment_name: str = "default") -> None:
        self.base_dir = _base(base_dir)
        self.experiment_name = about.check_name("experiment_name", experiment_name)
        self._index = RunIndex(self.base_dir)

    @classmethod
    def from_env(cls, experiment_name: str = "default") -> "ActivationLoader":
        """A loader whose base directory is that of the environment variable ``ACTIVATION_BASE_DIR``.

        Raises:
            HookError: the variable is not set.
        """
        return cls(_base_of_the_environment(), experiment_name)

    @classmethod
    def from_saver(cls, saver: ActivationSaver) -> "ActivationLoader":
        """A loader of what a saver saves."""
        return cls(saver.base_dir, saver.experiment_name)

    def __repr__(self) -> str:
        return f"ActivationLoader(base_dir={str(self.base_dir)!r}, experiment_name={self.experiment_name!r})"

    def query(
        self,
        experiment_name: str | None = None,
        model_name: str | None = None,
        target_token_positions: Any = None,
        pivot_positions: Sequence[int] | None = None,
        save_time: str | None = None,
        custom_keys: Mapping[str, Any] | None = None,
        extraction_config: ExtractionConfig | Mapping[str, Any] | None = None,
        interventions: Sequence[Any] | None = None,
        tag: str | None = None,
    ) -> QueryResult:
        """The runs to which everything that is given applies, as the folders are now.

        Args:
            experiment_name: another experiment than the loader's; "*" for all.
            model_name: as saved, or the last part of it: "gpt2" finds "openai-community/gpt2".
            target_token_positions, pivot_positions: as saved.
            save_time: "2023-04-15_14-30-25", or its beginning ("2023-04-15"), in the local time of the saver.
            custom_keys: the caller's own keys and their values; others may be there.
            extraction_config: what it sets must be set so in the run, which may have kept more. With a list of
                ``attn_heads`` the run has these among its heads.
            interventions: the same ones in the same order; ``[]`` for none.
            tag: as saved.

        Warns:
            UnreadableRunWarning: names the runs that were passed over because they cannot be read.

        Raises:
            HookError: for a criterion that no run could have, and a base directory that cannot be read.
        """
        experiment = self.experiment_name if experiment_name is None else experiment_name
        if experiment != about.EVERY_EXPERIMENT:
            about.check_name("experiment_name", experiment)
        accepts = criteria(
            model_name,
            target_token_positions,
            pivot_positions,
            save_time,
            custom_keys,
            extraction_config,
            interventions,
            tag,
        )
        try:
            if not self.base_dir.is_dir():
                raise HookError(f"There is no folder {self.base_dir}: nothing was saved there.")
            rows = self._index.rows(None if experiment == about.EVERY_EXPERIMENT else experiment)
        except OSError as error:
            raise HookError(f"{self.base_dir} cannot be read: {error.strerror or error}.") from error
        if unreadable := [row for row in rows if row.problem]:
            warn_of(unreadable, "are passed over, since they cannot be read")
        found = [row for row in rows if not row.problem]
        for accept in accepts:
            found = [row for row in found if accept(row)]
        # One after the other, since pairs to compare would be ten thousand tuples.
        found.sort(key=attrgetter("run"))
        found.sort(key=attrgetter("time"))
        return QueryResult.of_rows(self.base_dir, found)


def _known(activations: Any) -> Mapping[str, Any]:
    """What activations say of how they were made."""
    if not isinstance(activations, ActivationCache):
        return {}
    edits = {} if activations.edited_by is None else {"interventions": activations.edited_by}
    return edits | activations.metadata


def _check_agreement(known: Mapping[str, Any], positions: Any, interventions: Any, config: Any, pivots: Any) -> None:
    """Raises HookError where a cache says otherwise how it was made than the caller does."""
    is_told = known.get("target_token_positions") is not None
    for name, given, plain, is_known in (
        ("target_token_positions", positions, about.plain_positions, is_told),
        ("interventions", interventions, about.plain_interventions, "interventions" in known),
        ("extraction_config", config, about.plain_config, known.get("extraction_config") is not None),
        # No pivots are something to know where positions are known.
        ("pivot_positions", pivots, about.plain_pivots, is_told or known.get("pivot_positions") is not None),
    ):
        if not is_known:
            continue
        made, told = _differing(plain(known.get(name)), plain(given))
        if made != told:
            instead = ", or save it with save_cache" if known.get("model_name") else " (cache.edited_by)"
            raise HookError(
                f"The activation cache was made with {name} {made!r:.200}: give these{instead}; got {told!r:.200}."
            )


def _differing(made: Any, told: Any) -> tuple[Any, Any]:
    """Of two mappings the keys that differ, in which the order of heads says nothing; anything else as it is."""
    if not isinstance(made, dict) or not isinstance(told, dict):
        return made, told
    keys = [key for key in made if _without_order(key, made[key]) != _without_order(key, told.get(key))]
    return {key: made[key] for key in keys}, {key: told.get(key) for key in keys}


def _without_order(key: str, value: Any) -> Any:
    return {(h["layer"], h["head"]) for h in value} if key == "attn_heads" and isinstance(value, list) else value


def _sizes(known: Mapping[str, Any], model: Any) -> Any:
    """The sizes of the model that made the activations.

    Raises:
        HookError: the model given has others than the cache's.
    """
    made = known.get("model")
    if not hasattr(model, "cfg"):
        return made
    own = model.cfg.to_dict()
    ours, theirs = _differing(about.plain(made, "model"), about.plain(own, "model"))
    if made is not None and ours != theirs:
        raise HookError(
            f"The activation cache was made by another model, {known.get('model_name')!r} with {ours!r:.200}: give "
            f"that one, or its name; got {model.model_name!r} with {theirs!r:.200}."
        )
    return own


def _base(base_dir: Any) -> Path:
    if not isinstance(base_dir, str | Path) or not str(base_dir) or "\0" in str(base_dir):
        raise HookError(f"base_dir is the path of a folder, got {base_dir!r}.")
    return Path(base_dir).expanduser()


def _base_of_the_environment() -> str:
    base_dir = os.environ.get(BASE_DIR_VARIABLE, "")
    if not base_dir:
        raise HookError(f"The environment variable {BASE_DIR_VARIABLE} is not set: give it the path of a folder.")
    return base_dir


def _path(base: Path, row: Row) -> Path:
    return base / row.experiment / row.folder / row.run
