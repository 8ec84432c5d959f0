"""Heads: small modules that draft from what the target holds, and the drafters over them."""

from specflow.heads.drafter import HeadDrafter as HeadDrafter
from specflow.heads.drafter import HeadTree as HeadTree
from specflow.heads.eagle import Eagle as Eagle
from specflow.heads.eagle import Eagle3 as Eagle3
from specflow.heads.eagle import Norms as Norms
from specflow.heads.head import Head as Head
from specflow.heads.head import Vocabulary as Vocabulary
from specflow.heads.jump import Jump as Jump
from specflow.heads.layer import Shape as Shape
from specflow.heads.load import load_head as load_head
from specflow.heads.medusa import Medusa as Medusa
from specflow.heads.mtp import MTP as MTP
from specflow.heads.reading import HeadPredictor as HeadPredictor
