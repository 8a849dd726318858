from pathlib import Path

from loaderd.server.box.cgroup import MemoryBound, core_bounds, memory_bounds


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_version_2_from_the_own_group_up(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "self": "0::/a/b\n",
            "fs/a/b/memory.max": "max\n",
            "fs/a/b/memory.current": "70\n",
            "fs/a/b/cpu.max": "150000 100000\n",
            "fs/a/memory.max": "1000\n",
            "fs/a/memory.current": "600\n",
            "fs/a/memory.stat": "anon 300\ninactive_file 200\nactive_file 50\n",
            "fs/a/cpu.max": "max 100000\n",
        },
    )
    assert memory_bounds(tmp_path / "fs", tmp_path / "self") == [MemoryBound(1000, 350)]
    assert core_bounds(tmp_path / "fs", tmp_path / "self") == [2]


def test_version_2_in_a_container_where_the_mount_is_the_own_group(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "self": "0::/\n",
            "fs/memory.max": "1000\n",
            "fs/memory.current": "100\n",
            "fs/cpu.max": "50000 100000\n",
        },
    )
    assert memory_bounds(tmp_path / "fs", tmp_path / "self") == [MemoryBound(1000, 100)]
    assert core_bounds(tmp_path / "fs", tmp_path / "self") == [1]


def test_version_1_with_a_path_of_the_host(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "self": "4:memory:/docker/1234\n1:cpu,cpuacct:/docker/1234\n0::/\n",
            "fs/memory/memory.limit_in_bytes": "1000\n",
            "fs/memory/memory.usage_in_bytes": "400\n",
            "fs/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
            "fs/cpu/cpu.cfs_quota_us": "400000\n",
            "fs/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert memory_bounds(tmp_path / "fs", tmp_path / "self") == [MemoryBound(1000, 300)]
    assert core_bounds(tmp_path / "fs", tmp_path / "self") == [4]


def test_no_bounds(tmp_path: Path) -> None:
    write(tmp_path, {"self": "0::/\n", "fs/cgroup.procs": "1\n"})
    assert memory_bounds(tmp_path / "fs", tmp_path / "self") == []
    assert core_bounds(tmp_path / "fs", tmp_path / "self") == []
    assert memory_bounds(tmp_path / "fs", tmp_path / "absent") == []
