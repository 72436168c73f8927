"""Hook specs by ``hook_id``: the vocabulary of the REST API (layer_name + component), for Python too."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from .activations import CapturedActivation
from .architectures import Architecture
from .errors import HookError, UnknownHookError
from .hook_points import HookPoint, NamesFilter, component_points, is_layer_glob, rest_name
from .hooks import HeadIndices, HeadSelection, Hook, Recorder, Run, head_indices, rows_due
from .interventions import Reach
from .interventions.reach import within_reach
from .interventions.reading import OPEN, Chosen, Indices, chosen_of, span
from .reductions import Projection, Reduction, check_reducible, check_reduction


@dataclass(frozen=True)
class HookSpec:
    """What to capture, in the REST vocabulary or by name, and how much of it.

    >>> HookSpec("transformer.h.5", "residual").hook_id
    'transformer.h.5_residual'
    >>> HookSpec(hook_point="blocks.*.attn.hook_z", positions="last", heads=[0, 3], reduce="norm").hook_id
    'blocks.*.attn.hook_z'

    Args:
        layer_name: a block (``transformer.h.5``, ``model.layers.5``, ``blocks.5``, ``5``), every block that has the
            component (``*``, ``transformer.h.*``), the embedding (``transformer.wte``) or the last norm
            (``transformer.ln_f``).
        component: residual, attention, mlp, embedding, layernorm, query, key, value, attention_scores or
            attention_pattern.
        hook_id: the key of the records; default ``{layer_name}_{component}``, or ``hook_point``.
        capture_input, capture_output: which side of the module.
        hook_point: in place of layer_name and component a hook-point name, an alias, a glob or a raw module path.
        positions: absolute ones to keep. None is all. A number, a list, a slice or ``{"start": 2, "stop": 5}`` (either
            may be missing), from 0 up; or ``"last"``: the last token of the prompt, and each generated one. Forward
            passes that have none of them compute nothing for this hook. What is kept is a slice of the whole capture,
            bit for bit; attention scores, pattern and sink, computed for these rows alone, equal it within rounding.
        heads: query heads to keep where there is a head axis; of keys and values, the key-value heads that serve them.
            A number or a list; negative ones count from the last head. None is all.
        reduce: "mean", "max" or "last" over the positions of a record, "norm", the length (L2) along the last axis,
            "head_mean", or dot products with vectors: :class:`Projection`; in float32. The prompt is one record, each
            generated token is one.

    Raises:
        HookError: when neither side is captured, no place or two are named, or a field has the wrong type.
    """

    layer_name: str = ""
    component: str = ""
    hook_id: str = ""
    capture_input: bool = False
    capture_output: bool = True
    hook_point: str = ""
    positions: Indices | str = None
    heads: HeadIndices = None
    reduce: Reduction | None = None

    def __post_init__(self) -> None:
        for name in ("layer_name", "component", "hook_id", "hook_point"):
            if not isinstance(getattr(self, name), str):
                raise HookError(f"{name} of a hook is a string, got {getattr(self, name)!r}.")
        for name in ("capture_input", "capture_output"):
            if not isinstance(getattr(self, name), bool):
                raise HookError(f"{name} of a hook is true or false, got {getattr(self, name)!r}.")
        if self.hook_point and (self.layer_name or self.component):
            raise HookError("A hook has layer_name and component, or else hook_point.")
        if not self.hook_id:
            object.__setattr__(self, "hook_id", self.hook_point or f"{self.layer_name}_{self.component}")
        if not (self.capture_input or self.capture_output):
            raise HookError(f"Hook {self.hook_id!r} captures nothing: set capture_input or capture_output.")
        if self.hook_point and self.capture_input:
            raise HookError("A hook_point is one place: capture_input belongs to layer_name and component.")
        with blame_hook(self.hook_id):
            self._check_selection()

    def _check_selection(self) -> None:
        """Check what is kept, and write it in one spelling: ranges and ascending tuples."""
        if not (isinstance(self.positions, str) and self.positions == "last"):
            chosen = chosen_of("positions", self.positions, " or 'last'")
            object.__setattr__(self, "positions", tuple(sorted(chosen)) if isinstance(chosen, tuple) else chosen)
        if self.heads is not None:
            object.__setattr__(self, "heads", head_indices(self.heads))
        check_reduction(self.reduce)

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
        given = {key: value for key, value in spec.items() if value is not None}
        unknown = sorted(str(key) for key in set(spec) - set(known))
        missing = [] if "hook_point" in given else sorted({"layer_name", "component"} - set(given))
        if unknown or missing:
            what = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
            more = ", ".join(name for name in known[2:] if name != "hook_point")
            raise HookError(
                f"A hook spec with {what}: it has layer_name and component, or else hook_point, and optionally {more}."
            )
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain JSON values; None for what is not given."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.reduce, Projection):
            values["reduce"] = repr(self.reduce)
        positions = self.positions
        if isinstance(positions, range):
            stop = {"stop": positions.stop} if positions.stop < OPEN else {}
            values["positions"] = {"start": positions.start} | stop
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: None if value == "" else value for name, value in plain.items()}

    def points(self, architecture: Architecture) -> list[tuple[HookPoint, bool]]:
        """The hook points that layer_name and component mean, each with whether it is a module's input.

        Raises:
            UnknownHookError: for an unknown layer or component, and for one that this architecture lacks.
        """
        return [(point, is_input) for _, point, is_input in self.places(architecture)]

    def places(self, architecture: Architecture) -> Iterator[tuple[str, HookPoint, bool]]:
        """The same, each with the name of its layer: a glob's, filled in."""
        names = [self.layer_name]
        if is_layer_glob(self.layer_name):
            names = [self.layer_name.replace("*", str(i)) for i in range(len(architecture.blocks))]
        problem: HookError | None = None
        found = False
        for name in names:
            try:
                places = self._places_of(name, architecture)
            except HookError as error:
                # Of a glob, the layers that have the component are meant.
                problem = problem or error
                continue
            found = True
            yield from places
        if problem is not None and not found:
            raise problem

    def _places_of(self, layer_name: str, architecture: Architecture) -> list[tuple[str, HookPoint, bool]]:
        found = []
        for is_input, wanted in [(True, self.capture_input), (False, self.capture_output)]:
            if not wanted:
                continue
            points = component_points(
                layer_name,
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
                        f"{architecture.cfg.model_type} has no {point.name}, which {layer_name!r} + "
                        f"{self.component!r} mean. Its hook points: print(model)."
                    )
                found.append((layer_name, architecture.points[point.name], is_input))
        return found


