"""The toy model of superposition (Elhage et al. 2022), trained on the spot: n features squeezed into m dimensions.

h = W x, x' = relu(W^T h + b); the loss is the mean of importance * (x - x')^2. Features are 0 with probability
``sparsity``, else uniform between 0 and 1.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np


def train_toys(
    sparsity: float, importance: Sequence[float], *, m: int = 2, n_seeds: int = 6, steps: int = 1200, batch: int = 256
) -> np.ndarray:
    """W [m, n] of the seed with the smallest loss at the end, all seeds trained side by side."""
    n = len(importance)
    weight = mx.array(importance)
    parameters = {"W": mx.random.normal((n_seeds, m, n), key=mx.random.key(0)) / m**0.5, "b": mx.zeros((n_seeds, 1, n))}
    optimizer = optim.Adam(learning_rate=optim.linear_schedule(2e-2, 1e-3, steps), bias_correction=True)
    optimizer.init(parameters)

    def losses(parameters: dict[str, mx.array], x: mx.array) -> mx.array:
        read = mx.maximum((x @ parameters["W"].swapaxes(1, 2)) @ parameters["W"] + parameters["b"], 0.0)
        return (weight * (x - read) ** 2).sum(-1).mean(-1)

    def step(parameters: dict[str, mx.array], x: mx.array) -> dict[str, mx.array]:
        gradients = mx.grad(lambda p: losses(p, x).sum())(parameters)
        return optimizer.apply_gradients(gradients, parameters)

    random = np.random.default_rng(0)
    for _ in range(steps):
        parameters = step(parameters, mx.array(features(random, (n_seeds, batch, n), sparsity)))
        mx.eval(parameters, optimizer.state)
    last = losses(parameters, mx.array(features(random, (n_seeds, 20 * batch, n), sparsity)))
    return np.array(parameters["W"][mx.argmin(last).item()])


def features(random: np.random.Generator, shape: tuple[int, ...], sparsity: float) -> np.ndarray:
    """Sparse features in float32."""
    return (random.random(shape, np.float32) * (random.random(shape, np.float32) >= sparsity)).astype(np.float32)


def angles_between_neighbours(W: np.ndarray) -> np.ndarray:
    """The angles from each column [2] to the next one around the circle, in degrees: they sum to 360."""
    around = np.sort(np.degrees(np.arctan2(W[1], W[0])))
    return np.diff(np.append(around, around[0] + 360))
