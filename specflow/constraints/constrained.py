"""A processor whose law obeys a grammar."""

from __future__ import annotations

from math import inf, isnan
from typing import final

from attrs import field, frozen
from torch import Tensor

from specflow.asked import laws_of
from specflow.constraints.constraint import Constraint
from specflow.distribution import Categorical, Distribution, no_law
from specflow.errors import DeadEndError
from specflow.guards.checks import a, does, valid
from specflow.guards.finite import is_near
from specflow.laws import Lazily
from specflow.processors import EachPrefix, LogitsProcessor, Processor
from specflow.state import Tokens


@final
@frozen(eq=False)
class Constrained:
    """The law of `processor` over the tokens that a grammar allows: it is given -∞ for all others.

    So temperature, top-k and top-p choose among what is allowed: top_k = 5 keeps the five likeliest allowed tokens, and
    plain sampling has the target's own law, masked and renormalised. A text obeys step by step, p(x | text, x allowed),
    which is not the law of the target's texts among those that obey.

    Laws are made `Lazily`: the grammar hears of no draft that it forbids. `DeadEndError` where it, the model and
    the processor leave no token a chance, and for a text that does not obey.

    >>> from specflow import Dice, MultinomialProcessor, autoregressive_step, run, start
    >>> from specflow.constraints.grammar import Grammar
    >>> from specflow.testing import TableModel
    >>> answer = Grammar.regex("(ab)*", (b"a", b"b", b"c", b""), stop=(3,)).after((2, 2))
    >>> step = autoregressive_step(TableModel(4), Constrained(MultinomialProcessor(1.0), answer), Dice())
    >>> set(run(step, start((2, 2), 9, stop=(3,)).unwrap()).state.output) <= {0, 1, 3}
    True
    """

    processor: Processor = field(validator=valid(does("a processor", "give one, such as GreedyProcessor()", "laws")))
    constraint: Constraint = field(validator=valid(a(Constraint, "give grammar.after(prompt)")))

    def laws(self, tokens: Tokens, logits: Tensor, /) -> Lazily:
        """The law after each row of `logits` [k, V]; row k - 1 follows all of `tokens`."""
        return EachPrefix(self._law).laws(tokens, logits)

    def _law(self, prefix: Tokens, logits: Tensor) -> Distribution:
        allowed = self.constraint.allowed(prefix, len(logits))
        masked = logits.masked_fill(~allowed.to(logits.device), -inf)
        if float(masked.max()) == -inf:
            happened = "the model gives no chance to any token that the grammar allows"
            received = f"{int(allowed.sum())} allowed after position {len(prefix) - 1}, each with a logit of -∞"
            raise DeadEndError("processor", happened, received, "allow another token, or do not forbid them elsewhere")
        law = laws_of(self.processor, prefix, masked[None])[0]
        if (
            isinstance(law, Categorical)
            and not is_near(law.probs)  # else it was looked at
            and not isinstance(self.processor, LogitsProcessor)  # else it leaves some
            and isnan(float(law.probs.sum()))
        ):
            raise no_law(law, len(prefix))
        return law
