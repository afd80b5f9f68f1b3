"""Tests of `agent.source`."""
