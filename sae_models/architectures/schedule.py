"""Schedules of learning rates and penalties."""


def trapezoid(progress: float, warm_up: float, decay: float) -> float:
    """Return the learning-rate factor at a fraction `progress` of the run: linear warm-up, constant, linear decay to
    zero.
    """
    warm_up_factor = 1.0 if warm_up == 0 else (progress + 1e-6) / warm_up
    decay_factor = 1.0 if decay == 0 else max(0.0, 1 - progress) / decay
    return min(1.0, warm_up_factor, decay_factor)


def ramp(progress: float, warm_up: float) -> float:
    """Return the penalty factor at a fraction `progress` of the run: linear warm-up, then 1."""
    return 1.0 if warm_up == 0 else min(1.0, progress / warm_up)
