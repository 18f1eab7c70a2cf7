"""Explanations of a whole data set."""
