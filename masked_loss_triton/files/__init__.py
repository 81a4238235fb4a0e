"""Files, whatever is in them: atomic writes, parallel work, the progress bar, contact sheets. Nothing here reads a mask."""
