"""Finished requests shared by replicas: what one has finished, the others draft from (``docs/replicas.md``).

``sssd.sharing.redis`` and ``sssd.sharing.ray`` have logs for Redis and Ray, with the extras of these names.
"""

from sssd.sharing.folder import FolderLog
from sssd.sharing.log import MAX_RECORD_BYTES, Log
from sssd.sharing.record import Record
from sssd.sharing.replica import Replica

__all__ = ["MAX_RECORD_BYTES", "FolderLog", "Log", "Record", "Replica"]
