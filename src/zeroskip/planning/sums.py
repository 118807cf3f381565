"""What sites come to together: their bytes, and their times as they stand, as planned, and dense at its fastest."""

from __future__ import annotations

from collections.abc import Iterable

from zeroskip.model import Site
from zeroskip.planning.site_plan import SitePlan

__all__ = ["chosen_ms", "dense_ms", "site_bytes", "standing_ms"]


def site_bytes(sites: Iterable[Site]) -> int:
    """Return the bytes of the weights as they stand: what races have to keep out of the caches."""
    return sum(site.weight().numel() * site.weight().element_size() for site in sites)


def chosen_ms(plans: Iterable[SitePlan], tokens: int) -> float:
    """Return the time of all sites, one after the other, in the layouts that were chosen."""
    return sum(plan.time_ms(plan.label, _measured(plan, tokens)) for plan in plans)


def standing_ms(plans: Iterable[SitePlan], tokens: int) -> float:
    """Return the time of all sites as they stand, of the same races."""
    return sum(plan.time_ms(f"linear {plan.dtype}", _measured(plan, tokens)) for plan in plans)


def dense_ms(plans: Iterable[SitePlan], tokens: int) -> float:
    """Return the time of all sites with the fastest dense candidate at each, of the same races."""
    counts = [(plan, _measured(plan, tokens)) for plan in plans]
    return sum(plan.time_ms(plan.label, count) * plan.speedups[plan.label][count] for plan, count in counts)


def _measured(plan: SitePlan, tokens: int) -> int:
    speedups = plan.speedups[plan.label]
    return tokens if tokens in speedups else next(iter(speedups))  # a convolution has one size only
