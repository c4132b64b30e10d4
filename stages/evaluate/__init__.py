"""Task metrics, delta_m and probes."""
