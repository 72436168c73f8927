"""Traits on disk: an experiment is a folder, and each trait in it has a folder with its prompts, vectors and captures.

    experiments/{experiment}/inference_prompts.txt              prompts that all its traits share
    experiments/{experiment}/{trait}/trait.json                 settings, if it has any
                                    /chat_template.jinja        its own chat template, if it has one
                                    /extraction/positive.txt, negative.txt, held_out_positive.txt, held_out_negative.txt
                                    /extraction/vectors/{method}_layer{N}.safetensors
                                    /inference/...              what captures write

Files of prompts may be ``.json`` too. A folder is a trait if it has an ``extraction`` folder.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import HookError, UnknownVectorError
from .prompts import SUFFIXES, Chat, read_prompts
from .vectors import GIVEN, METHODS, TraitVector

INFERENCE_PROMPTS = "inference_prompts.txt"
_SETTINGS = "trait.json"
_TEMPLATE = "chat_template.jinja"
_ORDER = (*METHODS, GIVEN)
_FILE = re.compile(rf"({'|'.join(_ORDER)})_layer(0|[1-9]\d*)\.safetensors")


@dataclass(frozen=True)
class TraitSettings:
    """What ``trait.json`` says; each may be missing.

    Args:
        display_name: what the trait is called in titles.
        chat: whether prompts go through the chat template; None: if there is one.
        system: a system message before each prompt.
        method: which method's vector is to be taken.
        layer: which layer's.
        span: which tokens vectors are made of.

    Raises:
        HookError: for values of other types.
    """

    display_name: str | None = None
    chat: bool | None = None
    system: str | None = None
    method: str | None = None
    layer: int | None = None
    span: str | None = None

    def __post_init__(self) -> None:
        for name in ("display_name", "system", "span"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise HookError(f"{name} is a text that is not empty, got {value!r}.", field=name)
        if self.chat not in (None, True, False):
            raise HookError(f"chat is true, false or null, got {self.chat!r}.", field="chat")
        check_choice(self.method, self.layer)


class VectorFile(NamedTuple):
    """Where a vector lies, and what its name says of it."""

    method: str
    layer: int
    path: Path

    @property
    def name(self) -> str:
        return f"{self.method}_layer{self.layer}"


class Choice(NamedTuple):
    """A trait's vector that was chosen among several, and why."""

    vector: TraitVector
    why: str


