"""Tests over every architecture of mlx-lm: the names, and where they cannot run."""

import re
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import pytest
from packaging.version import Version

from mlx_hooks.coverage.configurations import CONFIGURATIONS, VARIANTS

DOCUMENT = Path(__file__).parent.parent / "docs" / "architectures.md"
NEED_METAL = ("bitnet", "muse_spark")


def written_for() -> Version:
    """The mlx-lm that the table was written with."""
    stated = re.search(r"with mlx-lm ([0-9.]+[0-9])", DOCUMENT.read_text())
    assert stated is not None
    return Version(stated[1])


IS_OLDER = Version(version("mlx-lm")) < written_for()
OLDER = "the table is that of a newer mlx-lm than is installed"


def _marks(name: str) -> list[pytest.MarkDecorator]:
    needs_metal = name in NEED_METAL and not mx.metal.is_available()
    return [
        pytest.mark.skipif(needs_metal, reason=f"{name} calls a Metal kernel"),
        pytest.mark.skipif(IS_OLDER, reason=OLDER),
    ]


on_every_architecture = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_marks(name)) for name in sorted([*CONFIGURATIONS, *VARIANTS])]
)

FALCON_H1 = pytest.param(
    "falcon_h1",
    marks=pytest.mark.skipif(IS_OLDER, reason="an older mlx-lm runs one layer of it only where there is no KV cache"),
)
"""Blocks whose attention and mixer run side by side."""

needs_block_sparse = pytest.mark.skipif(IS_OLDER, reason="an older mlx-lm ends the process in phi3small's attention")
PHI3SMALL = pytest.param("phi3small", marks=needs_block_sparse)
"""Block-sparse attention, which sees later keys."""
