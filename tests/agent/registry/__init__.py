"""Tests of `agent.registry`."""
