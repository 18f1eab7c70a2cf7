"""Steps to one forward and one pass of relevance back."""
