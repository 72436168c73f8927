"""The tuned lens: the logit lens with a learned translator per layer.

Source: Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens" (2023).

    1. The translator of a layer maps its residual stream ``h`` to ``h + h A + b``; at first A and b are 0.
    2. Texts run through the model, which stays as it is; they give each layer's stream and the model's own output.
    3. A and b move down the gradient of the divergence KL(model's output || lens on the translated stream).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from .. import hook_points
from ..activations import to_numpy
from ..errors import HookError
from ..model import HookedModel, Tokens
from ..storage.files import reading, try_file, whole_file
from .identity import ModelIdentity

FORMAT = "neuroscope.tuned_lens/1"


@dataclass(frozen=True)
class TunedLensReport:
    """The mean divergence KL(model's output || lens) after each translated layer, in nats per token.

    Args:
        before: with the identity, which is the plain lens.
        after: with the translators, on the same texts.
        n_tokens: positions that were compared.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    n_tokens: int

    def __str__(self) -> str:
        rows = [
            f"  layer {i}: {a:.4f} -> {b:.4f}" for i, (a, b) in enumerate(zip(self.before, self.after, strict=True))
        ]
        return "\n".join([f"KL to the model's output over {self.n_tokens} tokens, in nats", *rows])


class TunedLens:
    """Translators of the streams that leave all layers but the last, whose reading is the model's own output.

        tuned = TunedLens.train(model, texts)
        print(tuned.report)
        LogitLens(model).compute(cache, "resid_out_{i}", tuned=tuned)
        tuned.save("lens.safetensors")
        TunedLens.load("lens.safetensors", model)

    Args:
        model: the model that it belongs to.
        weight: A of each layer, [layer, d_model, d_model].
        bias: b of each layer, [layer, d_model].
        report: how well it was trained; None for one that was not.

    Raises:
        HookError: for a model of one layer or whose last stream is not all that makes its logits, and for arrays of
            other shapes.
    """

    def __init__(
        self, model: HookedModel, weight: mx.array, bias: mx.array, report: TunedLensReport | None = None
    ) -> None:
        layers, width = model.cfg.n_layers - 1, model.cfg.d_model
        if model.last_stream.axes != hook_points.RESID or model.architecture.more_than_last_stream:
            raise HookError(f"A tuned lens needs one stream that makes the logits, unlike {model.cfg.model_type}.")
        if not layers:
            raise HookError("A tuned lens translates the streams of all layers but the last: this model has one layer.")
        if weight.shape != (layers, width, width) or bias.shape != (layers, width):
            raise HookError(
                f"A tuned lens on this model has translators {(layers, width, width)} and {(layers, width)}, got "
                f"{weight.shape} and {bias.shape}."
            )
        self.model = model
        self.weight = weight
        self.bias = bias
        self.report = report

    @classmethod
    def identity(cls, model: HookedModel) -> "TunedLens":
        """The untrained lens, which reads as the plain one."""
        layers, width = model.cfg.n_layers - 1, model.cfg.d_model
        return cls(model, mx.zeros((layers, width, width)), mx.zeros((layers, width)))

    def translate(self, value: mx.array, name: str) -> mx.array:
        """The stream [..., d_model] of a hook point as the last layer would have it, in its own type.

        Raises:
            HookError: for a hook point other than a layer's ``hook_resid_post``.
        """
        layer = self._layers().get(name)
        if layer is None:
            raise HookError(f"A tuned lens reads blocks.*.hook_resid_post (resid_out_{{i}}), not {name}.")
        if layer == self.model.cfg.n_layers - 1:
            return value
        stream = value.astype(mx.float32)
        return (stream + stream @ self.weight[layer] + self.bias[layer]).astype(value.dtype)

    def _layers(self) -> dict[str, int]:
        return {hook_points.block_point("resid_post", i).name: i for i in range(self.model.cfg.n_layers)}

    # Training

    @classmethod
    def train(
        cls,
        model: HookedModel,
        texts: Sequence[Tokens],
        *,
        steps: int = 200,
        batch_size: int = 8,
        learning_rate: float = 1e-3,
        seed: int = 0,
        progress: bool = True,
    ) -> "TunedLens":
        """Train translators on texts or rows of token ids.

        Args:
            texts: what the model reads; a text longer than its context is cut off.
            steps: batches to learn from.
            batch_size: texts per batch, drawn at random.
            learning_rate: of Adam, falling to 0 over the steps.
            seed: of the order of the texts; the same seed gives the same lens.
            progress: show a progress bar.

        Returns:
            the lens; its ``report`` compares it with the plain lens on these texts.

        Raises:
            HookError: for no texts, a model of one layer or whose layers run several times, and numbers out of range.
        """
        lens = cls.identity(model)
        rows = _rows(model, texts)
        for name, number, lowest in (("steps", steps, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            _check_whole(name, number, lowest)
        if isinstance(learning_rate, bool) or not isinstance(learning_rate, int | float) or not 0 < learning_rate < inf:
            raise HookError(f"learning_rate is a finite number above 0, got {learning_rate!r}.", field="learning_rate")
        before, n_tokens = lens._divergence(rows)
        optimizer = optim.Adam(learning_rate=optim.linear_schedule(learning_rate, 0.0, steps))
        order = np.random.default_rng(seed)
        parameters: dict[str, mx.array] = {"weight": lens.weight, "bias": lens.bias}
        for _ in tqdm(range(steps), desc="tuned lens", unit="batch", disable=not progress):
            chosen = order.choice(len(rows), size=min(batch_size, len(rows)), replace=False)
            batch = lens._batch([rows[i] for i in chosen])
            gradients = mx.grad(lambda parameters, batch=batch: lens._loss(parameters, *batch).sum())(parameters)
            parameters = optimizer.apply_gradients(gradients, parameters)
            mx.eval(parameters, optimizer.state)
        trained = cls(model, parameters["weight"], parameters["bias"])
        after, _ = trained._divergence(rows)
        trained.report = TunedLensReport(before, after, n_tokens)
        return trained

    def divergence(self, texts: Sequence[Tokens]) -> tuple[float, ...]:
        """The mean KL(model's output || lens) after each translated layer over texts, in nats per token."""
        return self._divergence(_rows(self.model, texts))[0]

    def _divergence(self, rows: list[list[int]]) -> tuple[tuple[float, ...], int]:
        total = np.zeros(self.model.cfg.n_layers - 1)
        for row in rows:
            loss = self._loss({"weight": self.weight, "bias": self.bias}, *self._batch([row]))
            total += to_numpy(loss, "float64") * len(row)
        n_tokens = sum(map(len, rows))
        return tuple(float(x) for x in total / n_tokens), n_tokens

    def _batch(self, rows: list[list[int]]) -> tuple[mx.array, mx.array, mx.array]:
        """Streams [layer, batch * pos, d_model], log probabilities [batch * pos, d_vocab] of the model's own output,
        and which positions count. Shorter rows are filled up behind, where what comes before cannot see it."""
        longest = max(map(len, rows))
        tokens = [row + [0] * (longest - len(row)) for row in rows]
        counts = mx.array([[i < len(row) for i in range(longest)] for row in rows]).reshape(-1)
        names = list(self._layers())[:-1]
        logits, cache = self.model.run_with_cache(tokens, names)
        if any(record.pass_index for name in names for record in cache.records[name]):
            kind = self.model.cfg.model_type
            raise HookError(f"A tuned lens has one translator per layer, and the layers of {kind} run several times.")
        streams = mx.stack([cache[name].reshape(-1, self.model.cfg.d_model) for name in names])
        own = logits.reshape(-1, logits.shape[-1]).astype(mx.float32)
        return streams, own - mx.logsumexp(own, axis=-1, keepdims=True), counts

    def _loss(self, parameters: dict[str, mx.array], streams: mx.array, own: mx.array, counts: mx.array) -> mx.array:
        """The mean divergence per layer."""
        wide = streams.astype(mx.float32)
        translated = wide + wide @ parameters["weight"] + parameters["bias"][:, None]
        logits = self.model.unembed(translated.astype(streams.dtype)).astype(mx.float32)
        read = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        # What has no probability in the model adds nothing, also where its logit is -inf.
        divergence = mx.where(own > -mx.inf, mx.exp(own) * (own - read), 0.0).sum(axis=-1)
        return (divergence * counts).sum(axis=-1) / counts.sum()

    # Files

    def save(self, path: str | Path) -> Path:
        """Write translators, report and what model they belong to, to one safetensors file; answers its path.

        Raises:
            HookError: when it cannot be written; what was there stays.
        """
        path = Path(path)
        path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
        about = {
            "format": FORMAT,
            **ModelIdentity.of(self.model).to_dict(),
            "report": None if self.report is None else asdict(self.report),
        }
        try:
            # MLX's own message would name the draft.
            try_file(path)
            with whole_file(path) as draft:
                arrays = {"weight": self.weight, "bias": self.bias}
                mx.save_safetensors(str(draft), arrays, {"tuned_lens": json.dumps(about)})
        except (OSError, RuntimeError) as error:
            raise HookError(
                f"The tuned lens cannot be written to {path}: {getattr(error, 'strerror', None) or error}"
            ) from error
        return path

    @classmethod
    def load(cls, path: str | Path, model: HookedModel) -> "TunedLens":
        """Read a lens that was saved for this very model.

        Raises:
            HookError: for a file that cannot be read or is no tuned lens, and for one of another model.
        """
        with reading(path, "tuned lens"):
            arrays, metadata = _load(path)
            about = json.loads(metadata["tuned_lens"])
            if about["format"] != FORMAT:
                raise ValueError(f"it is of the format {about['format']!r}, and this version reads {FORMAT!r}")
            whose = ModelIdentity.from_dict(about)
            weight, bias = (_numbers(arrays, name) for name in ("weight", "bias"))
            report = _report(about["report"])
        if (what := whose.difference(ModelIdentity.of(model))) is not None:
            raise HookError(f"{path} is a tuned lens of another model: {what}.")
        return cls(model, weight, bias, report)


def _check_whole(name: str, number: Any, lowest: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < lowest:
        raise HookError(f"{name} is a whole number from {lowest} up, got {number!r}.", field=name)


def _numbers(arrays: dict[str, mx.array], name: str) -> mx.array:
    array = arrays[name]
    if not mx.issubdtype(array.dtype, mx.floating) or not mx.all(mx.isfinite(array)).item():
        raise ValueError(f"its {name} is {array.dtype}, or not finite")
    return array


def _report(plain: Any) -> TunedLensReport | None:
    if plain is None:
        return None
    before, after = (tuple(map(float, plain[name])) for name in ("before", "after"))
    return TunedLensReport(before, after, int(plain["n_tokens"]))


def _rows(model: HookedModel, texts: Sequence[Tokens]) -> list[list[int]]:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise HookError(f"texts is a list of texts or of rows of token ids, got {texts!r}.", field="texts")
    rows: list[list[int]] = []
    for text in texts:
        rows += model.to_tokens(text).tolist()  # type: ignore[arg-type]
    return [row[: model.cfg.max_positions] for row in rows]


def _load(path: str | Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    # MLX's own message would not tell a file that is missing from one of another kind.
    with Path(path).open("rb"):
        pass
    try:
        found: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except RuntimeError as error:
        raise ValueError("it is no whole safetensors file") from error
    return found
