"""The gRPC services: checking, translating and pacing; no steering logic."""
