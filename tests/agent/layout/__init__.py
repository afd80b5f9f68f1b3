"""Tests of `agent.layout`."""
