"""Taking turns with other processes: nobody is timed while another one's threads still spin, or while its own sleep."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["Turns"]

SETTLE_S = 3e-3  # idle threads of the usual pools spin for about a millisecond before they sleep


class Turns:
    """Knows who ran last."""

    def __init__(self, sleep: Callable[[float], object] = time.sleep) -> None:
        self._last, self._sleep = "", sleep
        self._some = torch.ones(1 << 16)

    def of(self, owner: str) -> Callable[[], object]:
        """Return what is done before each sample of `owner`; the empty name is this process."""

        def prepare() -> None:
            if owner != self._last:
                self._sleep(SETTLE_S)
                self._last = owner
                if not owner and torch.get_num_threads() > 1:
                    torch.sum(self._some)  # wakes the pool, as the layer before would have

        return prepare
