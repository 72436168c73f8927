"""A trait over all layers: the projection of every token's residual stream onto a trait vector, and who attended whom.

1. The prompt runs through the model once, each generated token once, with the KV cache. Where several traits put
   the prompt to the model as the same tokens, one run serves them all.
2. At each layer the stream is met where it enters, after attention, and where it leaves. There h.v/|v| is computed
   in the pass; the stream itself is not kept.
3. Attention weights are averaged over heads, in the pass too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ...activations import CapturedActivation, id_list, to_numpy
from ...errors import HookError
from ...hook_points import RESID, block_point
from ...manager import HookSpec
from ...model import HookedModel
from ...reductions import Projection
from ...sampling import Sampling, whole_number
from ...token_text import TokenText
from ..identity import ModelIdentity
from .prompts import Chat, render
from .records import ALIGNMENTS, PROJECTIONS, SUBLAYERS, Record
from .vectors import TraitVector, check_vectors
from .watching import room_for

ATTENTION = {True: "mean over heads", False: "not captured"}
"""What metadata says of attention weights."""
_LEAVES = "hook_resid_post"
Vectors = TraitVector | Sequence[TraitVector]
"""A trait's vector, or one for each layer."""
StreamPoints = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
"""For each of ``SUBLAYERS`` the hook points whose sum it is."""


def capture_all_layers(
    model: HookedModel,
    prompt: str | Sequence[int],
    vectors: Sequence[Vectors],
    *,
    max_tokens: int = 50,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    alignment: str = "at",
    attention: bool = True,
    normalize: bool = True,
    identity: ModelIdentity | None = None,
) -> list[Record]:
    """Each token's projection onto trait vectors at every layer, of a prompt and of what the model goes on with.

        vector = Experiment("experiments", "demo").trait("polite").find()
        [record] = capture_all_layers(model, "The capital of France is", [vector], max_tokens=5)
        record["projections"]["response"]                           # [5, n_layers, 3]: residual_in, after_attn, out
        record["attention_weights"]["response"][0]["layer_0"]       # [n_prompt + 1], the mean over heads

    ``after_attn`` is the residual stream between attention and MLP. Where both read the same stream, it is that stream
    and what attention adds to it; ``metadata["after_attn"]`` says for each layer what it is made of.

    Args:
        prompt: a text, which is put to the model as each vector's ``chat`` says, or token ids, which are read as they
            are.
        vectors: of each trait a vector, which is measured at every layer, or a list with one vector for each layer.
        max_tokens: most tokens to generate; no more than the model's context holds.
        alignment: row k of the response shows the state "at" its token k, or the one that "predicts" it, at the token
            before. So a row of attention has n_prompt + k + 1 keys, or n_prompt + k.
        attention: False leaves attention weights out.
        normalize: False measures h.v, not h.v/|v|.
        identity: the model's, where the caller knows it: making it reads all weights.
        temperature, top_p, seed: see ``sampling.Sampling``.

    Returns:
        a record for each trait, in their order; ``records.py`` tells what is in it. Traits that share a run share its
        attention weights.

    Raises:
        HookError: for a vector of another model, a prompt that is empty or too long, a model whose blocks have several
            streams or none after attention, and numbers out of range.
    """
    settings = Settings(max_tokens, temperature, top_p, seed, alignment, normalize)
    true_or_false("attention", attention)
    traits = [AtLayers.of(model, vector) for vector in listed(vectors)]
    identity = check_model(model, [vector for trait in traits for vector in trait.vectors], identity)
    points = [stream_points(model, layer) for layer in range(model.cfg.n_layers)]
    patterns, without = _patterns(model) if attention else ({}, {})
    about = {
        "attention": ATTENTION[attention],
        "layers_without_attention": {str(layer): why for layer, why in without.items()},
        **about_stream(points),
        "attends_repeatedly": repeated_attention(model, range(len(points))),
    }
    records: dict[int, Record] = {}
    for tokens, group in shared_prompts(model, prompt, [trait.vectors[0] for trait in traits]).items():
        captures = [
            HookSpec(hook_point=name, reduce=Projection(rows))
            for layer, rows in enumerate(_measured([traits[i] for i in group], len(points), normalize))
            for name in dict.fromkeys(name for names in points[layer] for name in names)
        ]
        captures += [HookSpec(hook_point=name, reduce="head_mean") for name in patterns.values()]
        run = TraitRun(model, tokens, captures, settings)
        projections = {part: _projections(run, part, points) for part in ("prompt", "response")}
        weights = _attention(run, patterns)
        ahead = [layer for layer, name in patterns.items() if looks_ahead(run.prompt(name))]
        for column, i in enumerate(group):
            records[i] = {
                **run.texts(prompt),
                "projections": {part: values[column] for part, values in projections.items()},
                "attention_weights": weights,
                "metadata": traits[i].metadata(model, prompt, settings)
                | run.metadata(identity)
                | about
                | {"looks_ahead": ahead},
            }
    return [records[i] for i in range(len(traits))]


