"""One conformance suite for all trackers, and what is special about each."""
