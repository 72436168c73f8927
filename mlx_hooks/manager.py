"""Hook specs by ``hook_id``: the vocabulary of the REST API (layer_name + component), for Python too."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from .activations import CapturedActivation
from .architectures import Architecture
from .errors import HookError, UnknownHookError
from .hook_points import HookPoint, NamesFilter, component_points
from .hooks import Hook, Recorder, Run


@dataclass(frozen=True)
class HookSpec:
    """What to capture, in the REST vocabulary.

    >>> HookSpec("transformer.h.5", "residual").hook_id
    'transformer.h.5_residual'

    Args:
        layer_name: a block (``transformer.h.5``, ``model.layers.5``, ``blocks.5``, ``5``), the embedding
            (``transformer.wte``) or the last norm (``transformer.ln_f``).
        component: residual, attention, mlp, embedding, layernorm, query, key, value, attention_scores or
            attention_pattern.
        hook_id: the key of the records; default ``{layer_name}_{component}``.
        capture_input, capture_output: which side of the module.

    Raises:
        HookError: when neither side is captured or a field has the wrong type.
    """

    layer_name: str
    component: str
    hook_id: str = ""
    capture_input: bool = False
    capture_output: bool = True

    def __post_init__(self) -> None:
        for name in ("layer_name", "component", "hook_id"):
            if not isinstance(getattr(self, name), str):
                raise HookError(f"{name} of a hook is a string, got {getattr(self, name)!r}.")
        for name in ("capture_input", "capture_output"):
            if not isinstance(getattr(self, name), bool):
                raise HookError(f"{name} of a hook is true or false, got {getattr(self, name)!r}.")
        if not self.hook_id:
            object.__setattr__(self, "hook_id", f"{self.layer_name}_{self.component}")
        if not (self.capture_input or self.capture_output):
            raise HookError(f"Hook {self.hook_id!r} captures nothing: set capture_input or capture_output.")

    @classmethod
    def of(cls, spec: "HookSpec | Mapping[str, Any]") -> "HookSpec":
        """A spec from a mapping with the same keys (a spec passes through).

        Raises:
            HookError: for unknown or missing keys; lists the known ones.
        """
        if isinstance(spec, HookSpec):
            return spec
        if not isinstance(spec, Mapping):
            raise HookError(f"A hook is a HookSpec or a mapping, got {type(spec).__name__}.")
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(spec) - set(known))
        missing = sorted({"layer_name", "component"} - set(spec))
        if unknown or missing:
            what = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
            raise HookError(
                f"A hook spec with {what}: it has layer_name, component and optionally {', '.join(known[2:])}."
            )
        return cls(**{k: v for k, v in spec.items() if v is not None})

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return asdict(self)

    def points(self, architecture: Architecture) -> list[tuple[HookPoint, bool]]:
        """The hook points meant, each with whether it is a module's input.

        Raises:
            UnknownHookError: for an unknown layer or component, and for one that this architecture lacks.
        """
        found = []
        for is_input, wanted in [(True, self.capture_input), (False, self.capture_output)]:
            if not wanted:
                continue
            points = component_points(
                self.layer_name,
                self.component,
                is_input=is_input,
                n_layers=len(architecture.blocks),
                own_norm=architecture.norm_called,
            )
            if self.component == "layernorm":
                # A block has some of the norms that blocks may have.
                points = [point for point in points if point.name in architecture.points] or points
            for point in points:
                architecture.check_supported(point.name)
                if point.name not in architecture.points:
                    raise UnknownHookError(
                        f"{architecture.cfg.model_type} has no {point.name}, which {self.layer_name!r} + "
                        f"{self.component!r} mean. Its hook points: print(model)."
                    )
                found.append((architecture.points[point.name], is_input))
        return found


@dataclass(frozen=True)
class ResolvedCapture:
    """One hook point to record, with the labels of its records."""

    point: HookPoint
    labels: Mapping[str, Any]


class CapturePlan:
    """Captures checked against a model: what to record, under which hook ids, in the order asked.

    Made by ``HookedModel.resolve_hooks``.
    """

    def __init__(self, captures: Sequence[ResolvedCapture]) -> None:
        self.captures = list(captures)

    @property
    def hook_ids(self) -> list[str]:
        """Each hook id once, in the order asked."""
        return list(dict.fromkeys(capture.labels["hook_id"] for capture in self.captures))

    def hooks(self, run: Run, keep: Callable[[CapturedActivation], None]) -> list[Hook]:
        """Reading hooks that hand each record to ``keep``."""
        return [Recorder(run, keep, **capture.labels).hook(capture.point) for capture in self.captures]

    def joined(self, other: "CapturePlan") -> "CapturePlan":
        """Both plans' captures.

        Raises:
            HookError: when they share a hook id.
        """
        shared = set(self.hook_ids) & set(other.hook_ids)
        if shared:
            raise HookError(f"The hook_id {min(shared)!r} is registered already: choose another for this run.")
        return CapturePlan([*self.captures, *other.captures])

    def __len__(self) -> int:
        return len(self.captures)


Capture = HookSpec | Mapping[str, Any] | str


def resolve(
    captures: Iterable[Capture], architecture: Architecture, select: Callable[[NamesFilter], list[HookPoint]]
) -> CapturePlan:
    """Check specs and names against a model.

    Args:
        captures: hook specs, mappings with their keys, and hook-point names or globs (whose hook id is the name).
        select: finds the points that a name means.

    Raises:
        HookError: when two specs share a hook id.
        UnknownHookError: for a layer, component or name that the model lacks.
    """
    resolved: list[ResolvedCapture] = []
    seen: set[str] = set()
    names: set[str] = set()
    if isinstance(captures, str | HookSpec | Mapping):
        captures = [captures]
    if not isinstance(captures, Iterable):
        raise HookError(f"capture is a list of hook specs and hook-point names, got {captures!r}.")
    for capture in captures:
        if isinstance(capture, str):
            # Names and globs may overlap: a point is captured once under its own name.
            points = [point for point in select(capture) if point.name not in names]
            names.update(point.name for point in points)
            resolved += [ResolvedCapture(point, {"hook_id": point.name}) for point in points]
            continue
        spec = HookSpec.of(capture)
        if spec.hook_id in seen:
            raise HookError(f"Two hooks share the hook_id {spec.hook_id!r}: give each its own.")
        seen.add(spec.hook_id)
        for point, is_input in spec.points(architecture):
            labels = {"hook_id": spec.hook_id, "layer_name": spec.layer_name, "component": spec.component}
            resolved.append(ResolvedCapture(point, labels | {"is_input": is_input}))
    if seen & names:
        raise HookError(f"The hook_id {min(seen & names)!r} is the name of a captured hook point too: choose another.")
    return CapturePlan(resolved)


class ActivationHookManager:
    """The hooks registered on a model; they record in every run until they are unregistered.

    ``captured[hook_id]`` holds the records of the latest run: a new run drops the old ones.
    """

    def __init__(self, resolve: Callable[[Iterable[Capture]], CapturePlan]) -> None:
        self._resolve = resolve
        self.specs: dict[str, HookSpec] = {}
        self.captured: dict[str, list[CapturedActivation]] = {}

    def register(self, spec: HookSpec) -> str:
        """Check a spec against the model and keep it; answers its hook id.

        Raises:
            HookError: when the hook id is taken.
            UnknownHookError: when the model has no such layer or component.
        """
        if spec.hook_id in self.specs:
            raise HookError(f"Hook {spec.hook_id!r} is registered already: unregister it or choose another hook_id.")
        self._resolve([spec])
        self.specs[spec.hook_id] = spec
        return spec.hook_id

    def unregister(self, hook_id: str) -> None:
        """Forget a hook and its records.

        Raises:
            UnknownHookError: lists the registered ids.
        """
        self._check_registered(hook_id)
        del self.specs[hook_id]
        self.captured.pop(hook_id, None)

    def records(self, hook_id: str) -> list[CapturedActivation]:
        """What a hook recorded in the latest run.

        Raises:
            UnknownHookError: lists the registered ids.
        """
        self._check_registered(hook_id)
        return list(self.captured.get(hook_id, []))

    def _check_registered(self, hook_id: str) -> None:
        if hook_id not in self.specs:
            raise UnknownHookError(f"No hook {hook_id!r} is registered. Registered: {', '.join(self.specs) or 'none'}.")

    def clear(self) -> None:
        """Forget all hooks and their records."""
        self.specs.clear()
        self.captured.clear()

    def plan(self) -> CapturePlan:
        """All registered hooks as one plan."""
        return self._resolve(self.specs.values())

    def start(self) -> Callable[[CapturedActivation], None]:
        """Begin a run: drop the records of the last one; answers where this run's records go."""
        records: dict[str, list[CapturedActivation]] = {hook_id: [] for hook_id in self.specs}
        self.captured = records

        def keep(record: CapturedActivation) -> None:
            # A run that goes on while another begins, or whose hook is unregistered, fills its own lists only.
            records.setdefault(record.hook_id, []).append(record)

        return keep

    def __len__(self) -> int:
        return len(self.specs)

    def __repr__(self) -> str:
        return f"ActivationHookManager({', '.join(self.specs) or 'no hooks'})"
