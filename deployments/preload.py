"""What a replica's process imports, in one module, so that an idle worker process of Ray can have it all beforehand.

Ray's flag `preload_python_modules` names it (`RAY_FLAGS` in `app/cli/flags.py`). It must only import, and must not
fail: it is imported by every worker process of the cluster, whatever that is going to be. Engine libraries are left
to the engines' own processes.

The importing is done by a thread with the lowest priority, where a thread can have one of its own: a model that
answers at that time on the same cores needs them more.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading

MODULES = ("ray.serve._private.replica", "deployments.replica")


def _import() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
    with contextlib.suppress(ImportError):
        for name in MODULES:
            importlib.import_module(name)


_thread = threading.Thread(target=_import, name="slotpool-preload")
_thread.start()
_thread.join()
