"""Pictures of the ``sae`` analysis: how training went, and how often the latents fire."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_sae(result: dict[str, Any]) -> "list[tuple[str, Figure]]":
    """Figures of what :func:`.analysis.analyse_sae` answered, each with a title.

    Raises:
        ImportError: without matplotlib.
    """
    return [("Training", _training(result)), ("Firing rates", _firing_rates(result))]


def _training(result: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    stats = {name.rsplit("/", 1)[1]: values for name, values in result["training_stats"].items()}
    passes = np.arange(1, len(stats["loss"]) + 1)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, sparsity = figure.subplots(1, 2)
    for name, label in (
        ("loss", "loss"),
        ("recon_loss", "variance unexplained"),
        ("sparsity_loss", "sparsity penalty"),
    ):
        if any(value > 0 for value in stats[name]):
            losses.plot(passes, stats[name], label=label, marker="." if len(passes) < 20 else None)
    losses.set(yscale="log", xlabel="pass over the rows", ylabel="loss (variance of the rows = 1)")
    losses.legend()
    sparsity.plot(passes, np.multiply(stats["l0_sparsity"], result["d_sae"]), marker="." if len(passes) < 20 else None)
    sparsity.axhline(result["l0"], linestyle="--", color="0.5", label=f"held out: {result['l0']:.1f}")
    sparsity.set(xlabel="pass over the rows", ylabel=f"latents that fire per row, of {result['d_sae']}", ylim=(0, None))
    sparsity.legend()
    unexplained = "" if result["fvu"] is None else f", {result['fvu']:.1%} of the variance unexplained on held-out rows"
    figure.suptitle(f"{result['layer']}: {result['architecture']} autoencoder{unexplained}", parse_math=False)
    return figure


def _firing_rates(result: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    rates = np.asarray(result["firing_rates"])
    alive = rates[rates > 0]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    # None can be rarer than once.
    axes.hist(alive, bins=np.logspace(-np.log10(max(result["n_held_out"], 10)), 0, 31).tolist())
    axes.set(xscale="log", xlabel="fraction of held-out rows on which a latent fires", ylabel="latents")
    dead = f"{result['n_dead']} of {result['d_sae']} fire on none of {result['n_held_out']} rows"
    axes.set_title(f"{result['layer']}: {dead}", parse_math=False)
    return figure
