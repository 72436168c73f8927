"""What a sparse autoencoder is trained to make small, for each way of being sparse.

    relu       FVU + l1 * mean over rows of sum |activation|                     Bricken et al. 2023
    topk       FVU, with the k largest latents of each row                       Gao et al. 2024
    batchtopk  FVU, with the k * rows largest latents of the batch               Bussmann et al. 2024
    jumprelu   FVU + c * (L0 / target - 1)^2, thresholds by straight-through     Rajamanoharan et al. 2024
               estimators: their gradient is that of a ramp as wide as ``bandwidth``

Rows come centred, with a mean squared length of 1, so the squared error is the fraction of variance unexplained (FVU).
L0 is the mean number of latents that fire on a row.
"""

from dataclasses import dataclass

import mlx.core as mx

from .autoencoder import keep_largest

Parameters = dict[str, mx.array]


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Args:
        architecture: one of the table.
        k: latents per row, of topk and batchtopk.
        penalty: l1 of relu, c of jumprelu.
        target_l0, bandwidth: of jumprelu.
        auxiliary: the weight of the loss by which latents that have not fired for long learn what the others leave over
            (Gao et al., A.2); 0 for none.
    """

    architecture: str
    k: int = 1
    penalty: float = 0.0
    target_l0: float = 1.0
    bandwidth: float = 0.001
    auxiliary: float = 0.0

    def __call__(
        self, weights: Parameters, x: mx.array, dead: mx.array, ramp: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """The loss of rows x [row, d_in]; its two parts, squared error and what sparsity asks; latents that fired.

        Args:
            dead: [d_sae], which latents have not fired for long.
            ramp: 0 to 1, with which the penalty is multiplied: it rises while training begins.
        """
        pre = pre_activations(weights, x)
        features = self.activations(weights, pre)
        left = x - decoded(weights, features)
        error = (left**2).sum(axis=-1).mean()
        sparsity = mx.array(0.0)
        if self.architecture == "relu":
            sparsity = ramp * self.penalty * features.sum(axis=-1).mean()
        elif self.architecture == "jumprelu":
            l0 = _ramp_step(mx.stop_gradient(pre), weights["threshold"], self.bandwidth).sum(axis=-1).mean()
            sparsity = ramp * self.penalty * (l0 / self.target_l0 - 1) ** 2
        if self.auxiliary:
            sparsity = sparsity + self.auxiliary * self._auxiliary(weights, pre, mx.stop_gradient(left), dead)
        return error + sparsity, error, sparsity, features > 0

    def value(self, error: float, l1: float, l0: float) -> float:
        """The loss where its parts are known: squared error, sum of activations and latents that fire, each the mean
        over rows; without an auxiliary loss."""
        if self.architecture == "relu":
            return error + self.penalty * l1
        return error + self.penalty * (l0 / self.target_l0 - 1) ** 2 if self.architecture == "jumprelu" else error

    def activations(self, weights: Parameters, pre: mx.array) -> mx.array:
        """The latents' activations on the rows of a batch, [row, d_sae]."""
        if self.architecture == "jumprelu":
            threshold = weights["threshold"]
            opens = mx.stop_gradient((pre > threshold).astype(mx.float32))
            # The value is pre where it is above the threshold; the threshold's gradient is that of the ramp, times it.
            ramp = _ramp_step(mx.stop_gradient(pre), threshold, self.bandwidth)
            return mx.maximum(pre, 0.0) * opens + mx.stop_gradient(threshold) * (ramp - mx.stop_gradient(ramp))
        positive = mx.maximum(pre, 0.0)
        if self.architecture == "topk":
            return keep_largest(positive, self.k)
        if self.architecture == "batchtopk":
            return keep_largest(positive.reshape(1, -1), self.k * len(pre)).reshape(pre.shape)
        return positive

    def _auxiliary(self, weights: Parameters, pre: mx.array, left: mx.array, dead: mx.array) -> mx.array:
        """The squared error of what is left over as the dead latents would have it."""
        most = max(1, left.shape[-1] // 2)
        chosen = mx.where(dead, keep_largest(mx.where(dead, pre, -mx.inf), most), 0.0)
        error = ((left - chosen @ weights["W_dec"]) ** 2).sum(axis=-1).mean()
        # A few dead latents cannot be asked for as much as many.
        return mx.minimum(dead.sum() / most, 1.0) * error


def pre_activations(weights: Parameters, x: mx.array) -> mx.array:
    """[row, d_sae] of centred and scaled rows."""
    return (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]


def decoded(weights: Parameters, features: mx.array) -> mx.array:
    """[row, d_in] of activations."""
    return features @ weights["W_dec"] + weights["b_dec"]


def _ramp_step(pre: mx.array, threshold: mx.array, bandwidth: float) -> mx.array:
    """1 where pre is above the threshold, else 0, with the gradient of a ramp from 0 to 1 that is ``bandwidth`` wide
    and rises around the threshold."""
    ramp = mx.clip((pre - threshold) / bandwidth + 0.5, 0.0, 1.0)
    step = (pre > threshold).astype(mx.float32)
    return ramp + mx.stop_gradient(step - ramp)
