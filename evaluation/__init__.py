"""How good the explanations are: data, networks, methods, measures, and what they report."""
