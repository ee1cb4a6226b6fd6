"""Measurements on a machine at hand, against peers and against what the hardware allows: `zoo bench`."""
