"""The models' life on a simulated box: the daemon's own parts, with time, memory and workers faked.

`Simulation` is the box with its clients; `test_any_order.py` and `benchmarks/simulation` act on it.
"""
