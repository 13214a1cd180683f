"""How a program runs: the bank in the forward pass, its vLLM worker, its telemetry and the async engine around it."""
