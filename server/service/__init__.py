"""A call, whatever door it came through: limits, prompt, sampling, the run, its columns and pace."""
