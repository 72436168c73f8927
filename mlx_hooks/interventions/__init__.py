"""Declarative edits: what to change, where, for which positions, heads and neurons; and the account of what happened.

    zero = Intervention("blocks.2.attn.hook_z", "zero", heads=1)
    steer = Intervention.of({"hook_point": "blocks.1.hook_resid_post", "type": "add", "vector": direction,
                             "coefficient": 4, "positions": "last"})
    result = model.generate("The capital of France is", max_tokens=5, interventions=[zero, steer])
    result.interventions[0].norm_before, result.interventions[0].norm_after

An :class:`Intervention` says what is meant and checks itself (``spec.py``). An :class:`InterventionPlan` checks it
against a model before anything runs (``plan.py``): axes and sizes (``fitting.py``), positions (``reach.py``), the
numbers to put in (``sources.py``). An :class:`InterventionSession` holds the hooks of one run (``edits.py``) and gives
the receipts (``session.py``).
"""

from .edits import EditingFunction, edits_of
from .plan import InterventionPlan
from .reach import Reach
from .session import Firing, InterventionReceipt, InterventionSession
from .spec import TYPES, Intervention, blame

__all__ = [
    "TYPES",
    "EditingFunction",
    "Firing",
    "Intervention",
    "InterventionPlan",
    "InterventionReceipt",
    "InterventionSession",
    "Reach",
    "blame",
    "edits_of",
]
