"""Mask files as arrays: reading, pixel operations, and the geometry that brings them to latent size."""
