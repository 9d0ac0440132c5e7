"""How long the start of a large model may take, which probes and health checks must wait for."""

# A model of 8B weights in 4 bits: the size of its files, and the seconds that two busy cores took to start it from
# memory (docs/sizes.md). The slowest disk reads that many MiB per second.
MODEL_MIB, FROM_MEMORY, SLOWEST_DISK = 5482, 65, 30
SECONDS = MODEL_MIB / SLOWEST_DISK + FROM_MEMORY
