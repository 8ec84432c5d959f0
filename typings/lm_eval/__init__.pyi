# The few names of lm-eval that we use: it is an optional extra, and untyped.

from collections.abc import Sequence

from lm_eval.api.model import LM
from lm_eval.result_schema import EvalResults
from lm_eval.tasks import TaskManager

def simple_evaluate(
    model: LM,
    *,
    tasks: Sequence[str | dict[str, object]],
    num_fewshot: int | None = None,
    use_cache: str | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    bootstrap_iters: int = 100000,
    task_manager: TaskManager | None = None,
) -> EvalResults: ...
