"""Independent parts of a solve on a thread each, instead of every small operation on all threads.

An operation on some ten thousand numbers takes less time than starting and joining torch's threads for it: column
OBS of a 384 x 1536 matrix took 4 s on one thread and 10 s on two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

__all__ = ["own_threads"]

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextmanager
def own_threads() -> Iterator[Map]:
    """Give a `map` that calls a function on as many threads as torch has, each of which computes by itself.

    What it returns does not depend on how many there are. Nothing is recorded for gradients.
    """
    count, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alike(function: Callable[[Any], Any], item: Any) -> Any:
        with torch.inference_mode(inference), torch.no_grad():  # a thread starts with neither
            return function(item)

    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda function, items: pool.map(partial(alike, function), items)
    finally:
        torch.set_num_threads(count)  # threads started later take the number that was set last
