"""A circuit from prompts in one call: edges are scored, or left out one after the other, and the circuit is cut out."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ...errors import HookError
from ...model import HookedModel
from ...options import options, options_of
from ..ablation import Count
from ..progress import Part, Progress
from .circuit import Circuit
from .edge_attribution import Rule, attribute_edges
from .edge_runs import EdgeRuns
from .pruning import acdc
from .validation import RunOptions, runs_of, smallest_circuit

FindMethod = Literal["eap-ig", "eap", "exact", "acdc"]
USUAL_FAITHFULNESS = 0.9
_LIMITS = ("n", "threshold", "faithfulness")
_TOLD = (
    *("model", "identity", "edges_of_model", "method", "metric", "ablation", "settings", "threshold"),
    "asked_faithfulness",
)
"""Metadata that the search tells."""


@options
class FindOptions(RunOptions):
    """Options of :func:`find_circuit`, besides those of :class:`RunOptions`.

    Args:
        method: how edges are chosen: by scores of ``attribute_edges``, or by ``acdc``.
        steps, rule: of "eap-ig".
        n: take so many of the strongest edges.
        threshold: take the edges that score at least so much; of "acdc", which needs it, by how much the metric has to
            move for an edge to stay.
        faithfulness: take the fewest of the strongest edges that are as faithful. At most one of the three; 0.9 where
            none is given.
        metadata: more of it for the circuit, as ``task``; not what the search tells of it itself.
    """

    method: FindMethod = "eap-ig"
    steps: Count = 5
    rule: Rule = "gauss"
    n: Count | None = None
    threshold: Annotated[float, Field(gt=0)] | None = None
    faithfulness: Annotated[float, Field(gt=0, le=1)] | None = None
    metadata: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        given = [name for name in _LIMITS if getattr(self, name) is not None]
        if len(given) > 1:
            raise HookError(
                f"A circuit is cut by one of {', '.join(_LIMITS)}, got {' and '.join(given)}.", field=given[1]
            )
        if self.method == "acdc" and given != ["threshold"]:
            raise HookError(
                "acdc cuts by threshold: by how much an edge has to move the metric to stay.", field="threshold"
            )
        told = next((key for key in self.metadata or {} if key in _TOLD), None)
        if told is not None:
            raise HookError(f"metadata cannot say {told}, which the search tells itself.", field="metadata")


def find_circuit(
    model: HookedModel | EdgeRuns,
    eval_data: Any = None,
    options: FindOptions | dict | None = None,
    progress: Progress = None,
) -> Circuit:
    """The circuit of a model for what prompts ask.

        circuit = find_circuit(model, prompts)                              # EAP-IG, 0.9 faithful
        circuit = find_circuit(model, prompts, {"method": "acdc", "threshold": 0.1})
        circuit.validate(model, other_prompts).faithfulness

    Args:
        model: a model, or its edge runs, which bring their own data, ablation and metric.
        eval_data: see :func:`eval_data_of`.
        progress: called with what is done and how much there is, in thousandths.

    Raises:
        HookError: for data, a metric or an ablation that do not fit, for options that are not those of the edge runs,
            and where no edge is left.
    """
    chosen = options_of(FindOptions, options)
    runs = runs_of(model, eval_data, chosen)
    is_acdc = chosen.method == "acdc"
    asked = {"method": "eap-ig" if is_acdc else chosen.method, "steps": chosen.steps, "rule": chosen.rule}
    scores = None
    try:
        scores = attribute_edges(runs, options=asked, progress=Part(progress, 0, 2))
    except HookError as error:
        # Of ACDC they only guess what it will keep, to spare it runs: it does not mind a metric without a gradient.
        if not is_acdc or error.field != "metric":
            raise
    then, about = Part(progress, 1, 2), chosen.metadata or {}
    if is_acdc:
        found = acdc(runs, chosen.threshold or 0.0, scores=scores, progress=then).circuit(about)
    elif chosen.n is not None or chosen.threshold is not None:
        found = Circuit.of_scores(scores, runs, n=chosen.n, threshold=chosen.threshold, metadata=about)
    else:
        wanted = chosen.faithfulness or USUAL_FAITHFULNESS
        found = smallest_circuit(runs, scores, wanted, metadata=about, progress=then).circuit
    if progress is not None:
        progress(1000, 1000)
    return found
