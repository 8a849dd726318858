"""What the daemon and its workers know of the box alike, without a tensor library."""
