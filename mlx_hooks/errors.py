"""The engine's errors: each says what was expected, what was got, and what to do next."""


class HookError(Exception):
    """A hook, capture or edit that cannot be done as asked.

    Args:
        message: one sentence.
        field: the field or argument that is at fault, where one is: ``component`` of a hook, ``top_p`` of a generation.
    """

    intervention: int | None = None
    """Index of the intervention that is at fault, where one is."""
    hook: int | None = None
    """Index of the hook that is at fault among those that were listed, where one is."""
    hook_id: str | None = None
    """The hook that is at fault, where one is."""

    def __init__(self, message: str = "", *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnknownHookError(HookError):
    """A hook point, layer, component or hook id that the model does not have; the message lists what it has."""


class UnknownVectorError(HookError):
    """A trait's vector that there is not; the message lists those that there are."""


class ObserverError(HookError):
    """An observer of a generation that failed; what it raised is the ``__cause__``.

    Args:
        name: the observer's name.
        event: the event in which it failed: ``on_attention_computed``.
    """

    def __init__(self, message: str = "", *, name: str = "", event: str = "") -> None:
        super().__init__(message)
        self.name = name
        self.event = event


class UnsupportedModelError(HookError):
    """A model whose module tree is not understood well enough to be hooked exactly."""


class ModelLoadError(HookError):
    """A model path or name that could not be loaded."""


class UnreadableRunWarning(UserWarning):
    """Saved runs that a query passed over because they cannot be read; the message names them."""


class UploadWarning(UserWarning):
    """Captured rows that could not be uploaded, and where they are; the message says why."""


class UnreadableShardWarning(UserWarning):
    """Files of captured rows that were passed over because they cannot be read; the message names them."""


class CaptureWarning(UserWarning):
    """A training step that was not captured, or that an earlier training has captured too; training goes on."""


class UntrustedHookWarning(UserWarning):
    """An identity that captures must satisfy does not hold on this model; the message names the hook points."""


class ObserverWarning(UserWarning):
    """What an observer of a generation could not see, or in which event it failed while errors are collected."""


class FailedAnalysisWarning(UserWarning):
    """An analysis of captured activations that failed while the others go on; the message says which and why."""
