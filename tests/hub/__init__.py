"""A local hub for tests and the demo: the real client library downloads from it."""

from tests.hub import faults
from tests.hub.exchange import HubRequest, Response
from tests.hub.hub import Hub
from tests.hub.repo import Access, HubRepo, files_below

__all__ = ["Access", "Hub", "HubRepo", "HubRequest", "Response", "faults", "files_below"]
