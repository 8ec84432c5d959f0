"""Many texts at once: a batch is many decodes that wait for the same model."""

from specflow.batch.hub import Asked as Asked
from specflow.batch.hub import Failed as Failed
from specflow.batch.hub import Reads as Reads
from specflow.batch.hub import Reply as Reply
from specflow.batch.hub import Shared as Shared
from specflow.batch.hub import together as together
from specflow.batch.many import Metered as Metered
from specflow.batch.many import generate_many as generate_many
from specflow.batch.many import seed_of as seed_of
from specflow.batch.predictor import BatchPredictor as BatchPredictor
