"""Writes sections of docs/benchmarks.md: each benchmark owns one, and leaves the others as they are."""

import datetime
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def environment(*packages: str) -> str:
    """One line on when and where figures were measured."""
    python = f"Python {platform.python_version()}"
    versions = [f"{name} {found}" for name in packages if (found := installed_version(name))]
    blas = "OpenBLAS" if "openblas" in os.environ.get("LD_PRELOAD", "") else "MLX's own BLAS"
    threads = os.environ.get("OPENBLAS_NUM_THREADS")
    where = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    if platform.system() == "Linux":
        where += f", {blas}" + (f" on {threads} thread{'s' if threads != '1' else ''}" if threads else "")
    return f"{datetime.date.today()}, {where}, {', '.join([python, *versions])}."


def busy() -> str:
    """How busy the machine was before a measurement, which should be near 0: "load 0.1 before"."""
    return f"load {os.getloadavg()[0]:.1f} before"


def installed_version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_section(heading: str, text: str) -> None:
    """Put a section into the page, in place of the one with the same heading."""
    page = PAGE.read_text()
    section = f"## {heading}\n\n{text.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if not pattern.search(page):
        page = f"{page.rstrip()}\n\n## {heading}\n"
    # A function, so that a backslash in the text stays one.
    PAGE.write_text(pattern.sub(lambda _: section + "\n", page).rstrip() + "\n")
