"""Make a small model accurate: quantize, compensate, distill."""
