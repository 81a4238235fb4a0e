"""Masks from words: a detector finds boxes, a segmenter cuts out what is in them, the rest is plain pixels and files."""
