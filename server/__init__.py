"""Rudder's online half: steering, monitoring and unlearning inside a vLLM engine, behind gRPC."""

__version__ = "0.1.0"
