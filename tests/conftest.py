"""What holds for every test."""

import os

# The tests' own torch processes share few cores with the daemon's; see LocalLauncher.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