def stream_points(model: HookedModel, layer: int) -> StreamPoints:
    """The hook points of which the stream at a layer's three ``SUBLAYERS`` is the sum.

    Raises:
        HookError: where the block has several streams, or the stream after attention cannot be seen.
    """
    architecture = model.architecture
    enters, mid, leaves = (block_point(name, layer).name for name in ("resid_pre", "resid_mid", "resid_post"))
    kind = model.cfg.model_type
    for name in (enters, leaves):
        architecture.check_supported(name)
        axes = model.hook_points[name].axes
        if axes != RESID:
            raise HookError(f"A trait is measured in one residual stream; {name} of {kind} is {', '.join(axes)}.")
    if mid in model.hook_points:
        return (enters,), (mid,), (leaves,)
    kinds = [sublayer.kind for sublayer in architecture.sublayers[layer]]
    mixing = [block_point(f"{kind}_out", layer).name for kind in dict.fromkeys(kinds) if kind in ("attn", "mixer")]
    if not architecture.other_sum(layer) and all(name in model.hook_points for name in mixing):
        return (enters,), (enters, *mixing), (leaves,)
    architecture.check_supported(mid)
    why = architecture.other_sum(layer) or f"there is no {mid}"
    raise HookError(f"The stream after attention of layer {layer} cannot be seen on {kind}: {why}.")


def attention_point(model: HookedModel, layer: int) -> tuple[str, str]:
    """The hook point of a layer's attention pattern, and why there is none: one of the two is empty."""
    name = block_point("pattern", layer).name
    if name in model.hook_points:
        return name, ""
    kinds = dict.fromkeys(sublayer.kind for sublayer in model.architecture.sublayers[layer])
    why = model.architecture.unsupported.get(name) or f"no attention, its sublayers are: {', '.join(kinds)}"
    return "", why


def repeated_attention(model: HookedModel, layers: Iterable[int]) -> dict[str, str]:
    """Of layers that attend several times, what of it a record shows, as the metadata ``attends_repeatedly``."""
    found = {}
    for layer in layers:
        kinds = [sublayer.kind for sublayer in model.architecture.sublayers[layer]]
        if (times := kinds.count("attn")) > 1:
            found[str(layer)] = f"{times} attentions: after_attn and attention weights are those of the last"
    return found


def looks_ahead(pattern: np.ndarray) -> bool:
    """Whether tokens attend to later ones. A record's metadata ``looks_ahead`` has the layers of which it is true: a
    few models do so by themselves."""
    return bool(np.triu(pattern, k=1).any())


def _patterns(model: HookedModel) -> tuple[dict[int, str], dict[int, str]]:
    """By layer the hook point of its attention pattern, and by layer why there is none."""
    found = {layer: attention_point(model, layer) for layer in range(model.cfg.n_layers)}
    return {layer: n for layer, (n, _) in found.items() if n}, {layer: why for layer, (_, why) in found.items() if why}


def about_stream(points: Sequence[StreamPoints]) -> dict[str, Any]:
    """What a record says of its sublayers: for each layer, the hook points of which the stream after attention is the
    sum."""
    mid = [" + ".join(name.split(".", 2)[2] for name in after_attn) for _, after_attn, _ in points]
    return {"sublayers": list(SUBLAYERS), "after_attn": mid}


def _measured(traits: Sequence["AtLayers"], n_layers: int, normalize: bool) -> list[mx.array]:
    """By layer the rows [trait, d_model] that its stream is projected onto."""
    found = []
    for layer in range(n_layers):
        chosen = [trait.vectors[layer if trait.each_layer else 0] for trait in traits]
        found.append(mx.array(np.stack([vector.unit if normalize else vector.vector for vector in chosen])))
    return found


def _projections(run: "TraitRun", part: str, points: Sequence[StreamPoints]) -> np.ndarray:
    """[trait, token, layer, 3] of all traits that were measured."""
    layers = [[sum(run.rows(name, part) for name in names) for names in layer] for layer in points]
    return np.ascontiguousarray(np.asarray(layers, np.float32).transpose(3, 2, 0, 1))


def _attention(run: "TraitRun", patterns: dict[int, str]) -> dict[str, Any]:
    rows = {layer: run.last_rows(name) for layer, name in patterns.items()}
    return {
        "prompt": {f"layer_{layer}": run.prompt(name) for layer, name in patterns.items()},
        "response": [{f"layer_{layer}": rows[layer][k] for layer in rows} for k in range(run.n_response)],
    }


