"""How hard the property tests of the kernels try.

WARMSYNC_HYPOTHESIS=quick asks for fewer examples: the sanitizer run sets it, as every one of them
costs several times as much there.
"""

import os

from hypothesis import settings

# No deadline: a test must not fail because the machine is busy.
settings.register_profile("full", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=15)
settings.load_profile(os.environ.get("WARMSYNC_HYPOTHESIS", "full"))
