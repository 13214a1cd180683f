"""What operators see: Prometheus series."""
