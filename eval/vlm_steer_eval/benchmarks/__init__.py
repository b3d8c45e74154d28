"""The benchmarks: their questions and ground truth, their parsers, their scores."""
