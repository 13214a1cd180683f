"""How rates and penalties change over a run."""


def trapezoid(progress: float, warm_up: float, decay: float) -> float:
    """Share of a learning rate at a share of the run: linear warm-up, constant, linear decay to zero."""
    rising = 1.0 if warm_up == 0 else (progress + 1e-6) / warm_up
    falling = 1.0 if decay == 0 else max(0.0, 1 - progress) / decay
    return min(1.0, rising, falling)


def ramp(progress: float, warm_up: float) -> float:
    """Share of a penalty at a share of the run: linear warm-up, then all of it."""
    return 1.0 if warm_up == 0 else min(1.0, progress / warm_up)
