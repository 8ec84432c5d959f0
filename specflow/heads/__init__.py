"""Heads: small modules that draft from what the target holds, and the drafters over them."""

from specflow.heads.drafter import HeadDrafter as HeadDrafter
from specflow.heads.drafter import HeadTree as HeadTree
from specflow.heads.head import Head as Head
from specflow.heads.load import load_head as load_head
from specflow.heads.reading import HeadPredictor as HeadPredictor
