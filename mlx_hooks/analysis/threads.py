"""Threads of scikit-learn's own loops, which wait for each other."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep scikit-learn's own loops to one thread.

    Their threads wait by spinning: where others use the processor too, that costs many times what it saves.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="openmp"):
        yield
