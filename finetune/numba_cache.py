"""What Numba compiled for one process, kept for the next: ten seconds of every UMAP layout."""

import contextlib
from types import ModuleType


def keep_compiled(*modules: ModuleType) -> None:
    """Let Numba keep what it compiles of these modules from now on.

    It lies in the ``__pycache__`` beside them, or in the user's cache if that is not writable, by
    version of the source and kind of processor. Without either, each process compiles for itself.
    """
    for module in modules:
        for function in vars(module).values():
            if hasattr(function, "enable_caching"):  # one that Numba compiles
                with contextlib.suppress(RuntimeError):  # no place to keep it
                    function.enable_caching()
