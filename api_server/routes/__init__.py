"""One blueprint per resource."""

from . import analysis, chat, completions, description, health, hooks, models, tokens

BLUEPRINTS = (
    health.blueprint,
    models.blueprint,
    tokens.blueprint,
    chat.blueprint,
    completions.blueprint,
    hooks.blueprint,
    analysis.blueprint,
    description.blueprint,
)
