"""The folder with experiments that a server was started with: its traits' vectors, by name.

Nothing is named by a path, and nothing outside the folder is read, not even where a link inside leads out of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_hooks import HookError, UnknownVectorError
from mlx_hooks.analysis.traits.experiment import Experiment, Trait, is_folder
from mlx_hooks.analysis.traits.vectors import TraitVector

from . import logs
from .errors import ApiError
from .schemas.fields import is_folder_name

FOLDER = "the folder with experiments"


class StoredTraits:
    """What lies in a folder with experiments.

        stored = StoredTraits(config().experiments)
        stored.listing()                         # [{"name": "moods", "traits": [...]}]
        stored.vectors("moods", ["calm"])        # yields TraitVectors

    Args:
        root: the folder; None where the server has none.

    Raises:
        ApiError: there is none, or no more.
    """

    def __init__(self, root: Path | None) -> None:
        if root is None:
            raise ApiError(
                400,
                "This server was started without stored vectors: start it with --experiments DIR, or send 'vectors'.",
                code="no_experiments",
                param="experiment",
            )
        # So that whatever an error tells of a file begins with it.
        self._root = root.resolve()
        if not self._root.is_dir():
            raise ApiError(404, f"The server has {FOLDER} no more.", code="experiment_not_found", param="experiment")

    # What there is

    def listing(self, experiment: str | None = None) -> list[dict[str, Any]]:
        """All experiments, or one, with the names of their traits' vectors; no vector is opened.

        Of what cannot be read nothing is listed, and all else is: who asks for it is told.

        Raises:
            ApiError: the experiment that is asked for is not there, cannot be read, or lies outside.
        """
        if experiment is not None:
            return [{"name": experiment, "traits": self._traits_of(experiment)}]
        return [{"name": name, "traits": self._readable_of(name)} for name in self._experiments()]

    def _experiments(self) -> list[str]:
        try:
            folders = [path for path in sorted(self._root.iterdir()) if is_folder(path) and self._is_inside(path)]
        except OSError as error:
            message = f"The server cannot read {FOLDER}: {error.strerror}."
            raise ApiError(404, message, code="experiment_not_found", param="experiment") from error
        return [path.name for path in folders if is_folder_name(path.name)]

    def _readable_of(self, name: str) -> list[dict[str, Any]]:
        try:
            return self._traits_of(name)
        except ApiError:
            return []

    def _traits_of(self, name: str) -> list[dict[str, Any]]:
        experiment = self._experiment(name)
        with self._refusing(404, "trait_not_found"):
            traits = experiment.traits()
        return [self._listed(trait) for trait in traits if all(map(self._is_inside, _read_for(trait)))]

    def _listed(self, trait: Trait) -> dict[str, Any]:
        try:
            files = trait.vectors()
        except HookError:
            files = []
        vectors = [{"method": file.method, "layer": file.layer} for file in files]
        try:
            title = trait.display_name
        except HookError:
            # Its settings are broken.
            title = trait.name
        return {"name": trait.name, "display_name": title, "vectors": vectors}

    # What is watched

    def vectors(
        self, name: str, traits: list[str] | None = None, method: str | None = None, layer: int | None = None
    ) -> Iterator[TraitVector]:
        """One vector of each trait, with the way in which prompts are put.

        Args:
            name: the experiment.
            traits: all of its traits that have such a vector, if None.
            method, layer: the trait's own choice, if None.

        Raises:
            ApiError: one is not there, cannot be read, or lies outside.
        """
        experiment = self._experiment(name)
        with self._refusing(404, "trait_not_found"):
            names = traits or [trait.name for trait in experiment.traits()]
        if not names:
            raise ApiError(404, f"The experiment {name} has no traits.", code="trait_not_found", param="experiment")
        missing: ApiError | None = None
        found = 0
        for i, wanted in enumerate(names):
            param = f"traits[{i}]" if traits else "experiment"
            with self._refusing(404, "trait_not_found", param):
                trait = experiment.trait(wanted)
            for path in _read_for(trait):
                self._check_inside(path)
            try:
                vector = self._vector(trait, method, layer, param)
            except ApiError as error:
                if traits or error.code != "vector_not_found":
                    raise
                missing = missing or error
                continue
            found += 1
            yield vector
        if missing is not None and not found:
            raise missing

    def _vector(self, trait: Trait, method: str | None, layer: int | None, param: str) -> TraitVector:
        with self._refusing(400, "vector_unreadable", param):
            try:
                return trait.find(method=method, layer=layer)
            except UnknownVectorError as error:
                missing = error
        with self._refusing(404, "vector_not_found", param):
            raise missing

    def _experiment(self, name: str) -> Experiment:
        with self._refusing(404, "experiment_not_found"):
            experiment = Experiment(self._root, name)
        self._check_inside(experiment.folder)
        return experiment

    # What is told

    @contextmanager
    def _refusing(self, status: int, code: str, param: str = "experiment") -> Iterator[None]:
        try:
            yield
        except HookError as error:
            # Where the folder lies is nobody's business; what is in it may be told.
            inside = str(error).replace(f"{self._root}/", "").replace(str(self._root), FOLDER)
            raise ApiError(status, logs.scrub(inside), code=code, param=param) from error

    def _is_inside(self, path: Path) -> bool:
        """Links are followed: what they lead to counts."""
        try:
            return path.resolve().is_relative_to(self._root)
        except (OSError, RuntimeError):
            # They lead in a circle.
            return False

    def _check_inside(self, path: Path) -> None:
        if not self._is_inside(path):
            raise ApiError(
                403,
                f"{path.relative_to(self._root)} leads out of {FOLDER}, by a link: it is not read.",
                code="path_not_allowed",
                param="experiment",
            )


def _read_for(trait: Trait) -> Iterator[Path]:
    """What is read to find a trait's vector, folders before what is in them. Its captures are not."""
    yield trait.folder
    for name in ("trait.json", "chat_template.jinja", "extraction"):
        yield trait.folder / name
    yield trait.vectors_folder
    try:
        files = trait.vectors()
    except HookError:
        # Said when it is looked for.
        return
    for file in files:
        yield file.path
