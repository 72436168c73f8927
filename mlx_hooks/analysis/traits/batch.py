"""Captures of several traits on several prompts, a file each: what fails is told, and the others go on."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from ...errors import HookError
from ...model import HookedModel
from ...storage.files import clear_left, try_file, writing
from ..identity import ModelIdentity
from .capture import ATTENTION, AtLayers, Settings, Vectors, capture_all_layers, check_model, stream_points, tokens_of
from .experiment import Trait
from .internals import capture_single_layer, check_layer
from .records import PREFIX, Encoded, Record, json_path, read_record, write_json, write_record
from .vectors import TraitVector

LAYERS_FOLDER = Path("inference", "residual_stream_activations")
LAYER_FOLDER = Path("inference", "layer_internal_states")
"""Where captures lie in a trait's folder: of all layers, and of one."""
REQUEST = (
    "vector_sha256", "method", "layer", "vector_layer", "each_layer", "model_identity", "temperature", "top_p", "seed",
    "max_tokens", "alignment", "projection", "attention",
)  # fmt: skip
"""What in a record's metadata says what was asked for."""
STATUSES = ("done", "skipped", "failed")


@dataclass(frozen=True)
class Outcome:
    """What became of one file, or of a trait that failed as a whole.

    Args:
        trait: its name.
        name: the file's, without suffix; None for the whole trait.
        status: "done", "skipped" or "failed".
        reason: why it failed, a sentence.
    """

    trait: str
    name: str | None
    status: str
    reason: str = ""

    def __str__(self) -> str:
        what = self.trait if self.name is None else f"{self.trait}, {self.name}"
        return f"{self.status}: {what}: {self.reason}" if self.reason else f"{self.status}: {what}"


@dataclass(frozen=True)
class _File:
    """One file that is to be made."""

    trait: Trait
    vectors: Vectors
    path: Path

    @property
    def name(self) -> str:
        return self.path.stem


