"""Statistics of the sites of one block, over the calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

from torch import Tensor

from zeroskip.calibrate.replay import Block, Replay
from zeroskip.calibrate.stats import Collector, SharingError
from zeroskip.model import Site

__all__ = ["collect"]


def collect(
    replay: Replay,
    block: Block,
    sites: Sequence[Site],
    needs: Mapping[str, Iterable[str]],
    share: bool = True,
    most: int | None = None,
) -> dict[str, tuple[int, dict[str, Tensor]]]:
    """Return {site: (tokens, statistics)} of the sites of one block.

    Parameters
    ----------
    needs : mapping
        Names of statistics (`zeroskip.calibrate.stats`) by site.
    share : bool
        Whether sites that get the same tensor share what is collected.
    most : int, optional
        How many batches to run at most, spread over all; None for every one.
    """
    running = 0
    stride = 1 if most is None else -(-len(replay.batches) // most)

    def visible(x: Tensor) -> Tensor | None:
        return replay.batches[running].visible(x, replay.arguments, replay.two_towers)

    alike: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        alike.setdefault(tuple(needs[site.name]), []).append(site)
    try:
        with ExitStack() as stack:
            stack.enter_context(replay.wide.hold(block.module))
            collectors = [Collector(those, names, visible, share) for names, those in alike.items()]
            for collector in collectors:
                stack.callback(collector.close)
            for running in range(0, len(replay.batches), stride):
                for collector in collectors:
                    collector.next_run()
                replay.collect(block, running)
            pairs = zip(collectors, alike.values(), strict=True)
            return {site.name: collector.result(site) for collector, those in pairs for site in those}
    except SharingError:
        return collect(replay, block, sites, needs, share=False, most=most)
