"""Detectors of invented words: labels, fitting, and how much place alone would tell."""
