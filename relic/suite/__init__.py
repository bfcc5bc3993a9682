"""A benchmark of worlds: scripts, truth from the engine, play, scores, report. Importing it loads nothing."""
