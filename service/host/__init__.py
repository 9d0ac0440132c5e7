"""What the machine has: its processor, memory and ports."""
