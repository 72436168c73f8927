"""What a result says, in sentences and small tables, for the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]

_MOST_ROWS = 12


@dataclass(frozen=True)
class Table:
    """Rows of cells, plain text or numbers, with a sentence above."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def findings(name: str, result: Result) -> list[str]:
    """Sentences on a result of the analysis ``name``; the first says most. Its notes come last."""
    said = _SENTENCES[name](result)
    return [*said, *result.get("notes", ())]


def table_of(name: str, result: Result) -> Table | None:
    """What the strongest parts of a result are; None where there is nothing to list."""
    make = _TABLES.get(name)
    made = make(result) if make is not None else None
    return made if made is not None and made.rows else None


# Sentences


def _sae(result: Result) -> list[str]:
    fvu, held_out = result["fvu"], result["n_held_out"]
    active = f"{result['l0']:.1f} of {result['d_sae']} features are active per token"
    said = [
        f"{result['d_sae']} features read back {1 - fvu:.1%} of the variance with {result['l0']:.1f} active per token; "
        f"{result['n_dead']} never fire on {held_out:,} held-out rows."
        if fvu is not None
        else f"the {held_out:,} held-out rows do not vary, so how much is read back cannot be told; {active}."
    ]
    recovered = result.get("loss_recovered")
    if recovered is not None:
        said.append(
            f"In the model: loss {recovered['loss']:.3f} nats per predicted token ({recovered['n_targets']:,} of them) "
            f"as it is, {recovered['loss_with_sae']:.3f} with what the autoencoder reads back, "
            f"{recovered['loss_zero_ablated']:.3f} with zeros in its place."
        )
    for steered in result.get("steering") or ():
        promoted = ", ".join(_told(token) for token in steered["promoted"][:3])
        said.append(
            f"Steering by {steered['coefficient']:.3g} times feature {steered['feature']} moves predictions by "
            f"{steered['kl']:.3f} nats (KL; a random direction of the same length {steered['kl_random']:.3f}), and "
            f"promotes {promoted}."
        )
    return said


def _neuron(result: Result) -> list[str]:
    rates = result["firing_rate"]
    mean = sum(rates) / len(rates)
    return [
        f"{len(rates)} neurons on {result['rows']:,} tokens fire on {mean:.1%} of them on average; {result['n_dead']} "
        f"never fire, {result['n_rare']} on fewer than {result['rare_below']:.0%}."
    ]


def _feature(result: Result) -> list[str]:
    shares = result["explained_variance"]
    if not shares:
        return ["The rows do not vary."]
    said = f"{min(10, len(shares))} of {len(shares)} components hold {sum(shares[:10]):.1%} of the variance"
    clusters = result["clusters"]
    if clusters is None:
        return [f"{said}."]
    silhouette = clusters["silhouette"]
    apart = "" if silhouette is None else f" (silhouette {silhouette:.2f})"
    return [f"{said}; the rows fall into {clusters['n_clusters']} clusters{apart}."]


def _circuit(result: Result) -> list[str]:
    random = result["random"]["mean"]
    compared = "" if random is None else f"; random sets of this size have {random:.2f}"
    circuit = ", ".join(result["circuit"]) or "nothing"
    return [
        f"{circuit} ({result['size']} of {len(result['components'])} components): faithfulness "
        f"{_interval(result['faithfulness'])}, completeness {_interval(result['completeness'])}{compared}.",
        f"The performance is {result['metric']}. What is outside the circuit is replaced by {result['ablation']}.",
    ]


def _causal(result: Result) -> list[str]:
    changes = _changes(result)
    if not changes:
        return ["Nothing could be ablated."]
    _, component, ablation, change = changes[0]
    said = [
        f"replacing {component['component']} ({ablation}) costs most: the loss rises by {_interval(change)} nats from "
        f"{result['plain']['loss']['mean']:.3f} per predicted token, on {result['eval_data']['examples']:,} examples."
    ]
    return [*said, *(f"By “{name}” its output becomes {text}." for name, text in result["ablations"].items())]


def _heads(result: Result) -> list[str]:
    said = [
        f"{name.replace('_', '-')} head {at} with {result[name][at]:.2f}"
        for name in ("induction", "previous_token")
        if result[name] is not None
        for at in [max(range(result["heads"]), key=result[name].__getitem__)]
    ]
    found = [f"step {result['step']}: the best {', the best '.join(said)} (mean of {result['sequences']} sequences)."]
    left_out = sum(result["left_out"].values())
    return [*found, *([f"{left_out} sequences were left out: too short, or not whole."] if left_out else [])]


def _probe(result: Result) -> list[str]:
    control = result["control"]
    if result["task"] == "numbers":
        beside = "" if control is None else f"; shuffled labels give {control['r2']:.2f}"
        return [f"the label is read with R² {_interval(result['r2'])} on held-out rows{beside}."]
    beside = "" if control is None else f", shuffled labels give {control['accuracy']:.1%}"
    return [
        f"the label is read right on {result['accuracy']['mean']:.1%} of {result['test_rows']:,} held-out rows; the "
        f"commonest label alone is right on {result['majority_baseline']:.1%}{beside}."
    ]


