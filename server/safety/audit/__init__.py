"""The audit log: a keyed chain of entries in files, its head, its verification, and its copies elsewhere."""
