"""Scores of videos."""
