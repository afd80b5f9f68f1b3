"""Disks of running QEMUs and storage daemons: found over QMP, read over NBD.

Owns what is asked of a QEMU, and that nothing of ours stays behind in it. All calls block (run them
on a thread). Never talks to a socket that the host's configuration does not name.
"""