@dataclass(frozen=True)
class Trait:
    """A trait's folder. What is in it is read when it is asked for, so that one broken trait does not stop others.

        trait = Experiment("experiments", "capitals").trait("sum")
        trait.find()                            # the vector to be used: TraitVector('sum', probe_layer3, ...)
        trait.find(method="ica", layer=2)

    Args:
        folder: its name is the trait's.
    """

    folder: Path

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.name

    @property
    def display_name(self) -> str:
        """What it is called in titles: as its settings say, or ``social_proof`` -> Social Proof."""
        return self.settings.display_name or self.name.replace("_", " ").title()

    @cached_property
    def settings(self) -> TraitSettings:
        """What ``trait.json`` says.

        Raises:
            HookError: for a file that cannot be read, unknown keys and values of other types.
        """
        path = self.folder / _SETTINGS
        try:
            plain = json.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            return TraitSettings()
        except OSError as error:
            raise HookError(f"{path} cannot be read: {error.strerror or error}.") from error
        except ValueError as error:
            raise HookError(f"{path} is no JSON: {error}.") from error
        known = [f.name for f in fields(TraitSettings)]
        if not isinstance(plain, dict) or set(plain) - set(known):
            raise HookError(f"{path} is a mapping with {', '.join(known)}, got {plain!r:.200}.")
        try:
            return TraitSettings(**plain)
        except HookError as error:
            raise HookError(f"{path}: {error}") from error

    @cached_property
    def chat(self) -> Chat:
        """How its prompts are put to a model.

        Raises:
            HookError: for settings or a template that cannot be read, or that contradict each other.
        """
        path = self.folder / _TEMPLATE
        try:
            template = path.read_text(encoding="utf-8-sig") if path.exists() else None
        except (OSError, UnicodeDecodeError) as error:
            raise HookError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        try:
            return Chat(self.settings.chat, self.settings.system, template)
        except HookError as error:
            raise HookError(f"The trait {self.name}: {error}") from error

    # Prompts

    def prompts(self, which: str) -> list[str]:
        """Texts to make vectors of: "positive" ones, which have the trait, or "negative" ones.

        Raises:
            HookError: when there is no such file, two of them, or none that can be read.
        """
        path = self._prompts_file(which)
        if path is None:
            wanted = " or ".join(f"{which}{suffix}" for suffix in SUFFIXES)
            raise HookError(f"The trait {self.name} has no {which} prompts: write {self._extraction / wanted}.")
        return read_prompts(path)

    def held_out(self) -> tuple[list[str], list[str]] | None:
        """Positive and negative texts to judge vectors by; None where no such files are.

        Raises:
            HookError: for one file without the other.
        """
        names = [f"held_out_{which}" for which in ("positive", "negative")]
        if not any(self._prompts_file(name) for name in names):
            return None
        positive, negative = (self.prompts(name) for name in names)
        return positive, negative

    def _prompts_file(self, which: str) -> Path | None:
        found = [path for suffix in SUFFIXES if (path := self._extraction / f"{which}{suffix}").exists()]
        if len(found) > 1:
            raise HookError(f"The trait {self.name} has both {found[0]} and {found[1].name}: remove one.")
        return found[0] if found else None

    # Vectors

    @property
    def _extraction(self) -> Path:
        return self.folder / "extraction"

    @property
    def vectors_folder(self) -> Path:
        """Where its vectors are written."""
        return self._extraction / "vectors"

    def vectors(self) -> list[VectorFile]:
        """Its files of vectors, by method in the stated order, then by layer. They are not opened."""
        named = [(path, _FILE.fullmatch(path.name)) for path in _entries(self.vectors_folder)]
        found = [VectorFile(name[1], int(name[2]), path) for path, name in named if name is not None]
        return sorted(found, key=lambda file: (_ORDER.index(file.method), file.layer))

    def find(self, method: str | None = None, layer: int | None = None) -> TraitVector:
        """The vector to be used.

        1. The method is the one asked for, else that of the settings, else the first of probe, mean_diff, ica, gradient
           of which there is a vector (at the layer, where one is asked for).
        2. The layer is the one asked for, else that of the settings, else the one with the best accuracy on held-out
           prompts; of equals, the one with the larger effect size, then the lower one. Files that cannot be read are
           passed over, and named by :meth:`choose`, as long as there is one that can.

        Raises:
            UnknownVectorError: when there is none; lists what there is.
            HookError: for files that cannot be read.
        """
        return self.choose(method, layer).vector

    def choose(self, method: str | None = None, layer: int | None = None) -> Choice:
        """What :meth:`find` answers, and why."""
        check_choice(method, layer)
        files = self.vectors()
        if not files:
            raise UnknownVectorError(
                f"The trait {self.name} has no vectors in {self.vectors_folder}: extract them first."
            )
        because_method = "as asked" if method is not None else f"by {_SETTINGS}"
        because_layer = "as asked" if layer is not None else f"by {_SETTINGS}"
        method = self.settings.method if method is None else method
        layer = self.settings.layer if layer is None else layer
        found = [file for file in files if layer in (None, file.layer)]
        if method is None and found:
            method, because_method = found[0].method, f"the first of {', '.join(METHODS)} that there is"
            if method == GIVEN:
                because_method = "there is no other"
        found = [file for file in found if file.method == method]
        if not found:
            wanted = [f"method {method} ({because_method})"] if method is not None else []
            wanted += [f"layer {layer} ({because_layer})"] if layer is not None else []
            raise UnknownVectorError(
                f"The trait {self.name} has no vector of {' and '.join(wanted)}. "
                f"There are: {', '.join(file.name for file in files)}."
            )
        if layer is None:
            vector, because_layer = self._best(found)
        else:
            vector = self.read(found[0])
        return Choice(vector, f"{vector.method}: {because_method}; layer {vector.layer}: {because_layer}")

    def _best(self, found: Sequence[VectorFile]) -> tuple[TraitVector, str]:
        """The best vector of those that can be read, and why it is that one."""
        vectors: list[TraitVector] = []
        broken: dict[VectorFile, HookError] = {}
        for file in found:
            try:
                vectors.append(self.read(file))
            except HookError as error:
                broken[file] = error
        if not vectors:
            raise broken[found[0]]
        best, why = _best(vectors)
        passed = ", ".join(file.name for file in broken)
        return best, f"{why} (passed over, since it cannot be read: {passed})" if broken else why

    def read(self, file: VectorFile) -> TraitVector:
        """The vector of one of :meth:`vectors`; one that does not say how its prompts were put has the trait's way.

        Raises:
            HookError: for a file that cannot be read, or that is called as another vector.
        """
        vector = TraitVector.load(file.path)
        if vector.name != file.name:
            raise HookError(f"{file.path} holds the vector {vector.name}: a file is called as its vector is.")
        # The folder may have been renamed or copied since.
        return replace(vector, trait=self.name, chat=self.chat if vector.chat is None else vector.chat)


