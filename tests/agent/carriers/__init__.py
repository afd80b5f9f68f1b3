"""One conformance suite for all carriers."""
