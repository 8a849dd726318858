"""The optional HTTP listener: metrics, probes, a status page, and an API as OpenAI's."""
