# For code that calls specflow.install_spec_paths().
from specflow.caches import prune_cache as prune_cache
