"""Training a head for a model, on the model's own answers."""

from specflow.distill.command import add_arguments as add_arguments
from specflow.distill.command import main as main
from specflow.distill.jump import fit_jump as fit_jump
from specflow.distill.prompts import kept_prompts as kept_prompts
from specflow.distill.prompts import made_up as made_up
from specflow.distill.train import Heard as Heard
from specflow.distill.train import Recipe as Recipe
from specflow.distill.train import distill as distill
