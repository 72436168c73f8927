"""The logit lens: what the model would predict if it stopped after each layer.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from dataclasses import dataclass

import mlx.core as mx

from ..activations import id_list, scalar
from ..errors import HookError
from ..model import HookedModel, Tokens


@dataclass(frozen=True)
class Prediction:
    """A token and its probability, from 0 to 1."""

    token_id: int
    token: str
    probability: float


@dataclass(frozen=True)
class LayerPrediction:
    """The most probable next tokens after one layer, most probable first."""

    layer: int
    hook_point: str
    predictions: list[Prediction]


class LogitLens:
    """Reads intermediate residual streams through the model's own last norm and unembedding.

        lens = LogitLens.from_model(model)
        for row in lens.predictions("The capital of France is"):
            print(row.layer, row.predictions[0].token)

    The norm takes each layer's own statistics, so the last layer's reading is the model's own output.
    """

    def __init__(self, model: HookedModel) -> None:
        self.model = model

    @classmethod
    def from_model(cls, model: HookedModel) -> "LogitLens":
        """A lens on a loaded model."""
        return cls(model)

    def logits(self, residual: mx.array) -> mx.array:
        """Logits [..., d_vocab] of residual-stream values [..., d_model]."""
        return self.model.unembed(residual)

    def predictions(self, prompt: Tokens, *, position: int = -1, top_k: int = 5) -> list[LayerPrediction]:
        """The ``top_k`` most probable next tokens after each layer, at one position of the prompt.

        Args:
            prompt: text or ids of one sequence.
            position: which token's prediction; negative counts from the end.
            top_k: how many, from 1; at most the vocabulary is answered.

        Raises:
            HookError: for a position outside the prompt, several rows of tokens, or a top_k below 1.
        """
        tokens = self.model.to_tokens(prompt)
        if tokens.shape[0] != 1 or top_k < 1:
            raise HookError(f"The lens takes one row of tokens and a top_k from 1, got {tokens.shape[0]} and {top_k}.")
        points = [f"blocks.{layer}.hook_resid_post" for layer in range(self.model.cfg.n_layers)]
        _, cache = self.model.run_with_cache(tokens, names_filter=points, positions=position)
        rows = []
        for layer, point in enumerate(points):
            probabilities = mx.softmax(self.logits(cache[point])[0, 0].astype(mx.float32))
            best = id_list(mx.argsort(-probabilities)[:top_k])
            rows.append(LayerPrediction(layer, point, [self._prediction(t, scalar(probabilities[t])) for t in best]))
        return rows

    def _prediction(self, token_id: int, probability: float) -> Prediction:
        tokenizer = self.model.tokenizer
        return Prediction(token_id, tokenizer.decode([token_id]) if tokenizer else str(token_id), probability)
