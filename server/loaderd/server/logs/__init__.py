"""What the daemon tells its operator: the log, with its children's lines, and the audit log."""
