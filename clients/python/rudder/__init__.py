"""Generated code of the contract in `proto/rudder`."""
