"""The models that the daemon holds: their lifecycle, registry and events."""
