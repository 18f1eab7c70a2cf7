"""Graph and rules to steps, and what the forward fuses."""
