"""The cache of plans: bounded, and what was used stays."""

from __future__ import annotations

from chainrule.execute.cached_plans import CachedPlan, PlanCache


def test_the_cache_is_bounded_and_keeps_what_is_used() -> None:
    cache = PlanCache(limit=4)
    for number in range(4):
        cache.put(number, CachedPlan([], None))
    for number in range(4, 20):
        assert cache.get(0) is not None
        cache.put(number, CachedPlan([], None))
        assert len(cache) <= 4
    cache.clear()
    assert len(cache) == 0
