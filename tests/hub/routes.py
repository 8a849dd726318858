"""What a hub answers: a repository's revision, the listing of a commit, files with ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlencode

from tests.hub.exchange import HubRequest, Response
from tests.hub.repo import Access, Commit, HubFile, HubRepo

_API = re.compile(
    r"/api/models/(?P<id>[^/]+?(?:/[^/]+?)?)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?"
)
_RESOLVE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


def route(
    request: HubRequest, repos: Mapping[str, HubRepo], *, url: str, page_size: int
) -> Response:
    """The answer of a hub with these repositories, without any fault.

    Args:
        request: What is asked.
        repos: By id.
        url: Of the hub, for links.
        page_size: How many entries of a listing one answer holds.
    """
    if match := _API.fullmatch(request.path):
        name, what, quoted = match["id"], match["what"], match["revision"]
    elif match := _RESOLVE.fullmatch(request.path):
        name, what, quoted = match["id"], "file", match["revision"]
    else:
        return Response.error(HTTPStatus.NOT_FOUND, "NotFound", "no such page")
    repo = repos.get(name)
    if repo is None:
        return Response.error(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
    admitted = repo.admits(request.token)
    if repo.access is Access.PRIVATE and not admitted:
        return Response.error(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Repository not found")
    revision = unquote(quoted or "main")
    commit = repo.find(revision)
    if commit is None:
        return Response.error(
            HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}"
        )
    if what == "tree":
        return _tree(request, commit, url, page_size)
    if what != "file":
        return _info(repo, commit)
    if not admitted:
        return Response.error(
            HTTPStatus.FORBIDDEN, "GatedRepo", f"Access to model {repo.id} is restricted"
        )
    file = commit.files.get(unquote(match["path"]))
    if file is None:
        return Response.error(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
    return _file(request, commit, file)


def _info(repo: HubRepo, commit: Commit) -> Response:
    return Response.json(
        {
            "id": repo.id,
            "modelId": repo.id,
            "sha": commit.sha,
            "private": repo.access is Access.PRIVATE,
            "gated": "auto" if repo.access is Access.GATED else False,
            "disabled": False,
            "tags": ["transformers", "safetensors"],
            "siblings": [{"rfilename": path} for path in commit.files],
        }
    )


def _tree(request: HubRequest, commit: Commit, url: str, page_size: int) -> Response:
    if request.query.get("recursive") != "true":
        return Response.error(HTTPStatus.BAD_REQUEST, "BadRequest", "list recursively")
    entries = _entries(commit)
    start = int(request.query.get("cursor", "0"))
    stop = start + page_size
    headers = {}
    if stop < len(entries):
        query = urlencode({**request.query, "cursor": stop})
        headers["Link"] = f'<{url}{request.path}?{query}>; rel="next"'
    return Response.json(entries[start:stop], headers)


def _entries(commit: Commit) -> list[dict[str, Any]]:
    folders = {parent.as_posix() for path in commit.files for parent in PurePosixPath(path).parents}
    entries: list[dict[str, Any]] = [
        {"type": "directory", "oid": commit.sha, "size": 0, "path": folder}
        for folder in sorted(folders - {"."})
    ]
    for file in commit.files.values():
        entry = {"type": "file", "oid": file.oid, "size": file.size, "path": file.path}
        if file.sha256:
            lfs = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            entry["lfs"] = lfs
        entries.append(entry)
    return entries


def _file(request: HubRequest, commit: Commit, file: HubFile) -> Response:
    headers = {
        "X-Repo-Commit": commit.sha,
        "ETag": f'"{file.etag}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    if file.sha256:
        headers["X-Linked-Etag"] = f'"{file.etag}"'
        headers["X-Linked-Size"] = str(file.size)
    status, start, stop = HTTPStatus.OK, 0, file.size
    if request.range is not None:
        asked = _RANGE.fullmatch(request.range)
        if not asked or int(asked[1]) >= file.size:
            headers |= {"Content-Range": f"bytes */{file.size}", "Content-Length": "0"}
            return Response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers)
        status, start = HTTPStatus.PARTIAL_CONTENT, int(asked[1])
        stop = min(int(asked[2]) + 1, file.size) if asked[2] else file.size
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
    headers["Content-Length"] = str(stop - start)
    return Response(status, headers, file.read(start, stop))
