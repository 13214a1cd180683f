"""From the worker to the server process: frames, the socket they take, and their readers."""
