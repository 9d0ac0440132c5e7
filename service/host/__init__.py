"""Asks the machine about its processor, memory and ports."""
