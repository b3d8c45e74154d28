"""Statistics: metrics of counts, resampled intervals, tests, matched comparisons, frontiers."""
