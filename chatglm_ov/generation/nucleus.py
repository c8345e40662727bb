"""Top-p sampling without a sort of the whole vocabulary, which takes as long as a good part of a step."""

from __future__ import annotations

import torch
from transformers import LogitsProcessorList, TopPLogitsWarper


class Nucleus(TopPLogitsWarper):
    """What `TopPLogitsWarper` makes of scores: the most likely tokens that together have more than `top_p` stay, the
    others get `filter_value` (Holtzman et al. 2020, The Curious Case of Neural Text Degeneration). Which of several
    equal ones stay is left open, as there.

    Tokens of less than (1 - top_p) / V each have less than 1 - top_p together, so all of them go: only those above are
    sorted. Half of that bound leaves room for rounding.
    """

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores float32 [B, V] of the next token, as a new tensor."""
        made = torch.full_like(scores, self.filter_value)
        for row, (of_row, probabilities) in enumerate(zip(scores, scores.softmax(-1), strict=True)):
            likely = (probabilities >= (1 - self.top_p) / (2 * len(probabilities))).nonzero()[:, 0]
            # Too few also where the scores are no numbers. With so many it would take longer.
            if not self.min_tokens_to_keep <= len(likely) <= len(probabilities) // 4:
                return super().__call__(input_ids, scores)  # type: ignore[arg-type]
            kept = likely[self._staying(of_row[likely], probabilities[likely], probabilities.sum(dtype=torch.float64))]
            made[row, kept] = of_row[kept]
        return made

    def _staying(self, scores: torch.Tensor, probabilities: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Indices of the tokens that stay among those with these scores and probabilities. total: the sum over all
        tokens, of which the less likely ones have the rest."""
        order = scores.argsort()
        rising = probabilities[order].cumsum(0, dtype=torch.float64)
        stays = (total - rising[-1] + rising).float() > 1 - self.top_p
        stays[-self.min_tokens_to_keep :] = True
        return order[stays]


def without_sorting(processors: LogitsProcessorList) -> LogitsProcessorList:
    """`processors` with `Nucleus` in the place of those of top-p."""
    return LogitsProcessorList(
        Nucleus(each.top_p, each.filter_value, each.min_tokens_to_keep) if type(each) is TopPLogitsWarper else each
        for each in processors
    )
