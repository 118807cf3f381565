"""`+distill`: gradient descent on all pruned layers at once, towards what the dense model returns.

Block solvers bring each block near to its dense self, one after another; what they leave adds up. Here the whole model
learns to return what the dense one returns, so that later layers make up for earlier ones. The loss of logits is their
Kullback-Leibler divergence from the dense ones, mean over tokens. That of hidden states is |y - t|^2 / |t|^2, mean over
tokens, and for a sequence of them also 1 - cosine of their mean with the dense mean, because that is the sentence
vector that such models are used for.

No second model is held: what the dense model's last block returned is kept for every batch, as `+tune` keeps it for one
block, and what follows that block, which does not learn, makes the target of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from zeroskip.calibrate import Lesson, first_tensor
from zeroskip.prune.learner import Learner, relative_error


class Distill(Learner):
    """Source: Hinton et al. 2015 (arXiv 1503.02531), on pruned weights and without labels."""

    name = "distill"
    whole = True
    step, vector_step = 0.01, 0.001
    passes, warm_up = 2, 20
    verb, noun = "distilled", "distillation"

    def loss(self, output: Any, lesson: Lesson) -> Tensor | None:
        given, target = first_tensor(output), lesson.target.float()
        if given is None or given.shape != target.shape:
            return None
        if getattr(output, "logits", None) is not None:
            return _divergence(given, target, lesson.visible)
        loss = relative_error(given, target, lesson.visible)
        return loss + _apart(given, target, lesson.visible) if given.dim() == 3 else loss


def _divergence(output: Tensor, target: Tensor, visible: Tensor | None) -> Tensor:
    ours, theirs = (log_softmax(each.float(), -1) for each in (output, target))
    lost = kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return (lost if visible is None else lost[visible]).mean()


def _apart(output: Tensor, target: Tensor, visible: Tensor | None) -> Tensor:
    """1 - cosine of the means over tokens; [batch, tokens, features]."""
    if visible is not None:
        share = (visible / visible.sum(1, keepdim=True).clamp_min(1)).unsqueeze(-1)
        return (1 - cosine_similarity((output * share).sum(1), (target * share).sum(1))).mean()
    return (1 - cosine_similarity(output.mean(1), target.mean(1))).mean()
