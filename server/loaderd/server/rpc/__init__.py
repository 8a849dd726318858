"""The public services: translate the request, call the domain, translate the result."""
