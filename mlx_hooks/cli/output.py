"""What commands write: a file whole or not at all."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import HookError
from ..storage import files


def write_whole(path: Path, text: str | bytes) -> None:
    """Replace a file by a text, or by bytes.

    Raises:
        HookError: when the file cannot be written; an older one is still there.
    """
    with files.writing(path):
        files.write_whole(path, text)


def check_writable(path: Path) -> None:
    """Raise HookError if a file could not be written at ``path``; nothing is left there."""
    with files.writing(path):
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.absolute().parent}")
        files.try_file(path)


def check_targets(
    targets: Mapping[str, Path | None], inputs: Iterable[Path] = (), captures: Iterable[Path] = ()
) -> None:
    """Say before a run what it could not write, or would destroy; nothing is left there.

    Args:
        targets: files that it writes, by option; None for what it does not.
        inputs: files that it reads; there need be none of that name.
        captures: files of captures, and the places of their JSON, whether the run reads them or not.

    Raises:
        HookError: for a file that cannot be written, one that two options name, one that is read, and one
            that is a capture's.
    """
    kept = {"is read here": inputs, "is a capture's": captures}
    places = [(path.resolve(), why) for why, paths in kept.items() for path in paths]
    taken: dict[Path, str] = {}
    for option, path in targets.items():
        if path is None:
            continue
        check_writable(path)
        place = path.resolve()
        if place in taken:
            raise HookError(f"{taken[place]} and {option} are both {path}: give each a file of its own.")
        for other, why in places:
            if place == other or _is_same(place, other):
                raise HookError(f"{option} is {path}, which {why}: name another file.")
        taken[place] = option


def model_files(name: str) -> list[Path]:
    """What is read of a model's folder; nothing for a name that is no folder."""
    patterns = ("*.safetensors*", "*config.json", "*token*", "*.jinja", "*vocab*", "merges.txt", "*.py")
    return [path for pattern in patterns for path in Path(name).glob(pattern)]


def _is_same(one: Path, other: Path) -> bool:
    """Whether two names are of one file, as on disks that take capitals for small letters."""
    return one.exists() and other.exists() and one.samefile(other)
