"""The detectors, one subject per file; a file put here is found."""
