"""A benchmark of worlds: scripts, truth from the engine, play, scores and the report. Importing it loads nothing."""
