"""Model files on disk: names, the cache's layout, resolution, downloads, snapshots."""
