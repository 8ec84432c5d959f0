"""Models as pure functions of tokens: `(text, drafts) → logits [n + 1, V]`."""

from specflow.paths import along_paths as along_paths
from specflow.paths import last_rows as last_rows
from specflow.paths import path_by_path as path_by_path
from specflow.predictors.cached import CachedPredictor as CachedPredictor
from specflow.predictors.cached import limits_of as limits_of
from specflow.predictors.early import Resumed as Resumed
from specflow.predictors.early import early_exit as early_exit
from specflow.predictors.fresh import UncachedPredictor as UncachedPredictor
from specflow.predictors.rescore import OneByOne as OneByOne
from specflow.predictors.rescore import RescoreNearTies as RescoreNearTies
from specflow.predictors.rescore import margins_of as margins_of
from specflow.predictors.skip import layer_skip as layer_skip
