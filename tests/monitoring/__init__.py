"""A server under mixed traffic, with a real Prometheus that scrapes it: for tests, pictures, and `make monitoring`."""
