"""The roles, and the one table of what each may call.

The server admits calls by it, and the tests read it. A method that is not in it is for
administrators only.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Role(StrEnum):
    """What a caller is to the daemon."""

    ADMIN = "admin"
    """Everything."""

    USER = "user"
    """Generates text, and loads what the operator lets users load."""

    MONITOR = "monitor"
    """Looks, and changes nothing."""

    ANONYMOUS = "anonymous"
    """Who has shown nothing that tells who it is. No client is given this role."""


_ADMINS = frozenset({Role.ADMIN})
_USERS = _ADMINS | {Role.USER}
_CLIENTS = _USERS | {Role.MONITOR}
_ALL = frozenset(Role)

_BY_SERVICE: dict[str, dict[str, frozenset[Role]]] = {
    "loaderd.v1.ModelService": {
        "LoadModel": _USERS,
        "UnloadModel": _ADMINS,
        "GetModel": _CLIENTS,
        "ListModels": _CLIENTS,
        "WatchModels": _CLIENTS,
        "PlanModel": _USERS,
        "AcquireLease": _USERS,
        "RenewLease": _USERS,
        "ReleaseLease": _USERS,
    },
    "loaderd.v1.CacheService": {
        "ResolveModel": _USERS,
        "DownloadModel": _ADMINS,
        "CancelDownload": _ADMINS,
        "ListSnapshots": _CLIENTS,
        "VerifySnapshot": _ADMINS,
        "DeleteSnapshots": _ADMINS,
        "PruneCache": _ADMINS,
    },
    "loaderd.v1.GenerationService": {
        "Generate": _USERS,
        "StreamGenerate": _USERS,
        "Tokenize": _USERS,
        "Detokenize": _USERS,
        "ApplyChatTemplate": _USERS,
    },
    "loaderd.v1.SystemService": {
        "GetServerInfo": _CLIENTS,
        "ListDevices": _CLIENTS,
    },
    "grpc.health.v1.Health": {
        "Check": _ALL,  # what asks it, such as a load balancer, often has no secrets
        "List": _CLIENTS,
        "Watch": _CLIENTS,
    },
    "grpc.reflection.v1.ServerReflection": {"ServerReflectionInfo": _CLIENTS},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _CLIENTS},
}

PERMISSIONS: Mapping[str, frozenset[Role]] = {
    f"/{service}/{method}": roles
    for service, methods in _BY_SERVICE.items()
    for method, roles in methods.items()
}
"""Who may call each method, by its path."""


def may_call(role: Role, method: str) -> bool:
    """Whether a role may call a method.

    Args:
        role: The role.
        method: The method's path, such as `/loaderd.v1.ModelService/LoadModel`.
    """
    return role in PERMISSIONS.get(method, _ADMINS)
