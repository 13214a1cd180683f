"""Telemetry from the engine process to the server process: frames, their transport, and each request's inbox."""
