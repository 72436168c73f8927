"""One blueprint per resource."""

from . import (
    analysis,
    captures,
    chat,
    circuits,
    completions,
    description,
    heads,
    health,
    hooks,
    interpret,
    jobs,
    models,
    tokens,
)

BLUEPRINTS = (
    health.blueprint,
    models.blueprint,
    tokens.blueprint,
    chat.blueprint,
    completions.blueprint,
    hooks.blueprint,
    captures.blueprint,
    analysis.blueprint,
    heads.blueprint,
    circuits.blueprint,
    interpret.blueprint,
    jobs.blueprint,
    description.blueprint,
)
