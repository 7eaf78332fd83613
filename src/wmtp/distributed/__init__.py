"""Checkpoints and, for several processes, launch and sharding.

Nothing is imported here, so that the parts without torch stay quick to load.
"""
