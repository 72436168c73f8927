"""Pictures of the ``sae`` analysis: how training went, and how often the latents fire."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..charts import COLOURS, FAINT, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_SHOWN = {"loss": "loss", "recon_loss": "variance unexplained", "sparsity_loss": "sparsity penalty"}
_AUXILIARY = "auxiliary loss of dead latents"
"""What ``sparsity_loss`` is of topk and batchtopk."""


def draw_sae(result: dict[str, Any]) -> "list[tuple[str, Figure]]":
    """Figures of what :func:`.analysis.analyse_sae` answered, each with a title.

    Raises:
        ImportError: without matplotlib.
    """
    return [("Training", _training(result)), ("Firing rates", _firing_rates(result))]


def _training(result: dict[str, Any]) -> "Figure":
    stats = {name.rsplit("/", 1)[1]: values for name, values in result["training_stats"].items()}
    passes = np.arange(1, len(stats["loss"]) + 1)
    marker = "." if len(passes) < 20 else None
    unexplained = "" if result["fvu"] is None else f", {result['fvu']:.1%} of the variance unexplained on held-out rows"
    made, (losses, sparsity) = figure(f"{result['layer']}: {result['architecture']} autoencoder{unexplained}", 2)
    labels = _SHOWN | ({"sparsity_loss": _AUXILIARY} if "topk" in result["architecture"] else {})
    for colour, (name, label) in zip(COLOURS, labels.items(), strict=False):
        if any(value > 0 for value in stats[name]):
            # A logarithm has no 0: a gap.
            drawn = [value if value > 0 else np.nan for value in stats[name]]
            losses.plot(passes, drawn, label=label, marker=marker, color=colour)
    losses.set_yscale("log")
    losses.set_ylabel("loss (variance of the rows = 1)", fontsize=9)
    fire = np.multiply(stats["l0_sparsity"], result["d_sae"])
    sparsity.plot(passes, fire, marker=marker, color=COLOURS[0])
    sparsity.axhline(result["l0"], linestyle="--", color=FAINT, label=f"held out: {result['l0']:.1f}")
    sparsity.set_ylim(bottom=0)
    sparsity.set_ylabel(f"latents that fire per row, of {result['d_sae']}", fontsize=9)
    for axes in (losses, sparsity):
        axes.set_xlabel("pass over the rows", fontsize=9)
        axes.legend(fontsize=8, frameon=False, loc="upper right")
    return made


def _firing_rates(result: dict[str, Any]) -> "Figure":
    rates = np.asarray(result["firing_rates"])
    dead = f"{result['n_dead']} of {result['d_sae']} fire on none of {result['n_held_out']:,} rows"
    made, (axes,) = figure(f"{result['layer']}: {dead}")
    # None can be rarer than once.
    rarest = -np.log10(max(result["n_held_out"], 10))
    axes.hist(rates[rates > 0], bins=np.logspace(rarest, 0, 31).tolist(), color=COLOURS[0])
    axes.set_xscale("log")
    axes.set_xlabel("fraction of held-out rows on which a latent fires", fontsize=9)
    axes.set_ylabel("latents", fontsize=9)
    return made
