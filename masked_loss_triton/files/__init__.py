"""Files, whatever is in them: atomic writes, parallel work, the progress bar. Nothing here is about masks."""