@dataclass(frozen=True)
class Experiment:
    """A folder of traits.

        experiment = Experiment("experiments", "capitals")
        [trait.name for trait in experiment.traits()]

    Args:
        root: the folder of experiments.
        name: the experiment's folder in it.

    Raises:
        HookError: when there is none; lists what there is.
    """

    root: Path
    name: str

    def __init__(self, root: str | Path, name: str) -> None:
        object.__setattr__(self, "root", Path(root))
        object.__setattr__(self, "name", name)
        if not self.root.is_dir():
            raise HookError(f"There is no folder of experiments {self.root}.")
        found = [path.name for path in _folders(self.root)]
        if name not in found:
            raise HookError(f"There is no experiment {name!r} in {self.root}. {_there_are(found)}")

    @property
    def folder(self) -> Path:
        """Where everything of it lies."""
        return self.root / self.name

    def traits(self) -> list[Trait]:
        """Its traits by name: the folders that have an ``extraction`` folder."""
        return [Trait(path) for path in _folders(self.folder) if is_folder(path / "extraction")]

    def trait(self, name: str) -> Trait:
        """One of them.

        Raises:
            HookError: lists what there is.
        """
        traits = self.traits()
        found = next((trait for trait in traits if trait.name == name), None)
        if found is None:
            names = [trait.name for trait in traits]
            raise HookError(f"The experiment {self.name} has no trait {name!r}. {_there_are(names)}")
        return found

    def inference_prompts(self) -> list[str]:
        """The prompts that all its traits share.

        Raises:
            HookError: when there is no such file, or no prompt in it.
        """
        return read_prompts(self.folder / INFERENCE_PROMPTS)


def check_choice(method: Any = None, layer: Any = None) -> None:
    """Raises HookError for what is no method and what is no layer; None is neither."""
    if method is not None and method not in _ORDER:
        raise HookError(f"Unknown method {method!r}. There are: {', '.join(_ORDER)}.", field="method")
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise HookError(f"A layer is a whole number from 0 up, got {layer!r}.", field="layer")


def is_folder(path: Path) -> bool:
    """Whether it is a folder, or leads to one; what cannot be looked at is none."""
    try:
        return path.is_dir()
    except OSError:
        # The folder that it lies in may not be entered, or a link leads to what cannot be.
        return False


def _best(vectors: list[TraitVector]) -> tuple[TraitVector, str]:
    """The vector that separates best what it was not made of, and why it is that one."""
    best = max(vectors, key=lambda vector: (*_merit(vector), -vector.layer))
    if len(vectors) == 1:
        return best, "the only one"
    accuracy, _ = _merit(best)
    if accuracy < 0:
        return best, "the largest effect size, since no prompts were held out"
    equals = sum(_merit(vector)[0] == accuracy for vector in vectors)
    of_equals = ", of equals the one with the larger effect size" if equals > 1 else ""
    return best, f"the best accuracy on held-out prompts, {accuracy:.1%}{of_equals}"


def _merit(vector: TraitVector) -> tuple[float, float]:
    """Held-out accuracy, -1 where it was not measured, and effect size."""
    accuracy = _number(vector.metadata.get("held_out_accuracy"), -1.0)
    # It is null for classes whose scores do not scatter at all.
    unlimited = "effect_size" in vector.metadata and vector.metadata["effect_size"] is None
    return accuracy, math.inf if unlimited else _number(vector.metadata.get("effect_size"), -math.inf)


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _folders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if is_folder(path)]


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name; hidden things, which a writer may not have ended, are passed by."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HookError(f"{folder} cannot be read: {error.strerror or error}.") from error


def _there_are(names: Iterable[str]) -> str:
    return f"There are: {', '.join(names) or 'none'}."
