"""The engine process: vLLM's worker with banks in its model, and what drives and reads them."""
