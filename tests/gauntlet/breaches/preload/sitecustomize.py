"""Found by an agent's interpreter at its start: changes in it what the environment names."""

import os

try:
    if breach := os.environ.get("WARMSYNC_TEST_BREACH"):
        from tests.gauntlet.breaches.rules import BREACHES

        BREACHES[breach].apply()
    if seconds := os.environ.get("WARMSYNC_TEST_RELEASE_SECONDS"):
        from tests.gauntlet.breaches.patches import hurry_release

        hurry_release(float(seconds))
except Exception as error:
    # An Exception would only be printed (site.execsitecustomize), and nothing would be changed.
    raise SystemExit(f"the breach is not applied: {error!r}") from error
