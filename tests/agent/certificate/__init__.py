"""Tests of `agent.certificate`."""
