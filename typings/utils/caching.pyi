# For code that calls specflow.install_spec_paths().
from specflow.caching import prune_cache as prune_cache
