"""`loaderctl`: the command line of loaderd, on the SDK alone."""
