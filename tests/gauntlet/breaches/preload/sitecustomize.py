"""Found by an agent's interpreter at its start: breaks the rule that the environment names."""

import os

try:
    from tests.gauntlet.breaches.rules import BREACHES

    BREACHES[os.environ["WARMSYNC_TEST_BREACH"]].apply()
except Exception as error:
    # An Exception would only be printed (site.execsitecustomize), and nothing would be broken.
    raise SystemExit(f"the breach is not applied: {error!r}") from error
