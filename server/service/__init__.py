"""One call, whatever door it came through: limits, prompt, sampling, run, columns, pace. Knows no transport."""
