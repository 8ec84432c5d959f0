"""transformers' own parts inside our decoders, and our decoders inside transformers' own `generate`."""

from specflow.interop.generate import Generate as Generate
from specflow.interop.processors import InOrder as InOrder
from specflow.interop.processors import ProcessorList as ProcessorList
from specflow.interop.processors import Stateless as Stateless
from specflow.interop.processors import most_likely as most_likely
from specflow.interop.processors import sampled as sampled
from specflow.interop.streaming import Streamer as Streamer
from specflow.interop.streaming import new_tokens as new_tokens
from specflow.interop.streaming import stops as stops
from specflow.interop.streaming import stream as stream
