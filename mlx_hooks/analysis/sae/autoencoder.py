"""The autoencoder: what SAELens' inference classes compute, in MLX.

    1. x is brought to the scale that the weights were made for (``normalize_activations``), and b_dec is taken off it
       (``apply_b_dec_to_input``).
    2. pre = x @ W_enc + b_enc, and of it the activations of the latents:
       relu      max(pre, 0)
       topk      max(pre, 0) for the k largest of each row, else 0
       jumprelu  max(pre, 0) where pre > threshold, else 0
    3. What is read back is activations @ W_dec + b_dec, in the scale of x again.

BatchTopK (Bussmann et al. 2024) is a way to train: what comes out of it is a jumprelu with one threshold for all
latents, as in SAELens, so that what a row becomes does not depend on the rows beside it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ...errors import HookError
from ...hook_points import HookPoint
from ...interventions import Intervention

if TYPE_CHECKING:
    from collections.abc import Sequence

ARCHITECTURES = ("relu", "topk", "jumprelu")
NORMALIZATIONS = ("none", "layer_norm", "constant_norm_rescale")
RESHAPES = ("none", "hook_z")
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
_EPSILON = 1e-5
"""SAELens' layer_norm adds it to the standard deviation."""


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """A dictionary of directions, and how much of each a row holds.

        sae = train_sae(reader.rows("blocks.2.hook_resid_post"), {"architecture": "topk", "k": 8}).sae
        features = sae.encode(cache[sae.hook_name])          # [batch, pos, d_sae], mostly 0
        sae.decode(features)                                 # [batch, pos, d_in], about what went in
        model.generate(prompt, interventions=[sae.steering(17, 4.0)])
        sae.save("sae"); SparseAutoencoder.load("sae")

    It computes in float32, whatever the type of its weights and of x.

    Args:
        architecture: "relu" (SAELens: standard), "topk" or "jumprelu".
        W_enc: [d_in, d_sae].
        b_enc: [d_sae].
        W_dec: [d_sae, d_in]; row i is the direction of latent i, of any length.
        b_dec: [d_in].
        threshold: [d_sae], of jumprelu.
        k: latents per row, of topk.
        apply_b_dec_to_input: whether b_dec is taken off x before it is encoded.
        normalize_activations: "none"; "layer_norm" (mean 0 and standard deviation 1, of d_in - 1 degrees of freedom,
            plus 1e-5) or "constant_norm_rescale" (length sqrt(d_in)), row by row, undone on the way out. A row that is
            0 everywhere has no length to bring anywhere and stays 0.
        reshape_activations: "hook_z" for x of [..., head, d_head], which is read as [..., head * d_head].
            Rows of several axes at other points, which SAELens reads flat, are told by ``row_shape`` of the metadata.
        rescale_acts_by_decoder_norm: of topk: the latents are chosen, and told, in units of what they add.
        metadata: plain JSON values; ``hook_name`` says where it belongs, and ``hook_head_index`` to which head there.
        log_sparsity: [d_sae], log10 of the fraction of rows on which a latent fires plus 1e-10, where it was measured.

    Raises:
        HookError: for shapes that do not fit, and for what none of the above allows.
    """

    architecture: str
    W_enc: mx.array
    b_enc: mx.array
    W_dec: mx.array
    b_dec: mx.array
    threshold: mx.array | None = None
    k: int | None = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    log_sparsity: mx.array | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("architecture", ARCHITECTURES),
            ("normalize_activations", NORMALIZATIONS),
            ("reshape_activations", RESHAPES),
        ):
            if getattr(self, name) not in allowed:
                raise HookError(f"{name} is {' or '.join(allowed)}, got {getattr(self, name)!r}.", field=name)
        self._check_weights()
        if (self.threshold is not None) != (self.architecture == "jumprelu"):
            raise HookError("A threshold belongs to jumprelu, and to it alone.", field="threshold")
        if (self.k is not None) != (self.architecture == "topk"):
            raise HookError("k belongs to topk, and to it alone.", field="k")
        if self.k is not None and (type(self.k) is not int or not 1 <= self.k <= self.d_sae):
            raise HookError(
                f"k is a whole number from 1 to {self.d_sae}, the number of latents; got {self.k!r}.", field="k"
            )
        if self.rescale_acts_by_decoder_norm and self.architecture != "topk":
            raise HookError("rescale_acts_by_decoder_norm belongs to topk.", field="rescale_acts_by_decoder_norm")
        if self.normalize_activations == "layer_norm" and self.d_in < 2:
            raise HookError("layer_norm needs rows of at least 2 numbers.", field="normalize_activations")

    def _check_weights(self) -> None:
        if self.W_enc.ndim != 2 or not self.W_enc.size:
            raise HookError(f"W_enc is [d_in, d_sae], got {self.W_enc.shape}.", field="W_enc")
        d_in, d_sae = self.W_enc.shape
        shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        shapes |= {name: (d_sae,) for name in ("threshold", "log_sparsity") if getattr(self, name) is not None}
        for name, shape in shapes.items():
            weight = getattr(self, name)
            if weight.shape != shape:
                raise HookError(f"{name} is {shape} where W_enc is {(d_in, d_sae)}, got {weight.shape}.", field=name)
            if weight.dtype not in DTYPES or not mx.isfinite(weight).all().item():
                raise HookError(f"{name} holds {weight.dtype}, or numbers that are not finite.", field=name)

    def __repr__(self) -> str:
        where = f" at {self.hook_name}" if self.hook_name else ""
        return f"SparseAutoencoder({self.architecture}, {self.d_in} -> {self.d_sae}{where})"

    @property
    def d_in(self) -> int:
        """Numbers in a row."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Latents."""
        return self.W_enc.shape[1]

    @property
    def dtype(self) -> mx.Dtype:
        """The type of the weights."""
        return self.W_enc.dtype

    @property
    def hook_name(self) -> str | None:
        """The hook point whose rows it was made for, where it is known."""
        return self.metadata.get("hook_name")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of one row at its hook point, ``(head, d_head)``; ``(d_in,)`` where nothing else is known."""
        told = self.metadata.get("row_shape")
        if not isinstance(told, list | tuple) or any(type(size) is not int for size in told):
            return (self.d_in,)
        return tuple(told) if int(np.prod(told)) == self.d_in else (self.d_in,)

    # What it computes

    def encode(self, x: mx.array) -> mx.array:
        """The activations [..., d_sae] of the latents on x [..., d_in], from 0 up, in float32.

        Rows may have the axes that they have at the hook point: [..., head, d_head].
        """
        rows, _ = self._normalized(self._rows(x))
        return self._activations(self._pre(rows))

    def pre_activations(self, x: mx.array) -> mx.array:
        """What the activations are made of, [..., d_sae] in float32: they are 0 where this is not above 0."""
        return self._pre(self._normalized(self._rows(x))[0])

    def decode(self, features: mx.array, x: mx.array | None = None) -> mx.array:
        """What activations [..., d_sae] stand for, [..., d_in] in float32.

        Args:
            x: what was encoded, which has the scale that ``layer_norm`` and ``constant_norm_rescale`` go back to.

        Raises:
            HookError: for other shapes, and where x is missing.
        """
        if features.shape[-1:] != (self.d_sae,):
            raise HookError(f"{self!r} decodes [..., {self.d_sae}], got {features.shape}.")
        return self._out(self._sum(features), x)

    def __call__(self, x: mx.array) -> mx.array:
        """x as the autoencoder has it, in the shape of x, in float32."""
        return self.decode(self.encode(x), x).reshape(x.shape)

    def contribution(self, x: mx.array, feature: int) -> mx.array:
        """What one latent adds to ``self(x)``, in the shape of x, in float32."""
        return self._part(x, self.encode(x)[..., feature], feature)

    def direction(self, feature: int) -> mx.array:
        """[d_in]: what an activation of 1 of a latent adds, in float32, in the scale of the weights."""
        self._check_feature(feature)
        return self._directions()[feature]

    def _part(self, x: mx.array, activation: mx.array, feature: int) -> mx.array:
        _, (_, factor) = self._normalized(self._rows(x))
        return (activation[..., None] * self.direction(feature) * factor).reshape(x.shape)

    def _directions(self) -> mx.array:
        weights = self.W_dec.astype(mx.float32)
        if not self.rescale_acts_by_decoder_norm:
            return weights
        lengths = self._lengths()[:, None]
        return weights / mx.where(lengths > 0, lengths, 1.0)

    def _lengths(self) -> mx.array:
        return mx.linalg.norm(self.W_dec.astype(mx.float32), axis=-1)

    def _rows(self, x: mx.array) -> mx.array:
        """x as [..., d_in] in float32."""
        shape = self.row_shape
        if len(shape) > 1 and x.shape[-len(shape) :] == shape:
            x = x.reshape(*x.shape[: -len(shape)], self.d_in)
        elif self.reshape_activations == "hook_z" and x.ndim > 1 and x.shape[-1] * x.shape[-2] == self.d_in:
            x = x.reshape(*x.shape[:-2], self.d_in)
        if x.shape[-1:] != (self.d_in,):
            raise HookError(f"{self!r} encodes [..., {self.d_in}], got {x.shape}.")
        return x.astype(mx.float32)

    def _normalized(self, x: mx.array) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        """x in the scale of the weights, and the way back: (what is added, what is multiplied with before)."""
        if self.normalize_activations == "layer_norm":
            mean = x.mean(axis=-1, keepdims=True)
            deviation = mx.sqrt(((x - mean) ** 2).sum(axis=-1, keepdims=True) / (self.d_in - 1))
            return (x - mean) / (deviation + _EPSILON), (mean, deviation)
        if self.normalize_activations == "constant_norm_rescale":
            length = mx.linalg.norm(x, axis=-1, keepdims=True) / self.d_in**0.5
            return mx.where(length > 0, x / mx.where(length > 0, length, 1.0), 0.0), (mx.array(0.0), length)
        return x, (mx.array(0.0), mx.array(1.0))

    def _pre(self, rows: mx.array) -> mx.array:
        if self.apply_b_dec_to_input:
            rows = rows - self.b_dec.astype(mx.float32)
        pre = rows @ self.W_enc.astype(mx.float32) + self.b_enc.astype(mx.float32)
        return pre * self._lengths() if self.rescale_acts_by_decoder_norm else pre

    def _activations(self, pre: mx.array) -> mx.array:
        positive = mx.maximum(pre, 0.0)
        if self.threshold is not None:
            return mx.where(pre > self.threshold.astype(mx.float32), positive, 0.0)
        return positive if self.k is None else keep_largest(positive, self.k)

    def _sum(self, features: mx.array) -> mx.array:
        return features.astype(mx.float32) @ self._directions() + self.b_dec.astype(mx.float32)

    def _out(self, rows: mx.array, x: mx.array | None) -> mx.array:
        if self.normalize_activations == "none":
            return rows
        if x is None:
            raise HookError(f"decode needs x: {self.normalize_activations} goes back to its scale.", field="x")
        _, (added, factor) = self._normalized(self._rows(x))
        return rows * factor + added

    def _check_feature(self, feature: Any) -> None:
        if isinstance(feature, bool) or not isinstance(feature, int | np.integer) or not 0 <= feature < self.d_sae:
            raise HookError(f"feature is 0 to {self.d_sae - 1}, got {feature!r}.", field="feature")

    # Edits

    def steering(
        self,
        feature: int,
        coefficient: float,
        *,
        hook_point: str | None = None,
        shape: "Sequence[int] | None" = None,
        positions: Any = None,
        phase: str | None = None,
    ) -> Intervention:
        """The edit that adds ``coefficient`` times a latent's direction: what the autoencoder would read back if the
        latent were that much more active.

        Args:
            feature: the latent.
            coefficient: in units of the latent's activation.
            hook_point: in place of the autoencoder's own.
            shape: of one row, where it has several axes: [head, d_head]; by default what it was trained on.
            positions, phase: see :class:`Intervention`.

        Raises:
            HookError: for a latent that there is not, without a hook point, and where ``normalize_activations`` makes a
                unit of activation another length in every row.
        """
        self._check_feature(feature)
        if self.normalize_activations != "none":
            raise HookError(
                f"With {self.normalize_activations} a unit of activation has another length in every row, which no one "
                "vector adds: use set_feature."
            )
        return Intervention(
            hook_point=self.where(hook_point),
            type="add",
            vector=np.array(self.direction(feature)).reshape(self._row_shape(shape)),
            coefficient=float(coefficient),
            positions=positions,
            phase=phase,
            heads=self.metadata.get("hook_head_index"),
        )

    def set_feature(self, feature: int, activation: float) -> Callable[[mx.array, HookPoint], mx.array]:
        """A hook function that gives a latent this activation at every position: x + (activation - its own) *
        direction.

        What the autoencoder does not read back, its error, stays as it is.

            model.run_with_hooks(tokens, [(sae.hook_name, sae.set_feature(17, 8.0))])
        """
        self._check_feature(feature)
        if isinstance(activation, bool) or not np.isfinite(activation):
            raise HookError(f"activation is a finite number, got {activation!r}.", field="activation")

        def set_to(rows: mx.array) -> mx.array:
            return rows + self._part(rows, activation - self.encode(rows)[..., feature], feature)

        return self.changing(set_to)

    def ablate_feature(self, feature: int) -> Callable[[mx.array, HookPoint], mx.array]:
        """A hook function that takes off what a latent contributes; the error stays."""
        return self.set_feature(feature, 0.0)

    def replace_value(self) -> Callable[[mx.array, HookPoint], mx.array]:
        """A hook function that puts what is read back in the value's place."""

        return self.changing(self)

    def changing(self, change: Callable[[mx.array], mx.array]) -> Callable[[mx.array, HookPoint], mx.array]:
        """A hook function that puts what ``change`` makes of its rows in their place: of [batch, pos, d_in] in float32
        as many. Where it belongs to one head, the others stay."""

        def changing_rows(value: mx.array, point: HookPoint) -> mx.array:
            head = self._head(value)
            own = value if head is None else value[:, :, head]
            made = change(self._flat(own)).reshape(own.shape).astype(value.dtype)
            if head is None:
                return made
            is_it = (mx.arange(value.shape[2]) == head)[:, None]
            return mx.where(is_it, made[:, :, None], value)

        return changing_rows

    def _head(self, value: mx.array) -> int | None:
        """Which head of a value [batch, pos, head, d_head] it belongs to; None for all."""
        head = self.metadata.get("hook_head_index")
        if head is None:
            return None
        if value.ndim != 4 or type(head) is not int or not 0 <= head < value.shape[2]:
            raise HookError(f"{self!r} belongs to head {head!r}, and a row is {value.shape[2:]}.")
        return head

    def _flat(self, value: mx.array) -> mx.array:
        """A hook point's value [batch, pos, ...] with rows [d_in] in float32."""
        wide = value.reshape(*value.shape[:2], -1)
        if wide.shape[-1] != self.d_in:
            raise HookError(f"{self!r} reads rows of {self.d_in} numbers, got {value.shape[2:]}.")
        return wide.astype(mx.float32)

    def where(self, hook_point: str | None = None) -> str:
        """The hook point that was given, or else its own.

        Raises:
            HookError: where it has none.
        """
        found = self.hook_name if hook_point is None else hook_point
        if not found:
            raise HookError("This autoencoder does not say where it belongs: give hook_point.", field="hook_point")
        return found

    def _row_shape(self, shape: "Sequence[int] | None") -> tuple[int, ...]:
        found = self.row_shape if shape is None else tuple(int(size) for size in shape)
        if int(np.prod(found)) != self.d_in:
            raise HookError(f"shape is that of a row of {self.d_in} numbers, got {list(found)}.", field="shape")
        if self.reshape_activations == "hook_z" and len(found) == 1 and shape is None:
            raise HookError("shape is missing: [head, d_head] of the rows that it reads.", field="shape")
        return found

    # Other forms of the same

    def with_scale(self, factor: float) -> "SparseAutoencoder":
        """The same for rows that are ``1 / factor`` times as large: what ``expected_average_only_in`` means.

        SAELens' ``fold_activation_norm_scaling_factor``: activations stay as they are, or, with
        ``rescale_acts_by_decoder_norm``, shrink as what they add does.
        """
        if isinstance(factor, bool) or not np.isfinite(factor) or factor <= 0:
            raise HookError(f"A scale is a finite number above 0, got {factor!r}.", field="norm_scaling_factor")
        kind = self.dtype

        def times(weight: mx.array, by: float) -> mx.array:
            return (weight.astype(mx.float32) * by).astype(kind)

        return replace(
            self,
            W_enc=times(self.W_enc, factor),
            W_dec=times(self.W_dec, 1 / factor),
            b_dec=times(self.b_dec, 1 / factor),
        )

    def with_log_sparsity(self, firing_rate: np.ndarray) -> "SparseAutoencoder":
        """The same, with how often each latent fires [d_sae], as a fraction of rows."""
        return replace(self, log_sparsity=mx.array(np.log10(np.asarray(firing_rate) + 1e-10).astype(np.float32)))

    # Files

    def save(self, folder: str | Path) -> Path:
        """Write SAELens' ``cfg.json`` and ``sae_weights.safetensors`` (and ``sparsity.safetensors``) to a folder.

        Raises:
            HookError: when it cannot be written; what was there stays.
        """
        from .files import save_sae

        return save_sae(self, folder)

    @classmethod
    def load(cls, folder: str | Path, *, norm_scaling_factor: float | None = None) -> "SparseAutoencoder":
        """Read a folder that SAELens or :meth:`save` wrote; see :func:`.files.load_sae`."""
        from .files import load_sae

        return load_sae(folder, norm_scaling_factor=norm_scaling_factor)


def keep_largest(values: mx.array, k: int) -> mx.array:
    """The k largest of each row [..., n], the others 0; of equal ones any."""
    if k >= values.shape[-1]:
        return values
    chosen = mx.stop_gradient(mx.argpartition(-values, k - 1, axis=-1)[..., :k])
    kept = mx.put_along_axis(mx.zeros(values.shape, mx.bool_), chosen, mx.array(True), axis=-1)
    return mx.where(kept, values, 0.0)
