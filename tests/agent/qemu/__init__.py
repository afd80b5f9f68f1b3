"""Disks of QEMUs, without agents."""
