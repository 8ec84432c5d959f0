"""The spec's `utils`. Nothing is defined here."""

from specflow.utils import caching as caching
from specflow.utils import logits_processor as logits_processor
