"""Messages that the host waits for where it posts them: an order that can lock, locks here.

On a GPU a post is a kernel on a stream, and only now and then does the host wait for the whole
device (a kernel is loaded, memory is short, a timer is read). Where every post waits, no such
moment can be missed.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist


@contextlib.contextmanager
def hosts_wait() -> Iterator[None]:
    """Every point-to-point message ends before its post returns."""

    def waiting(post: Callable[..., Any]) -> Callable[..., Any]:
        def posted(*args: Any, **kwargs: Any) -> Any:
            request = post(*args, **kwargs)
            request.wait()
            return _Done()

        return posted

    kept = dist.isend, dist.irecv
    dist.isend, dist.irecv = (waiting(post) for post in kept)
    try:
        yield
    finally:
        dist.isend, dist.irecv = kept


class _Done:
    """A request that has been waited for."""

    def wait(self) -> None:
        """Return at once."""
