"""`rudder bench load`: servers under the same load, by turns in one run."""
