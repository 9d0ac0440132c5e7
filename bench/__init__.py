"""What each door of the service costs: same weights, threads, client and requests."""
