"""Attach and detach: the only place that touches a model's classes or MLX functions.

For the duration of a run the class of each module that is looked at is swapped for a subclass whose ``__call__``
shows input and output to hooks. What lies between modules is met in the same way: the residual stream inside a block
is an array whose class shows what is added to it, the attention function and the KV cache show what they get.
Afterwards, whatever was raised, every class and function is the original again.
"""

from .calls import follow_calls
from .plan import Instrument, Plan, plainly
from .sites import kv_offset, remember_offset

__all__ = ["Instrument", "Plan", "follow_calls", "kv_offset", "plainly", "remember_offset"]
