"""One module per command of `masked-loss`: its flags, and what it prints."""
