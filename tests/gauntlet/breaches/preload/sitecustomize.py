"""Found by an agent's interpreter at its start: breaks the rule that the environment names."""

import os

from tests.gauntlet.breaches.rules import BREACHES

BREACHES[os.environ["WARMSYNC_TEST_BREACH"]].apply()
