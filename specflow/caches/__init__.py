"""KV caches of every kind: which can be cropped, which go back to a mark, and which rows can be kept."""

from specflow.caches.buffer import BLOCK as BLOCK
from specflow.caches.buffer import KVCache as KVCache
from specflow.caches.lasting import lasting as lasting
from specflow.caches.layers import RECORD as RECORD
from specflow.caches.made import LossyCache as LossyCache
from specflow.caches.made import capacity as capacity
from specflow.caches.made import is_empty as is_empty
from specflow.caches.made import is_plain as is_plain
from specflow.caches.made import offloads as offloads
from specflow.caches.past import Past as Past
from specflow.caches.prune import prune_cache as prune_cache
from specflow.caches.rows import Roomy as Roomy
from specflow.caches.shelf import Pair as Pair
from specflow.caches.shelf import Row as Row
from specflow.caches.shelf import Shelf as Shelf
from specflow.caches.shelf import Shelves as Shelves
