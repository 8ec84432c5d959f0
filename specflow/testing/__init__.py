"""Laws that decoders and their parts keep, as checks to run on your own, and the certificate of exactness."""

from specflow.testing.certificate import CASES as CASES
from specflow.testing.certificate import SEEDED_CASES as SEEDED_CASES
from specflow.testing.certificate import Case as Case
from specflow.testing.certificate import Certificate as Certificate
from specflow.testing.certificate import Ending as Ending
from specflow.testing.certificate import ExactnessError as ExactnessError
from specflow.testing.certificate import World as World
from specflow.testing.certificate import certify as certify
from specflow.testing.certificate import certify_seed as certify_seed
from specflow.testing.certificate import same_law as same_law
from specflow.testing.conformance import Conformance as Conformance
from specflow.testing.conformance import Divergence as Divergence
from specflow.testing.conformance import Move as Move
from specflow.testing.conformance import conformance as conformance
from specflow.testing.conformance import model_conformance as model_conformance
from specflow.testing.enumeration import Branch as Branch
from specflow.testing.enumeration import Law as Law
from specflow.testing.enumeration import Noise as Noise
from specflow.testing.enumeration import branches as branches
from specflow.testing.enumeration import exact_law as exact_law
from specflow.testing.tables import HiddenProcessor as HiddenProcessor
from specflow.testing.tables import TableModel as TableModel
