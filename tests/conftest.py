"""Fixtures that several test files share."""

import os

# No test may reach for a model hub; set before any Hugging Face library is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import build_smalltalk
import pytest
from smalltalk_image import Image, canned_server
from smalltalk_packages import write_client
from tiny_models import CONFIGS, make_model

from mlx_hooks import HookedModel, ModelLoadError


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the garbage collector need not look at it ever again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny() -> HookedModel:
    """The bundled model; tests leave nothing registered on it."""
    return HookedModel.from_pretrained("neuroscope-tiny")


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> HookedModel:
    """A tiny random model of each of several architectures."""
    return HookedModel(make_model(request.param))


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    """A tiny random model with grouped queries."""
    return HookedModel(make_model("llama"))


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """The server's command takes the signals of its process, which here is that of the tests."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A real server on a free port with the bundled model loaded as ``neuroscope-tiny``: ``live_server.base_url``.

    Its experiments are those of ``save_experiments``, its captured activations those of ``save_captured``.
    """
    from server_tools import running_server, save_captured, save_experiments

    from api_server import ModelWorker, ServerConfig

    experiments = save_experiments(tmp_path_factory.mktemp("experiments"))
    captured = save_captured(tmp_path_factory.mktemp("mechint_cache"))
    with ModelWorker() as worker:
        worker.load("neuroscope-tiny")
        with running_server(worker, ServerConfig(port=0, experiments=experiments, mechint=captured)) as url:
            yield SimpleNamespace(base_url=url)


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """A Smalltalk image with the chunk file that ships."""
    with Image(build_smalltalk.CHUNK_FILE) as image:
        yield image


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """A server that answers its `replies` and keeps the `requests`, for Smalltalk to talk to."""
    with canned_server({}) as server:
        yield server


@pytest.fixture(scope="module")
def live_image(live_server: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """An image with what is generated for the live server, so that its default client is that one's."""
    with Image(write_client(tmp_path_factory.mktemp("image"), live_server.base_url)) as image:
        yield image


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[Any]:
    with skipped_where_mlx_lm_is_too_old():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[Any]:
    with skipped_where_mlx_lm_is_too_old():
        return (yield)


@contextmanager
def skipped_where_mlx_lm_is_too_old() -> Iterator[None]:
    """With the newest mlx-lm every architecture is there: test_architectures.py says so."""
    try:
        yield
    except ModelLoadError as error:
        if "a newer one may" not in str(error):
            raise
        pytest.skip(str(error))
