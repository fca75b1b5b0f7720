"""One benchmark script per family of devices: the standard set, on whatever of it is there."""