_SENTENCES: dict[str, Callable[[Result], list[str]]] = {
    "sae": _sae,
    "neuron": _neuron,
    "feature": _feature,
    "circuit": _circuit,
    "causal": _causal,
    "probe": _probe,
    "heads": _heads,
}


# Tables


def _sae_table(result: Result) -> Table:
    return Table(
        "The features that add most, and the tokens on which they fire most:",
        ("feature", "fires on (share)", "largest", "tokens"),
        tuple(
            (
                feature["feature"],
                f"{feature['firing_rate']:.3f}",
                f"{feature['max_activation']:.3g}",
                _tokens(feature["top_tokens"]),
            )
            for feature in result["features"][:_MOST_ROWS]
        ),
    )


def _neuron_table(result: Result) -> Table:
    by_neuron = {entry["neuron"]: entry["tokens"] for entry in result["top_tokens"]}
    largest = result["max_activation"]
    strongest = sorted(by_neuron, key=lambda neuron: -largest[neuron])[:_MOST_ROWS]
    return Table(
        "The neurons with the highest activations, and the tokens where they are:",
        ("neuron", "mean", "highest", "fires on (share)", "tokens"),
        tuple(
            (
                neuron,
                f"{result['mean_activation'][neuron]:.3g}",
                f"{largest[neuron]:.3g}",
                f"{result['firing_rate'][neuron]:.3f}",
                _tokens(by_neuron[neuron]),
            )
            for neuron in strongest
        ),
    )


def _feature_table(result: Result) -> Table | None:
    clusters = result["clusters"]
    if clusters is None:
        return None
    return Table(
        "Clusters, and the tokens that are most typical of them:",
        ("cluster", "rows", "share", "tokens"),
        tuple(
            (one["cluster"], f"{one['size']:,}", f"{one['share']:.1%}", _tokens(one["top_tokens"]))
            for one in clusters["clusters"]
        ),
    )


def _circuit_table(result: Result) -> Table:
    has_recovery = any(component["recovery"] is not None for component in result["components"])
    heads = ("component", "in the circuit", "damage alone", *(("recovery alone",) if has_recovery else ()))
    return Table(
        "Each component on its own, in shares of what the model does (damage: lost when it is ablated; recovery: "
        "brought back when it is patched into the corrupted run), with confidence intervals:",
        heads,
        tuple(
            (
                component["component"],
                "yes" if component["in_circuit"] else "",
                _interval(component["damage"]),
                *((_interval(component["recovery"]),) if has_recovery else ()),
            )
            for component in result["components"]
        ),
    )


def _causal_table(result: Result) -> Table:
    has_answers = "logit_difference" in result["plain"]
    heads = ("component", "replaced by", "loss (nats)", "KL (nats)", *(("logit difference",) if has_answers else ()))
    rows = []
    for _, component, ablation, change in _changes(result)[: 2 * _MOST_ROWS]:
        found = component["ablations"][ablation]
        answers = (_interval(found["logit_difference_change"]),) if has_answers else ()
        rows.append((component["component"], ablation, _interval(change), _interval(found["kl"]), *answers))
    percent = f"{result['confidence']:.0%}"
    return Table(f"What changes, with {percent} confidence intervals, the largest first:", heads, tuple(rows))


def _heads_table(result: Result) -> Table:
    names = [name for name in ("induction", "previous_token", "first_token", "entropy") if result[name] is not None]
    return Table(
        "Each head at the last captured step:",
        ("head", *(name.replace("_", " ") for name in names)),
        tuple((f"H{at}", *(f"{result[name][at]:.3f}" for name in names)) for at in range(result["heads"])),
    )


_TABLES: dict[str, Callable[[Result], Table | None]] = {
    "sae": _sae_table,
    "neuron": _neuron_table,
    "feature": _feature_table,
    "circuit": _circuit_table,
    "causal": _causal_table,
    "heads": _heads_table,
}


# Words


def _changes(result: Result) -> list[tuple[float, Result, str, Result]]:
    """Mean change of the loss, component, ablation and the estimate, the largest change first."""
    found = [
        (ablated["loss_change"]["mean"], component, ablation, ablated["loss_change"])
        for component in result["components"]
        for ablation, ablated in component["ablations"].items()
        if ablated["loss_change"]["mean"] is not None
    ]
    return sorted(found, key=lambda entry: -entry[0])


def _interval(estimate: Result | None) -> str:
    """``0.42 (0.31 to 0.55)``."""
    if estimate is None or estimate["mean"] is None:
        return ""
    if estimate["low"] is None:
        return f"{estimate['mean']:.3g}"
    return f"{estimate['mean']:.3g} ({estimate['low']:.3g} to {estimate['high']:.3g})"


def _tokens(told: Sequence[Result]) -> str:
    return ", ".join(dict.fromkeys(_told(token) for token in told))


def _told(token: Result) -> str:
    """A token as text, or as its number: analyses call the two by several names."""
    text = token.get("text") if "text" in token else token.get("token")
    number = token.get("token_id", token.get("token"))
    if isinstance(text, str):
        return repr(text) if text != text.strip() or not text else text
    return "" if number is None else str(number)
