# For code that calls specflow.install_spec_paths().
from utils import caching as caching
from utils import logits_processor as logits_processor
