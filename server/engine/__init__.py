"""Run calls on vLLM: the engine of the server process, the worker in the engine process, telemetry between them."""
