"""Model and arguments to a static graph; knows neither rules nor relevance."""
