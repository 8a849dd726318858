"""The child process that holds one model: loads it, and generates with it."""
