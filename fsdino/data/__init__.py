"""Data sets, folds, episodes and views: everything that decides which pixels a model sees."""
