"""The spec's `utils.caching`. Nothing is defined here."""

from specflow.caches import prune_cache as prune_cache
