"""Tests of the whole product; run by `make test`."""
