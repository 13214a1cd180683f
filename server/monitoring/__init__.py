"""What operators read: Prometheus series, logs and trace identifiers. Used by all packages, imports none of them."""
