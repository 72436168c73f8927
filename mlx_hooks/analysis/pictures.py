"""Pictures as PNG files, drawn by matplotlib, which is an extra."""

import io
import warnings
from typing import TYPE_CHECKING, Any

from ..errors import HookError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN: dict[str, Any] = {"parse_math": False}
"""For every text that is drawn: a token may hold a dollar sign, which is no formula."""


def check_picture(n_positions: int, most: int) -> None:
    """Say before the run that it cannot be drawn.

    Raises:
        HookError: without matplotlib, and for more positions than can be read.
    """
    if n_positions > most:
        raise HookError(f"A picture shows at most {most} positions, got {n_positions}: write HTML.")
    check_matplotlib("write HTML")


def check_matplotlib(otherwise: str) -> None:
    """Say before the run that it cannot be drawn, and what can be done instead.

    Raises:
        HookError: without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise HookError(f"A picture needs matplotlib: pip install 'neuroscope-mlx[plot]', or {otherwise}.") from None


def png(figure: "Figure", dpi: int = 150) -> bytes:
    """A figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes, which says enough.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
