"""What a request means: programs compiled to bank parameters."""