class CaptureBatch:
    """Captures of traits on prompts, in the files that an experiment keeps them in.

        batch = CaptureBatch(experiment.traits(), experiment.inference_prompts(), save_json=True)
        batch.run(HookedModel.from_pretrained(batch.model_name()))
        print(batch.summary())

    A trait without vectors has failed before the model is needed, and so has one whose folder cannot be written to.

    Args:
        traits: of an experiment.
        prompts: texts; the i-th gives ``prompt_{i}.safetensors`` (``prompt_{i}_layer{N}.safetensors``).
        prefix: what stands there for "prompt", so that captures of several lists of prompts can lie side by side.
        captured_layer: capture everything inside this layer (``capture_single_layer``); None captures all layers
            (``capture_all_layers``).
        method, vector_layer: which of a trait's vectors; see ``Trait.find``.
        each_layer: measure each layer along the vector that the method made there.
        attention: False leaves attention weights out; of all layers only.
        save_json: write JSON beside each file too.
        skip_existing: leave files alone that hold what is asked for. JSON that is missing is made of them.
        overwrite: replace files that hold something else; without it, these fail.
        options: ``max_tokens``, ``temperature``, ``top_p``, ``seed``, ``alignment`` and ``normalize`` of a capture.

    Raises:
        HookError: for no traits or prompts, a prefix of other characters than letters, digits, - and _, and options
            that no capture can have.
    """

    def __init__(
        self,
        traits: Sequence[Trait],
        prompts: Sequence[str],
        *,
        prefix: str = PREFIX,
        captured_layer: int | None = None,
        method: str | None = None,
        vector_layer: int | None = None,
        each_layer: bool = False,
        attention: bool = True,
        save_json: bool = False,
        skip_existing: bool = False,
        overwrite: bool = False,
        **options: Any,
    ) -> None:
        if not traits or not prompts:
            raise HookError(f"A batch has at least one trait and one prompt, got {len(traits)} and {len(prompts)}.")
        if captured_layer is not None and each_layer:
            raise HookError("each_layer is for captures of all layers.", field="each_layer")
        if not isinstance(prefix, str) or not re.fullmatch("[A-Za-z0-9_-]+", prefix):
            raise HookError(f"prefix is made of letters, digits, - and _, got {prefix!r}.", field="prefix")
        self.prompts = list(prompts)
        self.prefix = prefix
        self.captured_layer = captured_layer
        self.attention = attention
        self.save_json = save_json
        self.skip_existing = skip_existing
        self.overwrite = overwrite
        self.settings = Settings(**options)
        self.outcomes: list[Outcome] = []
        """What became of the files so far, in the order in which it was known."""
        self._traits: list[tuple[Trait, Vectors]] = []
        self._n_files = 0
        for trait in traits:
            with self._failing(trait):
                vectors = _find(trait, method, vector_layer, each_layer)
                _check_folder(trait.folder / self._folder)
                self._traits.append((trait, vectors))

    @property
    def is_ready(self) -> bool:
        """Whether there is a trait left to capture."""
        return bool(self._traits)

    def model_name(self) -> str:
        """The model that the vectors were made on, by name; see :func:`model_named_by`."""
        return model_named_by([_first(vectors) for _, vectors in self._traits])

    def run(self, model: HookedModel, *, progress: bool = True) -> list[Outcome]:
        """Capture; answers ``outcomes``. What breaks off leaves whole files.

        Args:
            progress: show a progress bar on the error stream.

        Raises:
            HookError: for a layer that the model does not have, and a model that cannot be captured.
        """
        check_layer(model, self.captured_layer or 0)
        for layer in range(model.cfg.n_layers) if self.captured_layer is None else [self.captured_layer]:
            stream_points(model, layer)
        identity = ModelIdentity.of(model)
        ready = []
        for trait, vectors in self._traits:
            with self._failing(trait):
                check_model(model, AtLayers.of(model, vectors).vectors, identity)
                if (trait.folder / self._folder).is_dir():
                    clear_left(trait.folder / self._folder)
                ready.append((trait, vectors))
        self._n_files = len(ready) * len(self.prompts)
        with tqdm(total=self._n_files, desc="capture", unit="file", disable=not progress) as bar:
            for i, prompt in enumerate(self.prompts):
                files = [
                    _File(trait, vectors, trait.folder / self._folder / f"{self.prefix}_{i}{self._ending}")
                    for trait, vectors in ready
                ]
                for together in self._due(model, identity, prompt, files, bar):
                    self._capture(model, identity, prompt, together)
                    bar.update(len(together))
        return self.outcomes

    def attention_bytes(self, model: HookedModel) -> int:
        """How much of the files attention weights take, at most: each trait's file has those of its prompt.

        Raises:
            HookError: for a layer that the model does not have.
        """
        check_layer(model, self.captured_layer or 0)
        rows = model.cfg.n_layers
        if self.captured_layer is not None:
            rows = model.architecture.n_query_heads(self.captured_layer) or 0
        n, lengths = 0, {}
        for prompt in self.prompts if self.attention else ():
            for vector in (_first(vectors) for _, vectors in self._traits):
                # What cannot be put to the model fails when its turn comes.
                with suppress(Exception):
                    if (prompt, vector.chat) not in lengths:
                        lengths[prompt, vector.chat] = len(tokens_of(model, prompt, vector))
                    length, more = lengths[prompt, vector.chat], self.settings.max_tokens
                    n += length * length + more * length + more * (more + 1) // 2
        return 4 * rows * n

    def summary(self) -> str:
        """How many files were made, skipped and failed, and why; how many were not reached, where it broke off."""
        counts = [f"{sum(o.status == status for o in self.outcomes)} {status}" for status in STATUSES]
        left = self._n_files - sum(o.name is not None for o in self.outcomes)
        counts += [f"{left} not reached"] if left > 0 else []
        failed = [f"  {o}" for o in self.outcomes if o.status == "failed"]
        return "\n".join([", ".join(counts), *failed, *(self._earlier() if self.overwrite else ())])

    def _earlier(self) -> Iterator[str]:
        """Of each trait, which files of longer lists of prompts are there still."""
        pattern = re.compile(rf"{re.escape(self.prefix)}_(\d+){re.escape(self._ending)}")
        for trait, _ in self._traits:
            numbered = map(pattern.fullmatch, (path.name for path in (trait.folder / self._folder).glob("*")))
            numbers = sorted(int(found[1]) for found in numbered if found and int(found[1]) >= len(self.prompts))
            if numbers:
                yield f"  {trait.name}: there still are earlier captures, {self.prefix} {', '.join(map(str, numbers))}"

    @property
    def has_failed(self) -> bool:
        """Whether anything has failed."""
        return any(outcome.status == "failed" for outcome in self.outcomes)

    @property
    def _folder(self) -> Path:
        return LAYERS_FOLDER if self.captured_layer is None else LAYER_FOLDER

    @property
    def _ending(self) -> str:
        return ".safetensors" if self.captured_layer is None else f"_layer{self.captured_layer}.safetensors"

    @contextmanager
    def _failing(self, trait: Trait, path: Path | None = None) -> Iterator[None]:
        """A block in which what goes wrong is noted as the failure of a trait or its file; it stops nothing else."""
        try:
            yield
        except Exception as error:
            # Models are others' code, and what they raise is theirs too.
            reason = str(error) if isinstance(error, HookError) else f"{type(error).__name__}: {error}"
            if self.overwrite and path is not None and path.exists():
                reason = f"{reason.rstrip('.')}; the file that is there is an earlier capture."
            self.outcomes.append(Outcome(trait.name, path.stem if path is not None else None, "failed", reason))

    def _due(
        self, model: HookedModel, identity: ModelIdentity, prompt: str, files: Sequence[_File], bar: tqdm
    ) -> list[list[_File]]:
        """The files that a prompt is to be captured for, those together whose traits read the same tokens."""
        due: dict[tuple[int, ...], list[_File]] = {}
        for file in files:
            with self._failing(file.trait, file.path):
                tokens = tokens_of(model, prompt, _first(file.vectors))
                if self._is_there(file.path, self._request(model, identity, prompt, tokens, file.vectors)):
                    self.outcomes.append(Outcome(file.trait.name, file.name, "skipped"))
                else:
                    due.setdefault(tuple(tokens), []).append(file)
                    continue
            bar.update()
        return list(due.values())

    def _capture(self, model: HookedModel, identity: ModelIdentity, prompt: str, files: Sequence[_File]) -> None:
        """One run for several traits, whose files are then written one by one."""
        records: list[Record] = []
        try:
            records = self._records(model, identity, prompt, [file.vectors for file in files])
        except Exception as error:
            for file in files:
                with self._failing(file.trait, file.path):
                    raise error
        encoded: Encoded = {}
        for file, record in zip(files, records, strict=False):
            with self._failing(file.trait, file.path):
                record["metadata"]["trait_display_name"] = file.trait.display_name
                write_record(record, file.path, json_beside=self.save_json, encoded=encoded)
                self.outcomes.append(Outcome(file.trait.name, file.name, "done"))

    def _records(
        self, model: HookedModel, identity: ModelIdentity, prompt: str, vectors: Sequence[Any]
    ) -> list[Record]:
        options = vars(self.settings) | {"identity": identity}
        if self.captured_layer is None:
            return capture_all_layers(model, prompt, vectors, attention=self.attention, **options)
        return capture_single_layer(model, prompt, vectors, layer=self.captured_layer, **options)

    def _request(
        self, model: HookedModel, identity: ModelIdentity, prompt: str, tokens: list[int], vectors: Vectors
    ) -> dict[str, Any]:
        """What a record of this batch says that was asked for."""
        metadata = AtLayers.of(model, vectors).metadata(model, prompt, self.settings)
        metadata["model_identity"] = identity.to_dict()
        if self.captured_layer is None:
            metadata["attention"] = ATTENTION[self.attention]
        else:
            metadata["layer"] = self.captured_layer
        return _request_of({"prompt": {"text": prompt, "token_ids": tokens}, "metadata": metadata})

    def _is_there(self, path: Path, request: Mapping[str, Any]) -> bool:
        """Whether a file holds what is asked for, and may be skipped; JSON that is missing, or holds something else
        and may be replaced, is then made of it.

        Raises:
            HookError: it holds something else, and is not to be replaced.
        """
        beside, other = json_path(path), _other(path, request)
        there = self.skip_existing and path.exists() and other is None
        odd = _other(beside, request) if self.save_json or not there else None
        if not self.overwrite:
            for existing, why in ((path, other), (beside, odd)):
                if why is not None:
                    raise HookError(f"{existing} {why}: it is replaced only with overwrite.")
        if there and self.save_json and (odd is not None or not beside.exists()):
            write_json(read_record(path), path)
        return there