# ---------------------------------------------------------------------------------------------------------------------
# What captures of all layers and of one have in common.


@dataclass(frozen=True)
class Settings:
    """How a capture is made; see ``capture_all_layers``.

    Raises:
        HookError: for an unknown alignment, ``normalize`` that is neither true nor false, and numbers out of range.
    """

    max_tokens: int = 50
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0
    alignment: str = "at"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.alignment not in ALIGNMENTS:
            raise HookError(f"alignment is one of {', '.join(ALIGNMENTS)}, got {self.alignment!r}.", field="alignment")
        true_or_false("normalize", self.normalize)
        whole_number("max_tokens", self.max_tokens)
        whole_number("seed", self.seed)
        Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed).check()

    def to_dict(self) -> dict[str, Any]:
        """As metadata has them."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "alignment": self.alignment,
            "projection": PROJECTIONS[self.normalize],
        }


@dataclass(frozen=True)
class AtLayers:
    """A trait's vector for all layers, or a vector for each of them.

    Raises:
        HookError: where there are several, and not one for each layer, or not all made by one method.
    """

    vectors: tuple[TraitVector, ...]
    each_layer: bool

    @classmethod
    def of(cls, model: HookedModel, vectors: Vectors) -> "AtLayers":
        if isinstance(vectors, TraitVector):
            return cls((vectors,), each_layer=False)
        given = tuple(vectors)
        layers, n_layers = [vector.layer for vector in given], model.cfg.n_layers
        if layers != list(range(n_layers)) or len({(vector.trait, vector.method) for vector in given}) != 1:
            missing = ", ".join(str(layer) for layer in range(n_layers) if layer not in layers)
            raise HookError(
                "Vectors for each layer are those of one trait and one method, of layers "
                f"0 to {n_layers - 1} in order{f'; there are none of {missing}' if missing else ''}.",
                field="vectors",
            )
        return cls(given, each_layer=True)

    def metadata(self, model: HookedModel, prompt: str | Sequence[int], settings: Settings) -> dict[str, Any]:
        """What a record says of its trait."""
        vector, several = self.vectors[0], self.each_layer
        norms, paths = [v.norm for v in self.vectors], [_short_path(v.path) for v in self.vectors]
        chat = vector.chat or Chat()
        return {
            "trait": vector.trait,
            "trait_display_name": vector.trait.replace("_", " ").title(),
            "vector_path": paths if several else paths[0],
            "layer": None if several else vector.layer,
            "vector_layer": None if several else vector.layer,
            "each_layer": several,
            "method": vector.method,
            "vector_norm": norms if several else norms[0],
            "vector_sha256": fingerprint_of(self.vectors),
            "chat": chat.to_dict() | {"used": chat.is_used(model)} if isinstance(prompt, str) else None,
            **settings.to_dict(),
        }


def fingerprint_of(vectors: Sequence[TraitVector]) -> str:
    """A hash of the vectors' numbers."""
    found = sha256()
    for vector in vectors:
        found.update(np.ascontiguousarray(vector.vector, "<f4").tobytes())
    return found.hexdigest()


def _short_path(path: Path | None) -> str | None:
    """A vector's path as seen from the folder of any trait beside its own: it stays true when the experiment moves."""
    if path is None:
        return None
    place = path.parts[-4:]
    return "/".join(("..", *place)) if place[1:3] == ("extraction", "vectors") else path.as_posix()


def true_or_false(name: str, value: object) -> None:
    """Raises HookError for anything else."""
    if not isinstance(value, bool):
        raise HookError(f"{name} is true or false, got {value!r}.", field=name)


def listed(vectors: Sequence[Vectors]) -> list[Vectors]:
    """Raises HookError for what is no list of vectors, or lists of them, and for an empty one."""
    is_list = isinstance(vectors, list | tuple)
    check_vectors([one for each in vectors for one in _alike(each)] if is_list else None)
    return list(vectors)


def _alike(vectors: Any) -> Sequence[Any]:
    """What there is of one trait, in a list; a list of nothing stays in it, since it is no vector."""
    return vectors if isinstance(vectors, list | tuple) and vectors else [vectors]


def check_model(
    model: HookedModel, vectors: Sequence[TraitVector], identity: ModelIdentity | None = None
) -> ModelIdentity:
    """The identity of the model that all vectors belong to.

    Raises:
        HookError: for a vector of another model.
    """
    identity = identity or ModelIdentity.of(model)
    for vector in vectors:
        vector.check(model, identity=identity)
    return identity


def shared_prompts(
    model: HookedModel, prompt: str | Sequence[int], vectors: Sequence[TraitVector]
) -> dict[tuple[int, ...], list[int]]:
    """By the tokens that the model reads for a prompt, which vectors, by index, put it so.

    Raises:
        HookError: for a prompt that is empty or too long.
    """
    found: dict[tuple[int, ...], list[int]] = {}
    for i, vector in enumerate(vectors):
        found.setdefault(tuple(tokens_of(model, prompt, vector)), []).append(i)
    return found


