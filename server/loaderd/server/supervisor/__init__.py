"""The daemon's side of worker processes: launch, standby, watch, end; the link to each."""
