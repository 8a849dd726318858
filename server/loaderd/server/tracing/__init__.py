"""Traces: what takes time in the daemon, as spans that an OpenTelemetry collector gets."""
