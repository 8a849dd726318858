"""Who calls the daemon, what they may do, and how much of it."""
