"""When Serve's control loop should hurry: from a change of a replica count on, until all that should run does."""

from __future__ import annotations

import time
from collections.abc import Hashable
from functools import cache

from cluster import effects

#: For how long after a change of a count the controller hurries: enough for a stop, in seconds,
HURRY_S = 0.3
#: and at most as long as this where a replica takes longer to start: its process needs the CPU more than the loop,
#: which takes most of a core in its hurry.
LONGEST_HURRY_S = 1.0


class Pace:
    """What was seen of the deployments of one process."""

    def __init__(self) -> None:
        self._changed_at = time.monotonic() - LONGEST_HURRY_S
        self._unsettled: set[Hashable] = set()

    def saw(self, deployment: Hashable, wanted: int, target: int, current: int) -> None:
        """A deployment was looked at; sets the controller's pace."""
        now = time.monotonic()
        if wanted != target:
            self._changed_at = now
        if current == wanted:
            self._unsettled.discard(deployment)
        else:
            self._unsettled.add(deployment)
        effects.pace_controller(hurry=now < self._changed_at + (LONGEST_HURRY_S if self._unsettled else HURRY_S))


@cache
def of_this_process() -> Pace:
    """The one of this process."""
    return Pace()
