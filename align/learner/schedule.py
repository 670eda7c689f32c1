"""The learning rate of a step."""

import math

from align.recipe import OptimizerOptions


def learning_rate(step: int, total_steps: int, options: OptimizerOptions) -> float:
    """The learning rate of optimizer step `step` in 0..total_steps-1: linear warm-up, then cosine or constant.

    The cosine falls from `learning_rate` at the end of the warm-up to `final_ratio` of it at the last step.
    """
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.learning_rate
    span = max(total_steps - options.warmup_steps - 1, 1)
    progress = min((step - options.warmup_steps) / span, 1.0)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return options.learning_rate * (options.final_ratio + (1 - options.final_ratio) * cosine)
