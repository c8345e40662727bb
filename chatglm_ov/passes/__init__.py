"""What is rewritten in a graph of fused operations when it is loaded."""
