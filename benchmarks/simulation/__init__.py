"""A daemon on simulated boxes, with as many events as one likes, and what is left of it."""
