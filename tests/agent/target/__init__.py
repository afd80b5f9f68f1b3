"""Tests of `agent.target`."""
