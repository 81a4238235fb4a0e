"""Measurements of the loss: time, bytes, launches, memory, compiled code. `make bench` runs them all; README.md explains them."""
