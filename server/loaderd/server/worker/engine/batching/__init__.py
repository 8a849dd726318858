"""The batching engine: many requests in each forward pass of one model."""
