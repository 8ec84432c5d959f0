# For code that calls specflow.install_spec_paths().
from specflow.distribution import max_fn as max_fn
from specflow.generate import speculative_generate as speculative_generate
