"""Fuzzing of what strangers can send: libFuzzer under AddressSanitizer. See test_fuzz.py."""
