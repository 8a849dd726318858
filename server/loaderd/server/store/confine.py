"""Confines this process's writing to some folders, with Linux's Landlock.

The download child handles what a hub sends. Should a check be missing, the kernel still keeps it
from writing anywhere but where the download belongs. See `landlock(7)`; the numbers are those of
`linux/landlock.h`, which the C library has no functions for.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable
from pathlib import Path

_SYS_CREATE_RULESET, _SYS_ADD_RULE, _SYS_RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

# WRITE_FILE, and REMOVE_DIR to MAKE_SYM; REFER and TRUNCATE came with the second and third ABI.
_WRITE_RIGHTS = (1 << 1) | sum(1 << bit for bit in range(4, 13))
_REFER, _REFER_ABI = 1 << 13, 2
_TRUNCATE, _TRUNCATE_ABI = 1 << 14, 3

_log = logging.getLogger(__name__)


class _RulesetAttr(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64),)


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def confine_writing(folders: Iterable[Path]) -> bool:
    """Lets this thread, and those that it starts, write only below the folders.

    Returns:
        Whether it is so: a kernel without Landlock, or where it is off, cannot.

    Raises:
        OSError: The kernel has Landlock and refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(_SYS_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    if abi < 1:
        _log.info("this kernel has no Landlock; downloads are checked but not confined")
        return False
    rights = _WRITE_RIGHTS
    rights |= _REFER if abi >= _REFER_ABI else 0
    rights |= _TRUNCATE if abi >= _TRUNCATE_ABI else 0
    rules = _RulesetAttr(rights)
    ruleset = _checked(
        libc.syscall(_SYS_CREATE_RULESET, ctypes.byref(rules), ctypes.sizeof(rules), 0)
    )
    try:
        for folder in folders:
            handle = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = _PathBeneathAttr(rights, handle)
                _checked(
                    libc.syscall(_SYS_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
                )
            finally:
                os.close(handle)
        _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(libc.syscall(_SYS_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return True


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
