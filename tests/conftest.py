"""Fixtures that several test files share."""

import os

# No test may reach for a model hub; set before any Hugging Face library is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from mlx_hooks import HookedModel


@pytest.fixture(scope="session")
def tiny() -> HookedModel:
    """The bundled model; tests leave nothing registered on it."""
    return HookedModel.from_pretrained("neuroscope-tiny")


@pytest.fixture(scope="session")
def live_server() -> Iterator[SimpleNamespace]:
    """A real server on a free port with the bundled model loaded as ``neuroscope-tiny``: ``live_server.base_url``."""
    from server_tools import running_server

    from api_server import ModelWorker

    with ModelWorker() as worker:
        worker.load("neuroscope-tiny")
        with running_server(worker) as url:
            yield SimpleNamespace(base_url=url)
