"""Laws that decoders and their parts keep, as checks to run on your own."""

from specflow.testing.conformance import Conformance as Conformance
from specflow.testing.conformance import Divergence as Divergence
from specflow.testing.conformance import Move as Move
from specflow.testing.conformance import conformance as conformance
from specflow.testing.conformance import model_conformance as model_conformance
