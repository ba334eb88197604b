"""How often each caller may ask: a bucket for every key, in this process alone.

Nothing is asked of Redis: a limit that depended on it would have to fail open or fail closed with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from servetune.server.errors import ServiceError

BURST_S = 10.0  # so many seconds' worth may be asked at once


class Quota:
    """At most so many questions a minute from each caller, by the generic cell rate algorithm (ITU-T I.371).

    Args:
        per_minute: None: as many as they like.
        clock: seconds.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._spent_until: dict[str, float] = {}  # by caller: when all that was asked is paid for

    def admit(self, caller: str) -> None:
        """Count one question. Raises ServiceError `rate_limited`, which says when to ask again."""
        if self._per_minute is None:
            return
        interval_s = 60 / self._per_minute
        room_s = max(0.0, BURST_S - interval_s)
        now = self._clock()
        until = max(now, self._spent_until.get(caller, now))
        wait_s = until - now - room_s
        if wait_s > 1e-9:
            raise self._refusal(math.ceil(wait_s))
        self._spent_until[caller] = until + interval_s

    def _refusal(self, wait_s: int) -> ServiceError:
        headers = {
            "Retry-After": str(wait_s),
            "RateLimit": f'"questions";r=0;t={wait_s}',
            "RateLimit-Policy": f'"questions";q={self._per_minute};w=60',
        }
        detail = f"This key may ask {self._per_minute} questions a minute. Ask again in {wait_s} s."
        return ServiceError("rate_limited", detail, headers=headers)