def model_named_by(vectors: Sequence[TraitVector]) -> str:
    """The model that vectors were made on, by name. Those that name none do not count.

    Raises:
        HookError: where they name none, or several.
    """
    names = Counter(str(vector.metadata["model"]) for vector in vectors if vector.metadata.get("model"))
    if len(names) != 1:
        several = " and ".join(f"{name} ({count})" for name, count in sorted(names.items()))
        told = f"name {several}" if names else "name none"
        raise HookError(f"The vectors {told}: say which model to take (--model).", field="model")
    return next(iter(names))


def _find(trait: Trait, method: str | None, layer: int | None, each_layer: bool) -> Vectors:
    """A trait's vector, or those that its method made at all layers."""
    found = trait.find(method, layer)
    if not each_layer:
        return found
    layers = [file.layer for file in trait.vectors() if file.method == found.method]
    return [trait.find(found.method, layer) for layer in layers]


def _first(vectors: Vectors) -> TraitVector:
    return vectors if isinstance(vectors, TraitVector) else vectors[0]


def _check_folder(folder: Path) -> None:
    """Raises HookError if files could not be made in a folder, which may not be there yet; leaves nothing there."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    with writing(folder / "prompt_0.safetensors"):
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is no folder")
        try_file(there / "prompt_0.safetensors")


def _request_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for where a record was made."""
    prompt, metadata = record["prompt"], record["metadata"]
    asked = {"prompt": prompt["text"], "tokens of the prompt": prompt["token_ids"]}
    return asked | {name: metadata.get(name) for name in REQUEST}


def _other(path: Path, request: Mapping[str, Any]) -> str | None:
    """How a file holds something else than is asked for, as the end of a sentence; None where there is no such file."""
    if not path.exists():
        return None
    try:
        record = orjson.loads(path.read_bytes()) if path.suffix == ".json" else read_record(path, arrays=False)
        found = _request_of(record)
    except HookError as error:
        return f"holds something else ({str(error).rstrip('.')})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "holds something else"
    differ = [name for name in request if request[name] != found[name]]
    return f"holds a capture with another {', '.join(differ)}" if differ else None
