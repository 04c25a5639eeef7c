"""Where what was measured or built once is kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$SSSD_CACHE``, or the user's cache. Need not be there yet.

    Raises:
        ImportError: the variable is not set, and platformdirs is not installed.
    """
    if named := os.environ.get("SSSD_CACHE"):
        return Path(named)
    from platformdirs import user_cache_path

    return user_cache_path("sssd")
