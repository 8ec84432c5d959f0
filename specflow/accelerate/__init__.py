"""Models that compute what a given model computes, faster, or the same bits however a text is cut into passes."""

from specflow.accelerate.build import Given as Given
from specflow.accelerate.build import NotAccelerated as NotAccelerated
from specflow.accelerate.build import bit_for_bit as bit_for_bit
from specflow.accelerate.build import fast as fast
from specflow.accelerate.build import lossy_bf16 as lossy_bf16
from specflow.accelerate.build import lossy_int4 as lossy_int4
from specflow.accelerate.build import lossy_int8 as lossy_int8
from specflow.accelerate.check import Agreement as Agreement
from specflow.accelerate.check import Disagreement as Disagreement
from specflow.accelerate.check import check as check