def tokens_of(model: HookedModel, prompt: str | Sequence[int], vector: TraitVector) -> list[int]:
    """The tokens that the model reads for a prompt: a text goes through the vector's chat template."""
    if isinstance(prompt, str):
        return render(model, prompt, vector.chat)
    rows = model.to_tokens(prompt)
    if rows.shape[0] != 1:
        raise HookError(f"A capture is of one prompt, got {rows.shape[0]} rows.", field="prompt")
    return id_list(rows[0])


class TraitRun:
    """One generation with captures of the prompt and of each generated token.

    Args:
        tokens: of the prompt.
        captures: hook specs of one hook point each, which is their hook id.

    Raises:
        HookError: for a prompt that is too long, and what ``generate`` refuses.
    """

    def __init__(
        self, model: HookedModel, tokens: Sequence[int], captures: Sequence[HookSpec | str], settings: Settings
    ):
        self.model = model
        self.prompt_ids = list(tokens)
        self.response_ids: list[int] = []
        self.text = ""
        self.finish_reason = "length"
        self.n_passes = 1
        """How often layers run in one forward pass; of several passes, the last is shown."""
        self._alignment = settings.alignment
        self._steps: list[dict[str, np.ndarray]] = []
        self._axes: dict[str, int] = {}
        steps = model.generate_steps(
            self.prompt_ids,
            max_tokens=min(settings.max_tokens, room_for(model, self.prompt_ids)),
            capture=captures,
            read_last=settings.alignment == "at",
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
        )
        for step in steps:
            # One by one: of a long prompt's attention there is then no second copy of all layers.
            met = step.activations
            self._steps.append({name: self._value(met.pop(name)) for name in list(met)})
            self.text += step.text
            self.finish_reason = step.finish_reason or self.finish_reason
            if step.token is not None:
                self.response_ids.append(step.token)

    def _value(self, records: Sequence[CapturedActivation]) -> np.ndarray:
        """What a pass left at a hook point, without the axis of the batch."""
        record = max(records, key=lambda found: found.pass_index)
        if record.hook_point.name.endswith(_LEAVES):
            # A layer that has several attentions meets its other points as often in one pass.
            self.n_passes = max(self.n_passes, record.pass_index + 1)
        axis = record.hook_point.position_axis
        self._axes[record.hook_id] = 0 if axis is None else axis - 1
        return to_numpy(record.value)[0]

    @property
    def n_response(self) -> int:
        return len(self.response_ids)

    def prompt(self, name: str) -> np.ndarray:
        """What was captured of the prompt."""
        return self._steps[0][name]

    def last_rows(self, name: str) -> list[np.ndarray]:
        """What was captured of each token of the response, or of the token that it was predicted at, without the axis
        of positions."""
        first = 1 if self._alignment == "at" else 0
        steps = self._steps[first : first + self.n_response]
        return [np.take(step[name], -1, axis=self._axes[name]) for step in steps]

    def rows(self, name: str, part: str) -> np.ndarray:
        """What was captured of the prompt or of the response, [token, ...]."""
        whole = self.prompt(name)
        if part == "prompt":
            return whole
        return np.stack(self.last_rows(name)) if self.n_response else whole[:0]

    def texts(self, prompt: str | Sequence[int]) -> dict[str, Any]:
        """The prompt and the response of a record. A prompt's text is as it was given, its tokens as they were read."""
        spelling = TokenText(self.model.tokenizer)
        if not isinstance(prompt, str):
            tokenizer = self.model.tokenizer
            prompt = "" if tokenizer is None else str(tokenizer.decode(self.prompt_ids))
        found = {}
        for part, text, ids in (("prompt", prompt, self.prompt_ids), ("response", self.text, self.response_ids)):
            tokens = [spelling.text(token) for token in ids]
            found[part] = {"text": text, "tokens": tokens, "token_ids": list(ids), "n_tokens": len(ids)}
        return found

    def metadata(self, identity: ModelIdentity) -> dict[str, Any]:
        """What a record says of the model and of the run."""
        cfg, sinks = self.model.cfg, [block_point("sink", layer).name for layer in range(self.model.cfg.n_layers)]
        return {
            "model": self.model.model_name,
            "model_identity": identity.to_dict(),
            "capture_date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "finish_reason": self.finish_reason,
            "n_layers": cfg.n_layers,
            "d_model": cfg.d_model,
            "n_heads": cfg.n_heads,
            "n_passes": self.n_passes,
            "attention_sinks": [layer for layer, name in enumerate(sinks) if name in self.model.hook_points],
        }