@contextmanager
def blame_hook(hook_id: str) -> Iterator[None]:
    """Say in an error which hook it is about, in words and as ``error.hook_id``."""
    try:
        yield
    except HookError as error:
        blamed = type(error)(f"Hook {hook_id!r}: {error}", field=error.field)
        blamed.hook_id = hook_id
        raise blamed from error


@contextmanager
def _counted(i: int) -> Iterator[None]:
    """Say in an error which of the listed captures it is about."""
    try:
        yield
    except HookError as error:
        error.hook = i
        raise


@dataclass(frozen=True)
class ResolvedCapture:
    """One hook point to record: how much of it, and the labels of its records."""

    point: HookPoint
    labels: Mapping[str, Any]
    positions: Chosen | str | None = None
    heads: HeadSelection | None = None
    reduce: Reduction | None = None

    def due(self, reach: Reach, whole: bool = True) -> Sequence[int] | None:
        """The absolute positions to keep of a run, ascending; None for all.

        Args:
            reach: the positions that the run comes to.
            whole: False where it is a part of a sequence, so that other parts may come to other positions.

        Raises:
            HookError: for positions that a whole run never comes to.
        """
        if self.positions is None and self.reduce != "last":
            return None
        if isinstance(self.positions, tuple) and not whole:
            due: Sequence[int] = [p for p in self.positions if p in reach.positions(None)]
        else:
            due = within_reach(self.positions, reach)
        if not due and whole:
            raise HookError(
                f"there is nothing to capture: this run comes to positions {span(reach.positions(None))}.",
                field="positions",
            )
        if self.reduce != "last":
            return due
        # One record per forward pass, after that of the prompt: the last row of each is what is asked for.
        of_prompt = rows_due(due, 0, reach.prompt_stop)
        return due[max(len(of_prompt) - 1, 0) :]


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

    def due_from(self, reach: Reach) -> dict[str, int]:
        """By hook id the first position of a run that it keeps: a run that ends before it leaves no record.

        Raises:
            HookError: for positions that the run never comes to.
        """
        first: dict[str, int] = {}
        for capture in self.captures:
            due = self._due(capture, reach)
            at = reach.start if due is None else due[0]
            hook_id = capture.labels["hook_id"]
            first[hook_id] = min(at, first.get(hook_id, at))
        return first

    def hooks(
        self, run: Run, keep: Callable[[CapturedActivation], None], reach: Reach, whole: bool = True
    ) -> list[Hook]:
        """Reading hooks that hand what they keep of each forward pass to ``keep``; see ``reductions.finish``.

        Args:
            run: where the current forward pass stands.
            reach: the positions that the run comes to.
            whole: False where it is a part of a sequence, so that other parts may come to other positions.

        Raises:
            HookError: for positions that a whole run never comes to; ``error.hook_id`` says whose.
        """
        hooks = []
        for capture in self.captures:
            due = self._due(capture, reach, whole)
            recorder = Recorder(run, keep, heads=capture.heads, due=due, reduce=capture.reduce, **capture.labels)
            hooks.append(recorder.hook(capture.point))
        return hooks

    @staticmethod
    def _due(capture: ResolvedCapture, reach: Reach, whole: bool = True) -> Sequence[int] | None:
        with blame_hook(capture.labels["hook_id"]):
            return capture.due(reach, whole)

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
        HookError: when two specs share a hook id; ``error.hook`` is the index of the capture at fault.
        UnknownHookError: for a layer, component or name that the model lacks.
    """
    resolved: list[ResolvedCapture] = []
    seen: set[str] = set()
    names: set[str] = set()
    if isinstance(captures, str | HookSpec | Mapping):
        captures = [captures]
    if not isinstance(captures, Iterable):
        raise HookError(f"capture is a list of hook specs and hook-point names, got {captures!r}.")
    for i, capture in enumerate(captures):
        with _counted(i):
            if isinstance(capture, str):
                # Names and globs may overlap: a point is captured once under its own name.
                points = [point for point in select(capture) if point.name not in names]
                names.update(point.name for point in points)
                resolved += [ResolvedCapture(point, {"hook_id": point.name}) for point in points]
                continue
            spec = HookSpec.of(capture)
            if spec.hook_id in seen:
                raise HookError(
                    f"Two hooks share the hook_id {spec.hook_id!r}: give each its own.",
                    field="hook_id",
                )
            seen.add(spec.hook_id)
            resolved += _resolved(spec, architecture, select)
    if seen & names:
        raise HookError(f"The hook_id {min(seen & names)!r} is the name of a captured hook point too: choose another.")
    return CapturePlan(resolved)


def _resolved(
    spec: HookSpec, architecture: Architecture, select: Callable[[NamesFilter], list[HookPoint]]
) -> list[ResolvedCapture]:
    """A spec's captures, its selection checked against the axes and heads of each hook point."""
    found: list[tuple[HookPoint, dict[str, Any]]] = []
    if spec.hook_point:
        for point in select(spec.hook_point):
            layer_name, component, is_input = rest_name(point)
            found.append((point, {"layer_name": layer_name, "component": component, "is_input": is_input}))
    else:
        for layer_name, point, is_input in spec.places(architecture):
            labels = {"layer_name": layer_name, "component": spec.component, "is_input": is_input}
            found.append((point, labels))
    with blame_hook(spec.hook_id):
        if spec.heads is not None and not any("head" in point.axes for point, _ in found):
            axes = ", ".join(found[0][0].axes) or "unnamed"
            raise HookError(f"heads need a head axis; the axes of {found[0][0].name} are {axes}.", field="heads")
        resolved = []
        for point, labels in found:
            if spec.positions is not None and point.position_axis is None:
                axes = ", ".join(point.axes) or "unnamed"
                raise HookError(
                    f"{point.name} has no axis over positions to select on; its axes are {axes}.", field="positions"
                )
            if spec.reduce is not None:
                check_reducible(spec.reduce, point)
            heads = None
            if spec.heads is not None and "head" in point.axes:
                heads = HeadSelection.of(spec.heads, architecture.n_query_heads(point.layer))
            labels = {"hook_id": spec.hook_id} | labels
            resolved.append(ResolvedCapture(point, labels, _positions_of(spec), heads, spec.reduce))
    return resolved


def _positions_of(spec: HookSpec) -> Chosen | str | None:
    # HookSpec.__post_init__ left nothing else.
    assert spec.positions is None or isinstance(spec.positions, str | range | tuple)
    return spec.positions


class ActivationHookManager:
    """The hooks registered on a model; they record in every run until they are unregistered.

    ``captured[hook_id]`` holds the records of the latest run: a new run drops the old ones. Positions that a run never
    comes to are refused, save with a KV cache, where a call is a part of a sequence.
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
