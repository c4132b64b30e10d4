"""Learning rate as a function of the step alone, so that a resumed run needs no state."""

import math

from stages.train.config import PhaseConfig

POLYNOMIAL_POWER = 0.9


def learning_rate(step: int, phase: PhaseConfig) -> float:
    """Return the rate of zero-based `step`: linear warm-up, then half cosine or polynomial decay.

    The decay starts at the peak right after warm-up and would reach its end at `phase.steps`.
    """
    peak, start = phase.learning_rate, phase.learning_rate_start
    if step < phase.warmup_steps:
        return start + (peak - start) * step / phase.warmup_steps
    progress = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    if phase.schedule == "poly":
        return float(peak * (1 - progress) ** POLYNOMIAL_POWER)
    low = phase.learning_rate_min
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * progress))
