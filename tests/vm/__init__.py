"""Whole virtual machines: QEMU under TCG, moved between two agents while their guests write."""
