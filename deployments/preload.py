"""What a replica's process imports, in one module, so that an idle worker process of Ray can have it all beforehand.

Ray's flag `preload_python_modules` names it (`RAY_FLAGS` in `app/cli.py`). It must do nothing but import, and must not
fail: it is imported by every worker process of the cluster, whatever that is going to be. Engine libraries are left
to the engines, but for llama.cpp's, which is small; the others take seconds and gigabytes.
"""

from __future__ import annotations

import contextlib

import ray.serve._private.replica  # noqa: F401

import deployments.replica

with contextlib.suppress(ImportError):
    import llama_cpp  # noqa: F401

    import deployments.engines.llama_cpp  # noqa: F401
