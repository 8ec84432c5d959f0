"""Beam search: its records and stages, the predictor that reads beams, and the spec's function."""

from specflow.beam.cached import CachedBeamPredictor as CachedBeamPredictor
from specflow.beam.generate import ShowBeams as ShowBeams
from specflow.beam.generate import beam_search_generate as beam_search_generate
from specflow.beam.search import Beam as Beam
from specflow.beam.search import BeamObserver as BeamObserver
from specflow.beam.search import BeamPredictor as BeamPredictor
from specflow.beam.search import Beams as Beams
from specflow.beam.search import BeamStep as BeamStep
from specflow.beam.search import Expand as Expand
from specflow.beam.search import Expanded as Expanded
from specflow.beam.search import LengthPenalty as LengthPenalty
from specflow.beam.search import Select as Select
from specflow.beam.search import Selected as Selected
from specflow.beam.search import advance_beams as advance_beams
from specflow.beam.search import beam_step as beam_step
from specflow.beam.search import has_ended as has_ended
from specflow.beam.search import unobserved_beams as unobserved_beams
