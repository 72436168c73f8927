"""Where each hook point lives in an mlx-lm module tree: tables of names, then what follows from them.

mlx-lm has well over a hundred architectures and few names. A block's children are sublayers (attention, mixer, MLP)
and norms; which is which, and where their values lie, follows from ``names``. What no name can show (is a branch
multiplied before it is added, is it normed) is not guessed: it is observed where the model adds to the stream.
``exceptions`` says what is otherwise, and why. ``selftest`` proves on the loaded model that the places found here hold
what they are said to hold.
"""

from .architecture import Architecture
from .config import ModelConfig
from .places import Location, Sublayer
from .views import Heads

__all__ = ["Architecture", "Heads", "Location", "ModelConfig", "Sublayer"]
